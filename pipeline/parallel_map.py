"""Rows of work for many processes: Ray Data does them on the cluster, and where Ray is on this machine alone, threads of this process begin them.

Ray Data takes seconds, and of every core, to start. Small work is done before that; of larger work Ray Data takes what is left, while the threads do
a little more of it. Whoever does a row, what it gives is the same.
"""

import contextlib
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from cluster.config import ClusterConfig
from cluster.connect import connect
from components.errors import DataError

HEAD_START_S, RAY_START_S = 10.0, 10.0
TURNS_PER_WORKER = 4
MOST_BLOCKS = 4096
NO_PROGRESS_S = 6 * 3600.0
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What is to be done with rows.

    Attributes:
        function: takes some of the rows, and yields what each gave; several threads call it at a time, and it travels.
        stop: makes the calls of the function that are under way in this process end soon, and frees what it keeps between calls.
        most_per_turn: rows that a worker of the cluster may get at once.
        use_gpu: each worker of the cluster has a GPU of its own.
    """

    function: Callable[[Iterable[Row]], Iterator[Row]]
    stop: Callable[[], None]
    most_per_turn: int = 1
    use_gpu: bool = False


def parallel_map(rows: Sequence[Row], work: Work, cluster: ClusterConfig) -> Generator[Row]:
    """Has rows of work done, and yields what each gave, in any order.

    Raises:
        DataError: if a row's work does.
    """
    if cluster.address != "local":
        yield from _by_ray_data(rows, work, cluster)
        return
    with _Threads(rows, work) as hands:
        yield from hands.results(HEAD_START_S)
        rest = hands.hand_to_ray(RAY_START_S)
        for row in _by_ray_data(rest, work, cluster) if rest else ():
            yield row
            yield from hands.results(0.0)
        yield from hands.results(None)


class _Threads:
    """Threads of this process that do rows from the first on."""

    def __init__(self, rows: Sequence[Row], work: Work) -> None:
        self._left, self._work = deque(rows), work
        self._results: queue.SimpleQueue[Row | BaseException | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._do, name=f"hand {number}", daemon=True) for number in range(min(len(rows), os.cpu_count() or 1))]
        self._at_work, self._done, self._started = len(self._threads), 0, time.monotonic()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.clear()
        self._work.stop()
        for thread in self._threads:
            thread.join()
        self._work.stop()

    def _do(self) -> None:
        try:
            for result in self._work.function(self._taken()):
                self._results.put(result)
            self._results.put(None)
        except BaseException as error:  # it is raised where the results are read
            self._results.put(error)

    def _taken(self) -> Iterator[Row]:
        with contextlib.suppress(IndexError):
            while True:
                yield self._left.popleft()

    def results(self, seconds: float | None) -> Iterator[Row]:
        """Yields what the threads made, until they are done or some time has passed."""
        end = None if seconds is None else time.monotonic() + seconds
        while self._at_work:
            try:
                result = self._results.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
            except queue.Empty:
                return
            if isinstance(result, BaseException):
                raise result
            if result is None:
                self._at_work -= 1
                continue
            self._done += 1
            yield result

    def hand_to_ray(self, seconds: float) -> list[Row]:
        """Returns the rows, and leaves them to others, that the threads would not begin in some time at the rate so far."""
        kept = round(seconds * self._done / (time.monotonic() - self._started))
        rest: deque[Row] = deque()
        with contextlib.suppress(IndexError):
            while len(self._left) > kept:
                rest.appendleft(self._left.pop())
        return list(rest)


def _by_ray_data(rows: Sequence[Row], work: Work, cluster: ClusterConfig) -> Iterator[Row]:
    connect(cluster)
    import ray.data

    # Work gives up by itself on what takes too long; rows that are slow are no reason to end the run.
    ray.data.DataContext.get_current().execution_no_progress_timeout_s = NO_PROGRESS_S
    options: dict[str, Any] = {"label_selector": cluster.preprocess_labels} if cluster.preprocess_labels else {}
    workers = max(1, int(ray.cluster_resources().get("GPU" if work.use_gpu else "CPU", 1)))
    options |= {"num_gpus": 1} if work.use_gpu else {"num_cpus": 1}
    turns = [{"rows": list(rows[first:last])} for first, last in _turns(len(rows), workers, work.most_per_turn)]
    dataset = ray.data.from_items(turns, override_num_blocks=min(len(turns), MOST_BLOCKS)).map(partial(_do_turn, function=work.function), **options)
    try:
        for turn in dataset.iter_rows():
            yield from turn["rows"]
    except ray.exceptions.RayTaskError as error:
        raise _data_error(error) or error from error


def _turns(rows: int, workers: int, most: int) -> list[tuple[int, int]]:
    """Cuts rows into turns [first, last) of a worker.

    Between two turns a worker waits for the driver, a tenth of a second and more.
    """
    length = max(1, min(most, rows // (TURNS_PER_WORKER * workers)))
    return [(first, min(first + length, rows)) for first in range(0, rows, length)]


def _do_turn(turn: Row, function: Callable[[Iterable[Row]], Iterator[Row]]) -> Row:
    return {"rows": list(function(turn["rows"]))}


def _data_error(error: BaseException | None) -> DataError | None:
    """Returns what the source of a task said, if that is why it failed."""
    found = re.findall(r"DataError: (.*)", str(error))
    return DataError(found[-1]) if found else None
