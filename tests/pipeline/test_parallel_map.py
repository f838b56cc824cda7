"""Who does which rows of work: threads of this process, Ray Data, or both; here without Ray."""

import threading
from collections.abc import Iterable, Iterator, Sequence

import pytest

from cluster.config import ClusterConfig
from components.errors import DataError
from pipeline import parallel_map as spread_module
from pipeline.parallel_map import Row, Work, parallel_map

ROWS = [{"number": number} for number in range(40)]


def squares(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        yield {"number": row["number"], "square": row["number"] ** 2}


def idle() -> None:
    pass


class Cluster:
    """Stands for Ray Data, and keeps what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[Row] = []
        self.begun = threading.Event()
        monkeypatch.setattr(spread_module, "_by_ray_data", self)

    def __call__(self, rows: Sequence[Row], work: Work, _: ClusterConfig) -> Iterator[Row]:
        self.given += rows
        self.begun.set()
        yield from work.function(rows)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    return Cluster(monkeypatch)


def in_order(results: Iterable[Row]) -> list[Row]:
    return sorted(results, key=lambda row: row["number"])


def test_small_work_is_done_without_ray_data(cluster: Cluster):
    assert in_order(parallel_map(ROWS, Work(squares, idle), ClusterConfig())) == list(squares(ROWS))
    assert not cluster.given


def test_on_a_cluster_ray_data_does_everything(cluster: Cluster):
    assert in_order(parallel_map(ROWS, Work(squares, idle), ClusterConfig(address="auto"))) == list(squares(ROWS))
    assert cluster.given == ROWS


def test_what_threads_have_not_begun_in_time_is_left_to_ray_data_and_each_row_done_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spread_module, "HEAD_START_S", 0.0)

    def wait(rows: Iterable[Row]) -> Iterator[Row]:
        for row in squares(rows):
            cluster.begun.wait(60)
            yield row

    assert in_order(parallel_map(ROWS, Work(wait, idle), ClusterConfig())) == list(squares(ROWS))
    assert len(ROWS) - 3 <= len(cluster.given) <= len(ROWS)
    assert cluster.given == ROWS[-len(cluster.given) :]


def test_threads_keep_what_they_would_begin_while_ray_data_starts(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spread_module, "HEAD_START_S", 0.5)
    monkeypatch.setattr(spread_module, "RAY_START_S", 1e6)
    done = threading.Semaphore(5)

    def some(rows: Iterable[Row]) -> Iterator[Row]:
        for row in squares(rows):
            if not done.acquire(timeout=1.0):
                done.release(len(ROWS))
            yield row

    assert in_order(parallel_map(ROWS, Work(some, idle), ClusterConfig())) == list(squares(ROWS))
    assert not cluster.given


@pytest.mark.usefixtures("cluster")
def test_the_error_of_one_row_ends_all_threads():
    stopped = threading.Event()

    def fail(rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            if row["number"] == 2:
                raise DataError("row 2 is bad", "corrupt")
            stopped.wait(60)
            yield row

    with pytest.raises(DataError, match="row 2 is bad"):
        list(parallel_map(ROWS, Work(fail, stopped.set), ClusterConfig()))
    assert stopped.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hand ")]


@pytest.mark.usefixtures("cluster")
def test_threads_end_when_nobody_wants_more():
    results = parallel_map(ROWS, Work(squares, idle), ClusterConfig())
    next(results)
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hand ")]


@pytest.mark.parametrize(("rows", "workers", "most"), [(1, 2, 16), (7, 2, 1), (100, 2, 16), (1000, 8, 16), (5, 64, 16)])
def test_turns_hold_each_row_once_and_keep_every_worker_busy(rows: int, workers: int, most: int):
    turns = spread_module._turns(rows, workers, most)
    lengths = [last - first for first, last in turns]
    assert [row for first, last in turns for row in range(first, last)] == list(range(rows))
    assert 1 <= min(lengths) <= max(lengths) <= most
    assert len(turns) >= min(rows, spread_module.TURNS_PER_WORKER * workers)
