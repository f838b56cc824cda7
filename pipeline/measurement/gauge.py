"""How far remote work is while it goes on: actors and tasks put notes on the board, and the driver shows them."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from cluster.board import Board, BoardLostError
from pipeline.context import Advance
from pipeline.progress import repeatedly

TELL_EVERY_S, LOOK_EVERY_S = 1.0, 2.0


@dataclass(frozen=True)
class Gauge:
    """Where one piece of work says how far it is; it travels."""

    board: str
    piece: str

    def tell(self) -> Callable[[float], None]:
        """Returns a function that says how much is done, at most once a second; saying so never fails, for the work is worth more."""
        board, told = Board(self.board), time.monotonic()

        def say(done: float) -> None:
            nonlocal told
            if time.monotonic() - told >= TELL_EVERY_S:
                told = time.monotonic()
                with suppress(BoardLostError):
                    board.put(self.piece, repr(done))

        return say


class Gauges:
    """The driver's side: one piece of work after the other is under way, then done."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self._board = advance, Board(f"work-{uuid.uuid4().hex}")
        self._done: dict[str, float] = {}
        self._shown = 0.0

    def gauge(self, piece: object) -> Gauge:
        """Returns where a piece of work says how far it is."""
        return Gauge(self._board.name, str(piece))

    def finish(self, piece: object, amount: float) -> None:
        """Takes note of a piece of work that is done."""
        self._done[str(piece)] = amount
        self._show(sum(self._done.values()))

    def look(self) -> None:
        """Shows what is done of the pieces that are under way, too."""
        with suppress(BoardLostError, ValueError):
            under_way = {piece: float(note) for piece, note in self._board.below("").items() if piece not in self._done}
            self._show(sum(self._done.values()) + sum(under_way.values()))

    def _show(self, now: float) -> None:
        if now > self._shown:
            self._advance(now - self._shown)
            self._shown = now

    def clear(self) -> None:
        """Takes the notes off the board."""
        with suppress(BoardLostError):
            self._board.clear()


@contextmanager
def gauges(advance: Advance) -> Iterator[Gauges]:
    """Looks again and again during a block how far the pieces are that it has done, and shows that by advancing."""
    found = Gauges(advance)
    try:
        with repeatedly(LOOK_EVERY_S, found.look):
            yield found
    finally:
        found.clear()
