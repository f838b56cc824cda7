"""A training that is stopped, asked to end, and that loses Ray's head or the room on its disk: each time it ends like an undisturbed one."""

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import terminal

from pipeline.tracking import connect
from pipeline.training.restarts import restarts_of
from workflows.cli import RESUME
from workflows.faults import Fault, FaultInjector, Kind, Trial, new_folder
from workflows.preset_files import find_preset
from workflows.processes import ProcessTree, shared_memory_files, without_owner
from workflows.verify_resume import TrainingEnd, compare, scaled_down, share_datasets, training_end_of

STEPS = 240
SETTINGS = (
    *scaled_down(STEPS, 3),
    "train.global_batch_size=32",
    "train.warmup_steps=2",
    "model.base_channels=8",
    "model.num_groups=4",
    "model.dropout=0.1",
    "cluster.num_workers=2",
    "train.hang_timeout_s=5",
)

IN_A_TERMINAL = (sys.executable, str(terminal.__file__))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[tuple[Trial, TrainingEnd]]:
    trial = Trial(str(find_preset("digits")), SETTINGS, new_folder() / "a")
    FaultInjector(trial, []).run()
    yield trial, training_end_of(trial)
    shutil.rmtree(trial.folder.parent)


@pytest.fixture
def trial(undisturbed: tuple[Trial, TrainingEnd]) -> Iterator[Trial]:
    """The same training, to be disturbed."""
    folder = new_folder()
    disturbed = replace(undisturbed[0], folder=folder / "b")
    share_datasets(undisturbed[0], disturbed)
    yield disturbed
    shutil.rmtree(folder)


def unlike(undisturbed: tuple[Trial, TrainingEnd], trial: Trial) -> list[str]:
    return [f"{one.what}: {one.difference}" for one in compare(undisturbed[1], training_end_of(trial)) if not one.equal]


def reasons(trial: Trial) -> list[str]:
    """Returns why the training started again, as its files say, and checks that its page says the same."""
    folder = trial.training_folder()
    assert folder is not None
    restarts = restarts_of(folder)
    tracking = connect(trial.storage)
    tags = tracking.client.get_run(trial.model().mlflow_run_id).data.tags
    assert {name: value for name, value in tags.items() if name.startswith("restart.")} == {f"restart.{one.attempt:04d}": str(one) for one in restarts}
    return [one.reason for one in restarts]


