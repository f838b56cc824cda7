"""What every stage is handed besides its own config and receipts: where to write, where to run, whom to tell."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cluster.config import ClusterConfig

Advance = Callable[[int], None]


class Reporter:
    """Tells a person on stderr what happens: lines always, bars where stderr is a terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def line(self, text: str) -> None:
        """Prints one line."""
        self.console.print(text, soft_wrap=True)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Says what is being waited for during a block, with a spinner where stderr is a terminal."""
        self.line(f"  {what}")
        with self.console.status(what) if sys.stderr.isatty() else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def progress(self, what: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Shows a bar during a block; the block advances it by calling the function it is given."""
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not sys.stderr.isatty()) as bars:
            task = bars.add_task(what, total=total, completed=done)
            yield lambda amount: bars.advance(task, amount)


@dataclass(frozen=True)
class StageContext:
    """Where a stage writes and runs.

    Attributes:
        storage: absolute root of everything that runs make.
        folder: the stage's own folder for these inputs.
        inputs: digest of all that decides the stage's result.
        run_name: what a person calls the run.
    """

    storage: Path
    folder: Path
    inputs: str
    run_name: str
    cluster: ClusterConfig
    reporter: Reporter
