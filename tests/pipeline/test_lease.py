"""One process at a time, on disk and on S3, whether the store honours conditional writes or not."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import Conditions, S3Server

from components.conditional_writes import Conditions as Found
from components.conditional_writes import conditions_of
from components.storage import Location
from pipeline import lease
from pipeline.lease import LeaseHeldError, LeaseLostError, held
from pipeline.lease_record import Record, RecordFile, Version, record_file

HONOURED: dict[Conditions, Found] = {
    "honoured": Found(writes=True, deletes=True),
    "writes": Found(writes=True, deletes=False),
    "ignored": Found(writes=False, deletes=False),
    "refused": Found(writes=False, deletes=False),
}
MINE, OTHERS = Record(id="m", holder="process 1 on here", beat=0), Record(id="x", holder="process 1 on elsewhere", beat=4)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "EXPIRE_S", 5.0)  # a busy machine may stand still for a second
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)


def on_s3(store: S3Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    for name, value in store.env.items():
        monkeypatch.setenv(name, value)
    return Location.of(f"s3://{store.bucket}/{folder.name}/lock")


@pytest.fixture(params=["disk", *HONOURED])
def file(
    request: pytest.FixtureRequest, tmp_path: Path, s3_of_kind: Callable[[Conditions], S3Server], quick: None, monkeypatch: pytest.MonkeyPatch
) -> Location:
    if request.param == "disk":
        return Location.of(tmp_path / "lock")
    if not HONOURED[request.param].writes:
        monkeypatch.setattr(lease, "SETTLE_S", 0.5)  # it is the wait alone that keeps them apart, on a busy machine too
    return on_s3(s3_of_kind(request.param), tmp_path, monkeypatch)


@pytest.fixture(params=list(HONOURED))
def remote(
    request: pytest.FixtureRequest, tmp_path: Path, s3_of_kind: Callable[[Conditions], S3Server], quick: None, monkeypatch: pytest.MonkeyPatch
) -> Location:
    """A file on S3 alone: a lock on disk can neither be lost nor outlive its process."""
    return on_s3(s3_of_kind(request.param), tmp_path, monkeypatch)


def is_free(file: Location) -> bool:
    """Tells whether the lease was released: where removals cannot be conditional, an empty file stays."""
    return not file.is_file() or (file.size() == 0 and conditions_of(file) == HONOURED["writes"])


def test_a_second_process_is_refused_while_the_first_is_there_and_let_in_after(file: Location):
    for _ in range(2):
        with held(file, wait=False):
            with pytest.raises(LeaseHeldError, match=r"process \d+ on "), held(file, wait=False):
                pass
            time.sleep(0.5)
            with pytest.raises(LeaseHeldError), held(file, wait=False):
                pass


def test_those_who_wait_come_in_one_after_the_other(file: Location):
    inside, most, entered = 0, 0, 0

    def enter() -> None:
        nonlocal inside, most, entered
        with held(file, wait=True):
            inside += 1
            most, entered = max(most, inside), entered + 1
            time.sleep(0.3)
            inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (entered, most) == (4, 1)


def test_a_process_whose_lease_another_took_is_told_and_leaves_it_alone(remote: Location):
    def lose() -> None:
        with held(remote, wait=False):
            remote.write_text(OTHERS.model_dump_json())
            time.sleep(60)

    with pytest.raises(LeaseLostError, match="another process may have taken over"):
        lose()
    assert remote.read_text() == OTHERS.model_dump_json()


@pytest.mark.parametrize("left", ['{"id": "x", "holder": "process 1 on elsewhere", "beat": 4}', "", "no lease"])
def test_what_a_dead_process_left_is_written_over(remote: Location, left: str):
    remote.write_text(left)
    for _ in range(2):
        with held(remote, wait=False):
            assert Record.model_validate_json(remote.read_text()).holder.startswith("process ")
        assert is_free(remote)


@pytest.mark.parametrize("kind", HONOURED)
def test_what_a_store_honours_is_found_out_and_leaves_nothing_there(
    kind: Conditions, s3_of_kind: Callable[[Conditions], S3Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = on_s3(s3_of_kind(kind), tmp_path, monkeypatch)
    monkeypatch.setattr("components.conditional_writes._found", {})
    assert conditions_of(file) == HONOURED[kind]
    assert file.parent.files() == {}


def test_only_the_version_that_was_read_is_written_over_or_removed(remote: Location):
    mine = record_file(remote)
    first = mine.put(MINE, over=None)
    assert first is not None
    assert mine.read() == first
    others = record_file(remote).put(OTHERS, over=first)
    assert others is not None
    for late in (mine.put(MINE.renewed(1), over=first), mine.put(MINE.renewed(1), over=None)):
        assert late is None
    assert not mine.remove(first)
    assert mine.read() == others
    assert mine.remove(others)
    assert is_free(remote)
    assert mine.put(MINE.renewed(2), over=others) is None
    assert is_free(remote)


class Unreliable:
    """The file of a lease, of whose writes some are done and yet fail, and some do not return before they are let."""

    def __init__(self, real: RecordFile, loses: Callable[[int], bool], hangs: threading.Event | None = None) -> None:
        self.file, self.read, self.remove = real.file, real.read, real.remove
        self._real, self._loses, self._hangs, self._writes = real, loses, hangs, 0

    def put(self, record: Record, over: Version | None) -> Version | None:
        self._writes += 1
        if self._hangs is not None and self._writes > 2:
            self._hangs.wait()
        written = self._real.put(record, over)
        if self._loses(self._writes):
            raise OSError("the answer was lost")
        return written


either_kind = pytest.mark.parametrize("remote", ["honoured", "ignored"], indirect=True)


@either_kind
def test_a_write_whose_answer_is_lost_neither_loses_the_lease_nor_takes_it_twice(remote: Location, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "record_file", lambda file: Unreliable(record_file(file), loses=lambda write: write % 3 > 0))
    with held(remote, wait=False):
        time.sleep(lease.EXPIRE_S + 1)
        beat = Record.model_validate_json(remote.read_text()).beat
    assert beat > 1
    assert is_free(remote)


@either_kind
def test_a_holder_whose_renewal_never_returns_leaves_before_the_lease_expires(remote: Location, monkeypatch: pytest.MonkeyPatch):
    hangs = threading.Event()
    monkeypatch.setattr(lease, "record_file", lambda file: Unreliable(record_file(file), loses=lambda _: False, hangs=hangs))
    still_mine = []

    def wait_inside() -> None:
        with held(remote, wait=False):
            try:
                time.sleep(60)
            finally:
                still_mine.append(Record.model_validate_json(remote.read_text()).beat)
                hangs.set()

    with pytest.raises(LeaseLostError, match="could not be renewed"):
        wait_inside()
    assert still_mine == [1]
