"""What reaches MLflow, from real training and through real servers that come and go: everything, once, and without training waiting for it."""

import json
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import servers
from PIL import Image
from support import TINY, Finished

from cluster.config import ClusterConfig
from cluster.machine import SystemMetrics
from components.data.reader import RowReader
from components.data.shards import read_manifest
from components.model.retention import checkpoint_name, newest_whole_checkpoint
from components.storage import Location
from pipeline.artifacts import Evaluation, TrainedModel
from pipeline.config import config_digest, load_config
from pipeline.context import Reporter, StageContext
from pipeline.errors import RegistryError
from pipeline.evaluate import PUBLISHED, publish
from pipeline.tracked_run import RUN_FILE
from pipeline.tracking import Tracking, connect
from pipeline.training import metrics_relay, system_watch
from pipeline.training.metrics_log import Attempt, MetricsLine, MetricsLogReader, MetricsLogWriter, system_folder
from pipeline.training.metrics_relay import CURSOR_FILE, Delivery, MetricsRelay, samples_folder
from pipeline.training.system_watch import SystemMetricsMonitor

PLANTED = "planted-Secret-41c7"


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    storage = Location.of(tmp_path / "storage")
    return StageContext(storage, storage / "train", "inputs", "run", ClusterConfig(storage=str(storage)), Reporter())


