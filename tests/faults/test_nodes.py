"""A node that is killed while it trains, and comes back: the run goes on with one worker, then with two, and nothing of it shows in the curve."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import keeper
import numpy as np
import pytest
import ray_nodes
from support import TINY, Finished, ddpm_command

from components.model.manifest import is_complete
from components.model.retention import checkpoints
from components.storage import Location
from pipeline.artifacts import TrainedModel
from pipeline.training.metrics_log import SYSTEM_FOLDER
from pipeline.training.restarts import restarts_of
from workflows.faults import raw_curve

STEPS, EVERY = 2000, 5
SETTINGS = [*TINY, f"train.steps={STEPS}", f"train.log_every={EVERY}", "train.checkpoint_every=25", "cluster.cpus_per_worker=1"]
SECONDS = 400


@dataclass(frozen=True)
class Training:
    """A submitted run and what it writes.

    Attributes:
        job: the command that follows it.
    """

    storage: Path
    job: keeper.Kept

    @property
    def folder(self) -> Location:
        (found,) = (self.storage / "runs" / "digits" / "train").iterdir()
        return Location.of(found)

    def steps_of(self, attempt: int) -> list[int]:
        """Returns the steps of the whole checkpoints that a start of the workers has written, of those that are kept."""
        if not (self.storage / "runs" / "digits" / "train").is_dir():
            return []
        return sorted(int(path.name[5:14]) for path in checkpoints(self.folder) if path.name.endswith(f"-{attempt:04d}") and is_complete(path))

    def nodes_of(self, attempt: int) -> set[str]:
        """Returns the nodes on which a start of the workers trained; each has room for one worker."""
        return {path.parent.name for path in (self.folder.path / SYSTEM_FOLDER).glob(f"*/{attempt:04d}-*.jsonl")}

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.job.is_running(), self.job.tail(60)
            assert time.monotonic() < deadline, self.job.tail(60)
            time.sleep(0.2)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[ray_nodes.RayNodes]:
    with ray_nodes.start_nodes(tmp_path / "cluster", cpus=(0, 1, 1), in_namespaces=False, quick_to_declare_dead=True) as started:
        yield started


@pytest.fixture
def training(nodes: ray_nodes.RayNodes, tmp_path: Path) -> Iterator[Training]:
    settings = [*SETTINGS, "cluster.num_workers=[1,2]", "cluster.resize_interval_s=2", f"cluster.storage={tmp_path / 'storage'}"]
    command = ddpm_command("submit", "digits", *settings, "--address", nodes.dashboard_url, "--follow")
    job = keeper.start(command, log=tmp_path / "log", env=ray_nodes.environment(nodes.env))
    try:
        yield Training(tmp_path / "storage", job)
    finally:
        job.end()


@pytest.mark.slow
def test_a_run_shrinks_when_a_node_is_killed_grows_when_it_is_back_and_ends_with_the_curve_of_one_worker(
    nodes: ray_nodes.RayNodes, training: Training, command: Callable[..., Finished], tmp_path: Path
):
    training.wait_until(lambda: bool(training.steps_of(1)) and training.nodes_of(1) == {"0", "1"})
    nodes.kill(2)
    training.wait_until(lambda: bool(training.steps_of(2)))
    nodes.restart(2)
    training.wait_until(lambda: bool(training.steps_of(3)) and "1" in training.nodes_of(3))
    assert training.job.code(SECONDS) == 0, training.job.tail(60)
    assert training.nodes_of(2) == {"0"}
    shrunk, grown = restarts_of(training.folder)
    assert (shrunk.num_workers, grown.num_workers) == (1, 2)
    # Ray may hear of the peer that lost its connection before it hears of the node.
    assert re.match("workers? [01](, 1)? died: process or node was lost$|worker 0 raised .*(peer|remote|closed|reset|Connection)", shrunk.reason)
    assert grown.reason == "the number of workers changed from 1 to 2"
    assert f"start 2: from step {shrunk.step} with 1 worker" in training.job.tail(100)
    model = TrainedModel.model_validate_json((training.folder / "receipt.json").read_text())
    assert (model.num_workers, model.steps) == (2, STEPS)
    assert Path(model.path).name == f"step_{STEPS:09d}-0003"
    curve = raw_curve(training.folder)
    assert [step for step, _ in curve] == list(range(EVERY, STEPS + 1, EVERY))
    alone = command("train", "digits", *SETTINGS, "cluster.num_workers=1", "--json", cwd=tmp_path / "cluster", timeout=SECONDS)
    assert alone.code == 0, alone.stderr
    undisturbed = raw_curve(Location.of(alone.json["train"]["folder"]))
    np.testing.assert_allclose(np.array(curve), np.array(undisturbed), rtol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_is_saved_when_a_node_is_to_be_taken_away_and_that_is_no_failure(nodes: ray_nodes.RayNodes, tmp_path: Path):
    settings = [*SETTINGS, "train.checkpoint_every=5000", "cluster.num_workers=[1,2]", "cluster.max_failures=0", f"cluster.storage={tmp_path / 'storage'}"]
    command = ddpm_command("submit", "digits", *settings, "--address", nodes.dashboard_url, "--follow")
    job = keeper.start(command, log=tmp_path / "log", env=ray_nodes.environment(nodes.env))
    try:
        training = Training(tmp_path / "storage", job)
        training.wait_until(lambda: (tmp_path / "storage" / "runs" / "digits" / "train").is_dir() and training.nodes_of(1) == {"0", "1"})
        going = [node for node in nodes.alive() if node.resources.get("CPU")][-1]
        drain(nodes, going.node_id)
        assert job.code(SECONDS) == 0, job.tail(60)
    finally:
        job.end()
    assert re.search(r"node .* is to be taken away; saving a checkpoint[\s\S]*node .* is to be taken away now; saving a checkpoint", job.tail(200))
    (restart,) = restarts_of(training.folder)
    assert re.fullmatch("node .* was taken away", restart.reason)
    assert restart.num_workers == 1
    assert 0 < restart.step < STEPS  # no other checkpoint was due before the last step
    assert [step for step, _ in raw_curve(training.folder)] == list(range(EVERY, STEPS + 1, EVERY))


def drain(nodes: ray_nodes.RayNodes, node_id: str) -> None:
    """Announces that a node is to be taken away in twenty seconds, as a cloud does with spot capacity."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "20"]
    command = [*nodes.prefix, str(Path(sys.executable).parent / "ray"), "drain-node", "--address", nodes.gcs_address, "--node-id", node_id, *reason]
    done = subprocess.run(command, env=ray_nodes.environment(nodes.env), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
