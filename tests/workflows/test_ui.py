"""`ddpm ui` over a local store: what a run writes meanwhile is shown, and nothing is left behind however it ends."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
import requests
from servers import environment, free_ports
from support import ddpm_command

from components.storage import Location
from pipeline.tracking import Tracking, connect


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """A local store with one run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            patch.delenv(name)
        tracking = connect(Location.of(tmp_path_factory.mktemp("ui") / "storage"))
        tracking.open_run("digits", "first", None)
    return tracking


@contextmanager
def opened(store: Tracking, port: int, env: Mapping[str, str] | None = None) -> Iterator["subprocess.Popen[str]"]:
    """Runs the command; kills it and what it started if a test leaves them."""
    assert store.artifacts is not None
    command = ddpm_command("ui", "--port", str(port), "--storage", str(store.artifacts.parent.parent))
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": handle_signals}
    with subprocess.Popen(command, env=environment(env or {}), cwd=store.artifacts.parent, **options) as process:
        try:
            yield process
        finally:
            for left in family(process):
                left.kill()
            process.kill()


def handle_signals() -> None:
    """Undoes what a shell does to commands that it starts in the background, and nohup to all: they ignore Ctrl-C, or a closed terminal."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline()


def started(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """Waits until the command has said that it starts the server, and returns the processes of that."""
    assert line(process.stderr) == "starting MLflow, which takes some seconds\n"
    deadline = time.monotonic() + 60
    while not (found := family(process)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def url(store: Tracking) -> Iterator[str]:
    port = free_ports(1)[0]
    address = f"http://127.0.0.1:{port}"
    with opened(store, port) as process:
        assert line(process.stdout) == f"models  {address}/#/models?workflowType=machine_learning\n"
        assert line(process.stdout) == f"runs    {address}/#/experiments?workflowType=machine_learning\n"
        assert line(process.stdout) == "Ctrl-C ends it\n"
        yield address


def ask(url: str, method: str, path: str, **options: Any) -> Any:
    with requests.Session() as session:
        session.trust_env = False
        answer = session.request(method, f"{url}/api/2.0/mlflow/{path}", timeout=60, **options)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_pages_show_what_a_run_writes_meanwhile_and_neither_hinders_the_other(store: Tracking, url: str):
    run_id = store.open_run("digits", "second", None)
    for step in range(20):
        store.log_metrics(run_id, [(step, step, {"train/loss": 1 / (step + 1)})])
        ask(url, "POST", "runs/set-tag", json={"run_id": run_id, "key": f"seen.{step}", "value": "yes"})
        history = ask(url, "GET", "metrics/get-history", params={"run_id": run_id, "metric_key": "train/loss"})["metrics"]
        assert [metric["step"] for metric in history] == list(range(step + 1))
    assert {f"seen.{step}" for step in range(20)} <= set(store.client.get_run(run_id).data.tags)


def test_files_of_an_experiment_made_through_the_pages_server_open_from_the_local_store(store: Tracking, url: str, tmp_path: Path):
    import mlflow

    elsewhere = mlflow.MlflowClient(tracking_uri=url)
    run = elsewhere.create_run(elsewhere.create_experiment("by-address"))
    elsewhere.log_text(run.info.run_id, "kept", "note.txt")
    assert Path(store.client.download_artifacts(run.info.run_id, "note.txt", str(tmp_path))).read_text() == "kept"
    shown = requests.get(f"{url}/get-artifact", params={"run_id": run.info.run_id, "path": "note.txt"}, timeout=60, proxies={"http": ""})
    assert shown.text == "kept"


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,), (signal.SIGHUP,)], ids=["Ctrl-C twice", "SIGTERM", "terminal closed"])
def test_asked_to_end_while_it_starts_it_leaves_no_process(store: Tracking, numbers: tuple[signal.Signals, ...]):
    with opened(store, free_ports(1)[0]) as process:
        found = started(process)
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.2)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (0, "", "")
    assert not [left for left in found if left.is_running()]


def test_a_server_that_ends_by_itself_is_told_with_its_last_words(store: Tracking):
    with opened(store, free_ports(1)[0], env={"MLFLOW_STATIC_PREFIX": "without-a-slash"}) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "")
    assert re.search(r"^error: the MLflow server ended with code 2; it said: .*--static-prefix must begin with a '/'", stderr, re.MULTILINE)
