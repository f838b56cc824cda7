"""One process at a time, on disk and on S3."""

import threading
import time
from pathlib import Path

import pytest
import ray_nodes

from components.storage import Location
from pipeline import lease
from pipeline.lease import LeaseHeldError, LeaseLostError, held


@pytest.fixture(params=["disk", "s3"])
def file(request: pytest.FixtureRequest, tmp_path: Path, s3: ray_nodes.S3Server, monkeypatch: pytest.MonkeyPatch) -> Location:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "EXPIRE_S", 1.5)
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)
    return Location.of(tmp_path / "lock") if request.param == "disk" else Location.of(f"s3://{s3.bucket}/{tmp_path.name}/lock")


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


def test_a_process_whose_lease_another_took_is_told_and_leaves_it_alone(file: Location):
    if file.is_local:
        pytest.skip("a lock on disk cannot be taken")
    other = '{"id": "x", "holder": "process 1 on elsewhere", "beat": 4}'

    def lose() -> None:
        with held(file, wait=False):
            file.write_text(other)
            time.sleep(60)

    with pytest.raises(LeaseLostError, match="another process may have taken over"):
        lose()
    assert file.read_text() == other


def test_the_lease_of_a_dead_process_expires(file: Location):
    if file.is_local:
        pytest.skip("a lock on disk ends with its process")
    file.write_text('{"id": "x", "holder": "process 1 on elsewhere", "beat": 4}')
    with held(file, wait=False):
        pass
    assert not file.is_file()