@pytest.fixture
def one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives every server of the test the same port."""
    ports = servers.free_ports(1)
    monkeypatch.setattr(servers, "free_ports", lambda count: ports)


def steps_of(tracking: Tracking, run_id: str, key: str = "train/loss") -> list[int]:
    return [point.step for point in tracking.client.get_metric_history(run_id, key)]


def pictures_of(tracking: Tracking, run_id: str) -> list[str]:
    return [file.path for file in tracking.client.list_artifacts(run_id, "images") if file.path.endswith(".png")]


def write_lines(writer: MetricsLogWriter, steps: range, key: str = "train/loss") -> None:
    for step in steps:
        writer.append(MetricsLine(step=step, timestamp_ms=time.time_ns() // 1_000_000, metrics={key: 1 / step}))
    writer.flush()


def write_picture(folder: Location, step: int) -> None:
    with (samples_folder(folder) / f"step_{step:09d}.png").staged() as staging:
        Image.new("RGB", (8, 4)).save(staging, format="PNG")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_has_every_step_once(context: StageContext, one_port: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_relay, "DELIVER_EVERY_S", 0.2)
    attempt = Attempt(context.folder)
    metrics, machine = MetricsLogWriter(attempt), MetricsLogWriter(attempt, system_folder(context.folder, 0))
    with ExitStack() as first, ExitStack() as second:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", first.enter_context(servers.mlflow_server(tmp_path / "mlflow")))
        tracking = connect(context.storage)
        run_id = tracking.open_run("ddpm-test", "outage", None)
        with MetricsRelay(context, tracking, run_id, 3000):
            write_picture(context.folder, 0)
            write_lines(metrics, range(1, 1001))
            write_lines(machine, range(1, 3), "system/cpu")
            wait_until((context.folder / CURSOR_FILE).is_file)
            first.close()
            write_lines(metrics, range(1001, 2001))
            write_lines(machine, range(3, 5), "system/cpu")
            write_picture(context.folder, 2000)
            with pytest.raises(RegistryError, match="failed"):
                tracking.log_metrics(run_id, [(1, 1, {"other": 1.0})])
            second.enter_context(servers.mlflow_server(tmp_path / "mlflow"))
            write_lines(metrics, range(2001, 3001))
        assert steps_of(tracking, run_id) == list(range(1, 3001))
        assert steps_of(tracking, run_id, "system/cpu") == [1, 2, 3, 4]
        assert len(pictures_of(tracking, run_id)) == 2
        for forgotten in (context.folder / CURSOR_FILE, samples_folder(context.folder) / "step_000002000.png.delivered"):
            assert forgotten.is_file()
            forgotten.remove()
        assert Delivery(context.folder, tracking, run_id).deliver()
        assert steps_of(tracking, run_id) == list(range(1, 3001))
        assert len(pictures_of(tracking, run_id)) == 2


def test_a_server_that_never_answers_does_not_keep_a_training_from_its_end(
    context: StageContext, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import mlflow

    monkeypatch.setattr(metrics_relay, "LAST_DELIVERY_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10000")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracking = Tracking(uri, mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri), None)
        with MetricsRelay(context, tracking, "0" * 32, 10):
            write_lines(MetricsLogWriter(Attempt(context.folder)), range(1, 11))
    assert "MLflow does not have all metrics yet; the rest is kept in" in capsys.readouterr().err


def test_a_checkpoint_that_a_worker_sets_aside_is_told_once_and_not_again_the_next_time(context: StageContext, capsys: pytest.CaptureFixture[str]):
    tracking = connect(context.storage)
    run_id = tracking.open_run("ddpm-test", "damaged", None)
    for step in (4, 8):
        with MetricsRelay(context, tracking, run_id, 10):
            (context.folder / checkpoint_name(step, 1) / "manifest.json").write_text("half a manif")
            assert newest_whole_checkpoint(context.folder) is None
        told = [line for line in capsys.readouterr().err.splitlines() if "damaged checkpoint" in line]
        assert len(told) == 1
        assert f"was renamed to damaged_{checkpoint_name(step, 1)}, the one before it is used: " in told[0]
        assert "manifest.json cannot be read" in told[0]


def test_a_slow_server_gets_as_much_as_there_is_time_for_and_the_rest_the_next_time(context: StageContext):
    tracking = connect(context.storage)
    run_id = tracking.open_run("ddpm-test", "slow", None)
    write_lines(MetricsLogWriter(Attempt(context.folder)), range(1, 2001))
    answers = iter([True, False])
    delivery = Delivery(context.folder, tracking, run_id)
    assert not delivery.deliver(lambda: next(answers))
    assert steps_of(tracking, run_id) == list(range(1, 901))
    assert Delivery(context.folder, tracking, run_id).deliver()
    assert steps_of(tracking, run_id) == list(range(1, 2001))


def test_a_watch_notes_what_a_machine_does_and_goes_on_where_an_earlier_attempt_ended(context: StageContext, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(system_watch, "WATCH_EVERY_S", 0.0)
    for steps in ((2, 4), (4, 6)):
        watch = SystemMetricsMonitor(Attempt(context.folder), 1, alone=False)
        for step in steps:
            with watch:
                watch.look(step)
    lines = MetricsLogReader(system_folder(context.folder, 1)).lines()
    assert [line.step for line in lines] == [2, 4, 6]
    assert {name.rpartition("/")[0] for line in lines for name in line.metrics} == {"system/1"}


def test_a_watch_that_fails_says_nothing_and_writes_nothing(context: StageContext, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(system_watch, "WATCH_EVERY_S", 0.0)
    watch = SystemMetricsMonitor(Attempt(context.folder), 0, alone=True)
    (context.folder.path / "system").write_text("in the way")
    with watch:
        watch.look(2)
    assert (context.folder.path / "system").read_text() == "in the way"


def test_gauges_tell_a_busy_cpu_from_any_thread():
    import threading

    collecting_progress, found = SystemMetrics(), {}
    ended = time.process_time() + 1.0
    while time.process_time() < ended:
        pass
    thread = threading.Thread(target=lambda: found.update(collecting_progress.read()))
    thread.start()
    thread.join()
    assert 0 < found["cpu_utilization_percentage"] <= 100
    assert 0 < found["system_memory_usage_percentage"] <= 100
    assert found["disk_available_megabytes"] > 0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def trained(home: Path, command: Callable[..., Finished]) -> dict[str, Any]:
    """Returns the receipts of a small training on Ray with two workers, and of its evaluation."""
    done = command("evaluate", "digits", *TINY, "cluster.num_workers=2", "--json", cwd=home, env={"DDPM_TEST_TOKEN": PLANTED})
    assert done.code == 0, done.stderr
    return done.json


@pytest.fixture(scope="module")
def client(home: Path, trained: dict[str, Any]) -> Any:
    import mlflow

    uri = f"sqlite:///{home / 'storage' / 'mlflow' / 'mlflow.db'}"
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture(scope="module")
def artifacts(client: Any, trained: dict[str, Any]) -> Path:
    return Path(client.get_run(trained["train"]["mlflow_run_id"]).info.artifact_uri.removeprefix("file://"))


def test_a_short_training_of_two_workers_has_system_metrics_of_its_one_node(client: Any, trained: dict[str, Any]):
    run_id = trained["train"]["mlflow_run_id"]
    names = {name for name in client.get_run(run_id).data.metrics if name.startswith("system/")}
    assert names >= {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_percentage",
        "system/disk_usage_percentage",
        "system/network_receive_megabytes",
    }
    assert all(name.count("/") == 1 for name in names)
    assert next(point.step for point in client.get_metric_history(run_id, "system/cpu_utilization_percentage")) == 2
    assert list(Location.of(trained["train"]["folder"]).path.glob("system/*/*.jsonl"))


def test_the_artifacts_alone_are_the_dataset(artifacts: Path, trained: dict[str, Any]):
    ours, copy = Location.of(trained["preprocess"]["path"]), Location.of(artifacts / "dataset")
    manifest = read_manifest(copy)
    assert manifest.digest == trained["preprocess"]["digest"]
    rows = np.arange(0, manifest.num_train, 97)
    assert np.array_equal(RowReader(copy, manifest).rows(rows), RowReader(ours, read_manifest(ours)).rows(rows))
    assert {manifest.rows_file, "quarantine.parquet", "quarantine.json", "contact.png"} <= {path.name for path in copy.path.iterdir()}


def test_the_artifacts_tell_the_settings_as_they_were_resolved(artifacts: Path, client: Any, trained: dict[str, Any]):
    config = load_config(artifacts / "config" / "config.yaml")
    assert config_digest(config) == trained["train"]["config_digest"]
    params = client.get_run(trained["train"]["mlflow_run_id"]).data.params
    assert (params["train.steps"], params["cluster.num_workers"], params["model.channel_mults"]) == ("12", "2", "[1, 2]")


def test_the_artifacts_tell_packages_and_machine_but_no_name_and_no_variable(artifacts: Path):
    import torch

    folder = artifacts / "environment"
    lines = (folder / "requirements.txt").read_text().splitlines()
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(names)
    assert f"torch=={torch.__version__.partition('+')[0]}" in [line.partition("+")[0] for line in lines]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["machine"]["cpus"] > 0
    assert set(environment["packages"]) >= {"torch", "ray", "mlflow"}
    written = (folder / "environment.json").read_text()
    assert socket.gethostname() not in written
    assert str(Path.home()) not in written
    assert not [path for path in artifacts.rglob("*") if path.is_file() and PLANTED.encode() in path.read_bytes()]


def test_a_run_that_was_left_open_is_ended_by_the_same_command_and_gets_nothing_twice(
    home: Path, command: Callable[..., Finished], client: Any, artifacts: Path, trained: dict[str, Any]
):
    run_id, address = trained["train"]["mlflow_run_id"], Location.of(trained["train"]["folder"]) / RUN_FILE
    before = {path: path.stat().st_mtime_ns for path in artifacts.rglob("*") if path.is_file()}
    points = {name: len(client.get_metric_history(run_id, name)) for name in client.get_run(run_id).data.metrics}
    assert client.get_run(run_id).info.status == "FINISHED"
    client.update_run(run_id, status="RUNNING")
    address.write_text(json.dumps(json.loads(address.read_text()) | {"ended": False}))
    done = command("evaluate", "digits", *TINY, "cluster.num_workers=2", "--json", cwd=home)
    assert done.code == 0, done.stderr
    assert [done.json[stage]["skipped"] for stage in ("train", "evaluate")] == [True, True]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert {name: len(client.get_metric_history(run_id, name)) for name in points} == points
    assert points["train/loss"] == 6
    assert {path: path.stat().st_mtime_ns for path in artifacts.rglob("*") if path.is_file()} == before


def test_numbers_that_are_published_again_after_a_failure_are_there_once(client: Any, home: Path, trained: dict[str, Any]):
    evaluation, model = Evaluation.model_validate(fields(trained["evaluate"])), TrainedModel.model_validate(fields(trained["train"]))
    run_id, uri = model.mlflow_run_id, f"sqlite:///{home / 'storage' / 'mlflow' / 'mlflow.db'}"
    marker = Path(evaluation.folder) / f"{PUBLISHED}{run_id}"
    assert marker.is_file()
    marker.unlink()
    publish(evaluation, model, Tracking(uri, client, home / "storage" / "mlflow" / "artifacts"), run_id)
    assert marker.is_file()
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith("eval/")]
    assert f"eval/{evaluation.metric.name}" in names
    assert all(len(client.get_metric_history(run_id, name)) == 1 for name in names)


def test_an_experiment_has_a_view_that_ranks_its_runs_by_the_deciding_number(client: Any, trained: dict[str, Any]):
    run = client.get_run(trained["train"]["mlflow_run_id"])
    evaluation = Evaluation.model_validate(fields(trained["evaluate"]))
    tags = client.get_experiment(run.info.experiment_id).tags
    shared = json.loads(tags[f"mlflow.sharedViewState.leaderboard-{evaluation.metric.name}"])
    state = json.loads(shared["state"])
    assert shared["name"] == f"Leaderboard: {evaluation.metric.name}"
    assert (state["orderByKey"], state["orderByAsc"]) == (f"metrics.`eval/{evaluation.metric.name}`", True)
    columns = {column.removeprefix("metrics.").strip("`") for column in state["selectedColumns"] if column.startswith("metrics.")}
    assert columns - {"eval/copy_rate"} <= set(run.data.metrics)
    found = client.search_runs([run.info.experiment_id], order_by=[f"{state['orderByKey']} ASC"])
    assert [other.info.run_id for other in found] == [run.info.run_id]


def fields(report: dict[str, Any]) -> dict[str, Any]:
    """Returns the receipt among what a command says of a stage."""
    return {name: value for name, value in report.items() if name not in ("skipped", "reason", "seconds")}
