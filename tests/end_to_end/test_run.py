"""One small run of the whole pipeline by the command, and what can be done with what it made."""

import contextlib
import json
import os
import re
import signal
import site
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import ROOT, TINY

from components.data.shards import read_manifest
from components.data.summary import dataset_sheet
from components.storage import Location
from pipeline.training.metrics_log import read_metrics

Command = Callable[..., Any]
STAGES = ["preprocess", "train", "evaluate", "register"]


def losses(run: dict[str, Any]) -> list[tuple[int, float]]:
    lines = [line.model_dump() for line in read_metrics(Location.of(run["train"]["folder"]))]
    return [(line["step"], line["metrics"]["train/loss"]) for line in lines]


def tracking_uri(home: Path) -> str:
    return f"sqlite:///{home / 'storage' / 'mlflow' / 'mlflow.db'}"


@pytest.fixture(scope="module")
def client(home: Path, first: dict[str, Any]) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=tracking_uri(home), registry_uri=tracking_uri(home))


def test_json_is_the_four_receipts(first: dict[str, Any]):
    assert list(first) == STAGES
    for stage in STAGES:
        assert first[stage]["skipped"] is False
        assert first[stage]["reason"] == "for the first time"
        assert first[stage]["seconds"] > 0
    assert first["preprocess"]["num_rows"] == 1797
    assert first["train"]["steps"] == 12
    assert first["train"]["num_workers"] == 2
    assert first["evaluate"]["metric"]["unit"]["reference_digest"] == first["preprocess"]["digest"]
    assert first["register"]["promoted"] is True


def test_everything_lies_under_the_storage_root(home: Path, first: dict[str, Any]):
    assert [path.name for path in home.iterdir()] == ["storage"]


def test_the_same_command_again_skips_every_stage_with_its_reason(home: Path, command: Command, first: dict[str, Any]):
    done = command("run", "digits", *TINY, "--json", cwd=home)
    assert done.code == 0, done.stderr
    for stage in STAGES:
        again = done.json[stage]
        assert again.pop("skipped") is True
        assert "the same inputs" in again.pop("reason")
        expected = {key: value for key, value in first[stage].items() if key not in ("skipped", "reason", "seconds")}
        assert {key: value for key, value in again.items() if key != "seconds"} == expected


@pytest.mark.slow
def test_another_number_of_samples_runs_only_evaluate_and_register_and_is_not_compared(home: Path, command: Command, first: dict[str, Any]):
    done = command("run", "digits", *TINY, "evaluate.num_samples=80", "--json", cwd=home)
    assert done.code == 0, done.stderr
    assert [done.json[stage]["skipped"] for stage in STAGES] == [True, True, False, False]
    assert done.json["register"]["promoted"] is False
    assert "num_samples 80 against 64" in done.json["register"]["decision"]
    assert done.json["register"]["mlflow_run_id"] == first["register"]["mlflow_run_id"]


@pytest.mark.slow
def test_workers_change_no_digest_and_no_sample(home: Path, command: Command, first: dict[str, Any]):
    done = command("evaluate", "digits", *TINY, "cluster.num_workers=1", "--json", cwd=home)
    assert [done.json[stage]["skipped"] for stage in STAGES[:3]] == [True, True, True]
    alone = command("run", "digits", *TINY, "cluster.num_workers=1", "--name", "alone", "--json", cwd=home)
    assert alone.code == 0, alone.stderr
    for stage, field in (("preprocess", "digest"), ("train", "config_digest"), ("train", "inputs"), ("train", "dataset_digest")):
        assert alone.json[stage][field] == first[stage][field]
    two, one = ([loss for _, loss in losses(run)] for run in (first, alone.json))
    np.testing.assert_allclose(one, two, rtol=1e-4)


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")} | {"PYTHONPATH": str(ROOT)}


def wait_for_checkpoint(run: Path, running: "subprocess.Popen[Any]") -> None:
    deadline = time.monotonic() + 200
    while not list(run.glob("train/*/step_*/manifest.json")):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.02)


