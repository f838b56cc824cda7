"""How far a piece of work is, in words: what is done of it, at which rate lately, how long it still takes; and what took the time in the end."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WINDOW_S, SHORTEST_SPAN_S = 60.0, 1.0


class Pace:
    """The rate of a piece of work, from what was done lately; what came before the first step, such as the start of workers, is no part of it.

    Attributes:
        beginning: what goes on as long as there is no rate.
    """

    def __init__(self, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins.

        Args:
            done: what an earlier call did of it.
        """
        self.total, self.done, self._clock = total, float(done), clock
        self._seen: deque[tuple[float, float]] = deque()
        self._last, self.has_ever_begun = clock(), False
        self.beginning = "starting"

    def advance(self, amount: float) -> None:
        """Takes note of work that is done now."""
        if not amount:
            return
        self.done += amount
        self.has_ever_begun = True
        now = self._last = self._clock()
        self._seen.append((now, self.done))
        while len(self._seen) > 2 and self._seen[1][0] <= now - WINDOW_S:
            self._seen.popleft()

    def restart(self) -> None:
        """Begins the reckoning anew, as when workers start again."""
        self._seen.clear()
        self._last = self._clock()

    @property
    def has_begun(self) -> bool:
        """Whether anything was done since the beginning, or since it began anew."""
        return bool(self._seen)

    @property
    def idle_s(self) -> float:
        """Seconds since anything was done, or since the beginning."""
        return self._clock() - self._last

    @property
    def per_second(self) -> float | None:
        """What is done in a second, None as long as too little is known."""
        if len(self._seen) < 2 or self._seen[-1][0] - self._seen[0][0] < SHORTEST_SPAN_S:
            return None
        (first, before), (last, now) = self._seen[0], self._seen[-1]
        return (now - before) / (last - first)

    def __str__(self) -> str:
        rate = self.per_second
        if rate is None:
            return self.beginning
        return f"{f'{rate:.3g}' if rate < 1000 else f'{rate:,.0f}'} per second, {duration(max(0, self.total - self.done) / rate)} left"


def duration(seconds: float) -> str:
    """Returns a time as a person says it: `40 s`, `3 min`, `2.5 h`."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


class Times:
    """Seconds by part of the work. A part within another counts for itself alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open = threading.local()
        self._lock = threading.Lock()

    def add(self, what: str, seconds: float) -> None:
        """Adds to a part's time."""
        with self._lock:
            self._seconds[what] = self._seconds.get(what, 0.0) + seconds

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Times a block."""
        within: list[float] = self._open.__dict__.setdefault("within", [])
        within.append(0.0)
        self.add(what, 0.0)
        began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began
            self.add(what, seconds - within.pop())
            if within:
                within[-1] += seconds

    def take(self) -> dict[str, float]:
        """Returns what was added since the last call, in the order in which the parts began."""
        with self._lock:
            taken, self._seconds = self._seconds, {}
        return taken


@contextmanager
def repeatedly(every_s: float, act: Callable[[], None]) -> Iterator[None]:
    """Does something again and again during a block, the first time after `every_s` seconds."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(every_s):
            act()

    thread = threading.Thread(target=repeat, name="repeatedly", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