@pytest.mark.parametrize(
    ("kind", "reason", "starts"),
    [
        ("worker killed", r"workers? [01](, 1)? died: process or node was lost", 1),
        ("worker stands still", r"worker [01] \(.*, pid \d+, .* after step \d+\) made no step for too long \(train\.hang_timeout_s\)", 1),
        ("asked to end", r"the command was asked to end \(SIGTERM\)", 2),
        ("driver killed", r"the command was killed, or its machine was lost", 2),
        ("head killed", r"Ray's head has not answered for \d+ s|the command was killed, or its machine was lost", 2),
    ],
)
def test_the_end_is_that_of_an_undisturbed_training(undisturbed: tuple[Trial, TrainingEnd], trial: Trial, kind: Kind, reason: str, starts: int):
    shared_memory = shared_memory_files()
    endured = FaultInjector(trial, [Fault(kind, step=STEPS // 3, delay_s=0.2, draw=1)]).run()
    assert [one.kind for one in endured.struck] == [kind]
    assert endured.starts == starts
    assert unlike(undisturbed, trial) == []
    assert [why for why in reasons(trial) if not re.search(reason, why)] == []
    assert len(reasons(trial)) == 1
    assert endured.processes == ()
    assert trial.temporary_files() == []
    assert without_owner(shared_memory_files() - shared_memory) == []


def test_asked_to_end_it_saves_where_it_is_and_says_that_it_is_to_be_resumed(undisturbed: tuple[Trial, TrainingEnd], trial: Trial):
    family = start_until(trial, STEPS // 3 + 7)
    try:
        family.main.terminate()
        assert code_of(family) == RESUME
        assert family.wait(30) == []
    finally:
        family.kill()
    said = trial.log.read_text()
    step = int(re.findall(r"saved at step (\d+)", said)[0])
    folder = trial.training_folder()
    assert folder is not None
    assert [name for name in folder.folders() if name.startswith(f"step_{step:09d}")] != []
    assert FaultInjector(trial, []).run().starts == 1
    begun = re.findall(r"start 2: from step (\d+) with 2 workers", trial.log.read_text())
    assert int(begun[0]) >= step  # the next checkpoint may have come before the workers ended
    assert unlike(undisturbed, trial) == []


def test_a_terminal_that_closes_has_a_checkpoint_saved_and_leaves_no_process(undisturbed: tuple[Trial, TrainingEnd], trial: Trial):
    family = start_until(trial, STEPS // 3 + 7, IN_A_TERMINAL)
    try:
        family.main.send_signal(signal.SIGUSR1)
        assert code_of(family) == RESUME
        assert family.wait(30) == []
    finally:
        family.kill()
    folder = trial.training_folder()
    assert folder is not None
    saved = max(int(name.split("_")[1].partition("-")[0]) for name in folder.folders() if name.startswith("step_"))
    assert saved >= STEPS // 3 + 7
    assert FaultInjector(trial, []).run().starts == 1
    assert unlike(undisturbed, trial) == []
    assert reasons(trial) == ["the command was asked to end (SIGHUP: its terminal, or who read what it prints, went away)"]
    assert trial.temporary_files() == []


@pytest.fixture
def little_disk() -> Iterator[Path]:
    """A file system of 60 MiB."""
    folder = Path(tempfile.mkdtemp(prefix="ddpm-d-"))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


@pytest.fixture
def on_little_disk(undisturbed: tuple[Trial, TrainingEnd], little_disk: Path) -> Iterator[Trial]:
    """The same training, its storage root on a small file system."""
    folder = new_folder()
    disturbed = replace(undisturbed[0], folder=folder / "b")
    disturbed.folder.mkdir()
    (disturbed.folder / "storage").symlink_to(little_disk)
    shutil.copytree(undisturbed[0].storage.path / "datasets", little_disk / "datasets")
    yield disturbed
    shutil.rmtree(folder)


def test_a_disk_that_is_full_for_a_while_costs_no_step(undisturbed: tuple[Trial, TrainingEnd], on_little_disk: Trial, little_disk: Path):
    family = start_until(on_little_disk, STEPS // 3)
    try:
        fill(little_disk)
        wait_for(lambda: "a checkpoint cannot be written (No space left on device)" in on_little_disk.log.read_text(), family)
        (little_disk / "other").unlink()
        assert code_of(family) == 0, on_little_disk.log.read_text()
    finally:
        family.kill()
    assert "checkpoints can be written again" in on_little_disk.log.read_text()
    assert unlike(undisturbed, on_little_disk) == []
    assert reasons(on_little_disk) == []


def test_a_disk_that_stays_full_ends_the_command_with_one_line_and_nothing_is_lost(
    undisturbed: tuple[Trial, TrainingEnd], on_little_disk: Trial, little_disk: Path
):
    family = start_until(on_little_disk, STEPS // 3)
    try:
        fill(little_disk)
        assert code_of(family) == 2, on_little_disk.log.read_text()
    finally:
        family.kill()
    said = on_little_disk.log.read_text()
    assert re.search(r"error: .*cannot be written \(No space left on device\).*run the same command again to resume from the last checkpoint", said), said
    assert said.partition("Traceback")[2] == ""
    fill(little_disk)
    again = on_little_disk.start()
    assert code_of(again) == 2
    assert "cannot be written (No space left on device)" in on_little_disk.log.read_text().removeprefix(said)
    assert "Traceback" not in on_little_disk.log.read_text()
    (little_disk / "other").unlink()
    assert FaultInjector(on_little_disk, []).run().starts == 1
    assert unlike(undisturbed, on_little_disk) == []


def start_until(trial: Trial, step: int, within: Sequence[str] = ()) -> ProcessTree:
    """Starts the training and returns when its curve has come to a step."""
    family = trial.start(within)
    wait_for(lambda: last_step(trial) >= step, family)
    return family


def last_step(trial: Trial) -> int:
    from pipeline.training.metrics_log import read_metrics

    folder = trial.training_folder()
    lines = read_metrics(folder) if folder else []
    return lines[-1].step if lines else 0


def wait_for(condition: Callable[[], bool], family: ProcessTree, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert family.code() is None, "the command ended"
        assert time.monotonic() < deadline
        family.look()
        time.sleep(0.1)


def code_of(family: ProcessTree, seconds: float = 300) -> int:
    deadline = time.monotonic() + seconds
    while (code := family.code()) is None:
        assert time.monotonic() < deadline
        family.look()
        time.sleep(0.1)
    return code


def fill(disk: Path) -> None:
    """Leaves no room on a file system."""
    with (disk / "other").open("ab") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            return