def test_killed_with_all_its_processes_and_run_again_it_ends_with_the_same_weights(home: Path, command: Command, first: dict[str, Any]):
    arguments = [sys.executable, "-m", "workflows", "run", "digits", *TINY, "--name", "killed", "--json"]
    running = subprocess.Popen(arguments, cwd=home, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_checkpoint(home / "storage" / "runs" / "killed", running)
    family = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGKILL)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    running.wait()
    again = command("run", "digits", *TINY, "--name", "killed", "--json", cwd=home)
    assert again.code == 0, again.stderr
    assert re.search("start 2: from step [48] with 2 workers", again.stderr)
    assert again.json["train"]["weights_sha256"] == first["train"]["weights_sha256"]
    assert losses(again.json) == losses(first)


def test_the_run_page_has_each_step_once_the_settings_and_the_pictures(client: Any, first: dict[str, Any]):
    run_id = first["register"]["mlflow_run_id"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run_id, "train/loss")] == [2, 4, 6, 8, 10, 12]
    assert {"train/gradient_norm", "train/learning_rate", "perf/images_per_second", "perf/data_wait_fraction"} <= set(run.data.metrics)
    assert run.data.params["train.steps"] == "12"
    assert run.data.params["data.source"] == "digits"
    assert run.inputs.dataset_inputs[0].dataset.digest == first["preprocess"]["digest"]
    assert {file.path for file in client.list_artifacts(run_id, "evaluate")} >= {"evaluate/grid.png", "evaluate/denoising.gif", "evaluate/loss.png"}
    assert any("samples+step+0+" in file.path for file in client.list_artifacts(run_id, "images"))


def test_the_run_page_tells_and_shows_its_dataset(client: Any, first: dict[str, Any]):
    import mlflow

    run_id, shards = first["register"]["mlflow_run_id"], first["preprocess"]
    (entry,) = client.get_run(run_id).inputs.dataset_inputs
    assert mlflow.data.get_source(entry.dataset).load() == shards["path"]
    profile = json.loads(entry.dataset.profile)
    assert (profile["rows"], profile["labels"], profile["image"], profile["source"]) == (1797, 10, "1x8x8 uint8", "digits")
    assert [column["name"] for column in json.loads(entry.dataset.schema)["mlflow_colspec"]] == ["pixels", "label", "source"]
    folder = Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://")) / "dataset"
    assert json.loads((folder / "quarantine.json").read_text()) == {}
    dataset = Location.of(shards["path"])
    with Image.open(folder / "contact.png") as sheet:
        assert np.array_equal(np.asarray(sheet), np.asarray(dataset_sheet(dataset, read_manifest(dataset))))


def test_the_version_carries_its_number_its_origin_and_a_picture(client: Any, first: dict[str, Any]):
    version = client.get_model_version_by_alias("ddpm-digits", "champion")
    assert int(version.version) == first["register"]["version"]
    assert float(version.tags["metric.value"]) == first["evaluate"]["metric"]["value"]
    assert json.loads(version.tags["metric.unit"]) == first["evaluate"]["metric"]["unit"]
    assert version.tags["dataset.digest"] == first["preprocess"]["digest"]
    assert version.tags["config.digest"] == first["train"]["config_digest"]
    assert version.tags["ddpm.decision"] == first["register"]["decision"]
    assert f"![samples, seeds from 0](get-artifact?run_id={first['register']['mlflow_run_id']}&path=evaluate%2Fgrid.png)" in version.description


LOAD_ELSEWHERE = """
import importlib.util, io, json, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("components") is None and importlib.util.find_spec("pipeline") is None
import mlflow, numpy as np
from PIL import Image
mlflow.set_tracking_uri(sys.argv[2])
model = mlflow.pyfunc.load_model("models:/ddpm-digits@champion")
arrays = model.predict({"num_images": 5, "steps": 4, "seed": 3, "format": "array"})
pngs = model.predict({"num_images": 2, "steps": 4, "seed": 6})
defaults = model.predict({"num_images": 1})
same = np.array_equal(np.asarray(Image.open(io.BytesIO(pngs[0]))), arrays[3, :, :, 0])
print(json.dumps({"shape": arrays.shape, "dtype": str(arrays.dtype), "same": same, "defaults": len(defaults), "safetensors": "safetensors" in sys.modules}))
"""


