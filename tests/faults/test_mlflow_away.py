"""A real MLflow server that is killed while `ddpm train` trains: training goes on, and in the end the server knows every step once."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import keeper
import mlflow
import pytest
import servers
from support import TINY, ddpm_command

from components.storage import Location
from pipeline.artifacts import TrainedModel
from pipeline.training.metrics_log import read_metrics
from pipeline.training.metrics_relay import CURSOR_FILE

EVERY = 5
SECONDS = 400
WARNINGS = ("warning MLflow does not have all metrics yet; the rest is kept in", "the same command delivers the rest")


@dataclass
class Site:
    """A storage root, and an MLflow store whose server comes and goes at one address."""

    home: Path
    port: int

    @property
    def folder(self) -> Location:
        """Where the training writes."""
        (found,) = (self.home / "storage" / "runs" / "digits" / "train").iterdir()
        return Location.of(found)

    @property
    def model(self) -> TrainedModel:
        """The receipt of the training that came to its end."""
        return TrainedModel.model_validate_json((self.folder / "receipt.json").read_text())

    @contextmanager
    def server(self) -> Iterator[ExitStack]:
        """Runs the server; it is killed when the block ends, or when what this gives is closed before."""
        with ExitStack() as stack:
            stack.enter_context(servers.mlflow_server(self.home / "mlflow", port=self.port))
            yield stack

    @contextmanager
    def train(self, steps: int) -> Iterator[keeper.Kept]:
        """Runs the command; it and all that it started are killed when the block ends, if they still run."""
        settings = [
            *TINY,
            f"train.steps={steps}",
            f"train.log_every={EVERY}",
            "train.checkpoint_every=400",
            "cluster.num_workers=1",
            f"cluster.storage={self.home / 'storage'}",
        ]
        env = servers.environment({"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.port}"})
        kept = keeper.start(ddpm_command("train", "digits", *settings), log=self.home / f"{time.monotonic_ns()}.log", env=env)
        try:
            yield kept
        finally:
            kept.end()

    def written(self) -> list[tuple[int, float]]:
        """Returns the loss curve in the training's own metrics log."""
        return [(line.step, line.metrics["train/loss"]) for line in read_metrics(self.folder)]

    def logged(self) -> list[tuple[int, float]]:
        """Returns the loss curve in MLflow, in the order in which it has it."""
        client = mlflow.MlflowClient(tracking_uri=f"http://127.0.0.1:{self.port}")
        points = client.get_metric_history(self.model.mlflow_run_id, "train/loss")
        assert [point.timestamp for point in points] == sorted(point.timestamp for point in points)
        return [(point.step, point.value) for point in points]

    def status(self) -> str:
        client = mlflow.MlflowClient(tracking_uri=f"http://127.0.0.1:{self.port}")
        (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        assert run.info.run_id == self.model.mlflow_run_id
        return run.info.status

    def delivered(self) -> int:
        """Returns the last step that the command knows MLflow to have."""
        return int((self.folder / CURSOR_FILE).read_text())


def text_of(kept: keeper.Kept) -> str:
    """Returns all that a command has said, as if on one line."""
    return " ".join(kept.log.read_text().split())


def wait_until(condition: Callable[[], bool], kept: keeper.Kept) -> None:
    """Waits while the command runs."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert kept.is_running(), kept.tail()
        assert time.monotonic() < deadline, kept.tail()
        time.sleep(0.1)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, servers.free_ports(1)[0])


def has_delivered(site: Site) -> bool:
    return any((site.home / "storage").glob(f"runs/digits/train/*/{CURSOR_FILE}"))


@pytest.mark.slow
def test_a_server_that_comes_back_while_training_goes_on_gets_each_step_once_and_nobody_is_warned(site: Site):
    steps = 1600
    with site.server() as server, site.train(steps) as command:
        wait_until(lambda: has_delivered(site), command)
        server.close()
        last, delivered = site.written()[-1][0], site.delivered()
        wait_until(lambda: site.written()[-1][0] >= last + 100, command)
        assert site.delivered() == delivered
        with site.server():
            wait_until(lambda: site.delivered() > last, command)
            assert command.code(SECONDS) == 0, command.tail()
            assert not [warning for warning in WARNINGS if warning in text_of(command)]
            assert [step for step, _ in site.written()] == list(range(EVERY, steps + 1, EVERY))
            assert site.logged() == site.written()
            assert site.status() == "FINISHED"


@pytest.mark.slow
def test_a_server_that_stays_away_gets_the_rest_from_the_same_command_again(site: Site):
    steps = 1000
    with site.server() as server, site.train(steps) as command:
        wait_until(lambda: has_delivered(site), command)
        server.close()
        delivered = site.delivered()
        assert command.code(SECONDS) == 0, command.tail()
        assert [warning for warning in WARNINGS if warning not in text_of(command)] == []
        assert (site.delivered(), site.written()[-1][0]) == (delivered, steps)
    with site.server():
        assert site.logged() == [(step, loss) for step, loss in site.written() if step <= delivered]
        assert site.status() == "RUNNING"
        with site.train(steps) as again:
            assert again.code(SECONDS) == 0, again.tail()
            assert "train skipped" in text_of(again)
            assert not [warning for warning in WARNINGS if warning in text_of(again)]
        assert site.logged() == site.written()
        assert site.status() == "FINISHED"
        assert [step for step, _ in site.written()] == list(range(EVERY, steps + 1, EVERY))