def test_the_model_loads_and_draws_without_the_project(home: Path, first: dict[str, Any], tmp_path: Path):
    packages = site.getsitepackages()[0]
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", LOAD_ELSEWHERE, packages, tracking_uri(home)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {"shape": [5, 8, 8, 1], "dtype": "uint8", "same": True, "defaults": 1, "safetensors": False}


def test_a_registered_model_holds_no_pickle(client: Any, first: dict[str, Any], tmp_path: Path, home: Path):
    import mlflow

    mlflow.set_tracking_uri(tracking_uri(home))
    mlflow.set_registry_uri(tracking_uri(home))
    folder = Path(mlflow.artifacts.download_artifacts("models:/ddpm-digits@champion", dst_path=str(tmp_path)))
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".bin"}
    requirements = (folder / "requirements.txt").read_text().split()
    assert all("==" in line for line in requirements)


def test_sample_draws_the_same_picture_from_the_registry_and_the_checkpoint(home: Path, command: Command, first: dict[str, Any]):
    by_alias = command("sample", "models:/ddpm-digits@champion", "--num", "6", "--steps", "4", "--out", "a.png", cwd=home)
    by_folder = command("sample", first["train"]["path"], "--num", "6", "--steps", "4", "--out", "b.png", cwd=home)
    assert (by_alias.code, by_folder.code) == (0, 0), by_alias.stderr + by_folder.stderr
    assert by_alias.stdout == "a.png\n"
    assert np.array_equal(np.asarray(Image.open(home / "a.png")), np.asarray(Image.open(home / "b.png")))


def test_models_lists_versions_numbers_and_aliases(home: Path, command: Command, first: dict[str, Any]):
    done = command("models", "ddpm-digits", "--json", cwd=home)
    assert done.code == 0, done.stderr
    versions = {version["version"]: version for version in done.json[0]["versions"]}
    assert versions[1]["aliases"] == ["champion"]
    assert versions[1]["value"] == first["evaluate"]["metric"]["value"]
    missing = command("models", "nobody", cwd=home)
    assert (missing.code, missing.stdout) == (2, "")
    assert "model nobody is not in the registry; it has ddpm-digits" in missing.stderr


def test_a_stage_asked_for_by_from_runs_again_and_registers_nothing_twice(home: Path, command: Command, first: dict[str, Any]):
    done = command("run", "digits", *TINY, "--from", "evaluate", "--json", cwd=home)
    assert done.code == 0, done.stderr
    assert [done.json[stage]["skipped"] for stage in STAGES] == [True, True, False, False]
    assert done.json["evaluate"]["samples_sha256"] == first["evaluate"]["samples_sha256"]
    assert done.json["evaluate"]["metric"] == first["evaluate"]["metric"]
    assert done.json["register"]["version"] == first["register"]["version"]


def test_two_processes_never_work_on_one_run(home: Path, command: Command, first: dict[str, Any]):
    from pipeline.errors import ConfigError
    from pipeline.preflight import one_process

    folder = Location.of(home / "storage" / "runs" / "digits")
    with one_process(folder, "digits"):
        done = command("run", "digits", *TINY, cwd=home)
        with pytest.raises(ConfigError, match="is in progress in process"), one_process(folder, "digits"):
            pass
    assert done.code == 2
    assert f"run digits is in progress in process {os.getpid()}" in done.stderr


def test_file_names_that_are_no_text_are_read_and_named(home: Path, command: Command, make_images: Callable[..., Path]):
    photos = make_images(home / "odd", 4)
    (photos / "cat" / "0000.png").rename(os.fsdecode(os.fsencode(photos) + b"/cat/\xff\xfe.png"))
    Path(os.fsdecode(os.fsencode(photos) + b"/dog/\xfd.jpg")).write_bytes(b"")
    done = command("preprocess", "cifar10-small", f"data.source={photos}", "data.max_bad_fraction=0.5", "--json", cwd=home)
    assert done.code == 0, done.stderr
    folder = Path(done.json["preprocess"]["path"])
    assert "cat/\\xff\\xfe.png" in pq.read_table(next((folder.parent / "shards").iterdir())).column("source").to_pylist()
    assert pq.read_table(folder / "quarantine.parquet").column("path").to_pylist() == ["dog/\\xfd.jpg"]


def test_a_model_that_is_not_registered_is_told(home: Path, command: Command, first: dict[str, Any]):
    done = command("sample", "models:/nobody@champion", cwd=home)
    assert done.code == 2
    assert "error: models:/nobody@champion is not in the registry" in done.stderr


@pytest.mark.slow
def test_a_training_that_diverges_stops_with_advice(home: Path, command: Command):
    done = command("train", "digits", *TINY, "train.lr=1e30", "train.max_nonfinite_steps=1", "--name", "diverged", cwd=home)
    assert done.code == 2
    assert "train.max_nonfinite_steps=1 is exceeded" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_training_worker_that_is_killed_starts_again_within_the_same_command(home: Path, first: dict[str, Any]):
    arguments = [sys.executable, "-m", "workflows", "train", "digits", *TINY, "--name", "worker-killed", "--json"]
    with subprocess.Popen(arguments, cwd=home, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        wait_for_checkpoint(home / "storage" / "runs" / "worker-killed", running)
        workers = [child for child in psutil.Process(running.pid).children(recursive=True) if "RayTrainWorker" in " ".join(child.cmdline())]
        assert len(workers) == 2
        workers[-1].kill()
        stdout, stderr = running.communicate(timeout=200)
    assert running.returncode == 0, stderr
    assert json.loads(stdout)["train"]["weights_sha256"] == first["train"]["weights_sha256"]
    assert losses(json.loads(stdout)) == losses(first)


def test_ui_serves_the_models_page_on_loopback_and_ends_with_all_its_processes(home: Path, first: dict[str, Any]):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-m", "workflows", "ui", "--port", str(port)], cwd=home, env=environment(), stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == f"models  http://127.0.0.1:{port}/#/models?workflowType=machine_learning\n"
        family = psutil.Process(running.pid).children(recursive=True)
        picture = f"http://127.0.0.1:{port}/get-artifact?run_id={first['register']['mlflow_run_id']}&path=evaluate%2Fgrid.png"
        with urllib.request.urlopen(picture, timeout=60) as answer:
            assert answer.read() == Path(first["evaluate"]["grid"]).read_bytes()
        listening = {connection.laddr.ip for process in family for connection in process.net_connections() if connection.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        running.terminate()
        assert running.wait(timeout=60) == 0
    assert not [process for process in family if process.is_running()]


def test_another_store_gets_the_finished_run_whole_and_without_training(home: Path, command: Command, first: dict[str, Any]):
    import mlflow

    uri = f"sqlite:///{home / 'storage' / 'other.db'}"
    done = command("run", "digits", *TINY, "--json", cwd=home, env={"MLFLOW_TRACKING_URI": uri})
    assert done.code == 0, done.stderr
    assert [done.json[stage]["skipped"] for stage in STAGES] == [True, True, True, False]
    client, run_id = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri), done.json["register"]["mlflow_run_id"]
    assert run_id != first["register"]["mlflow_run_id"]
    assert [metric.step for metric in client.get_metric_history(run_id, "train/loss")] == [2, 4, 6, 8, 10, 12]
    assert "evaluate/grid.png" in {file.path for file in client.list_artifacts(run_id, "evaluate")}
    assert client.get_model_version_by_alias("ddpm-digits", "champion").run_id == run_id


@pytest.mark.slow
def test_interrupted_by_a_person_it_says_how_to_go_on(home: Path, first: dict[str, Any]):
    arguments = [sys.executable, "-m", "workflows", "train", "digits", *TINY, "train.steps=100000", "--name", "interrupted", "--json"]
    with subprocess.Popen(arguments, cwd=home, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        wait_for_checkpoint(home / "storage" / "runs" / "interrupted", running)
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=120)
    assert (running.returncode, stdout) == (130, "")
    assert stderr.endswith("interrupted; run the same command again to resume from the last checkpoint\n")
