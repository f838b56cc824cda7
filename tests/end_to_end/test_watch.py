"""Watching: status, logs for machines, and numbers that a real Prometheus scrapes and alerts on."""

import json
import os
import shutil
import signal
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keeper
import psutil
import pytest
import yaml
from servers import environment, free_ports
from support import TINY, Finished, ddpm_command

from cluster.metrics import GAUGES
from workflows.processes import TRAINING_WORKER

Command = Callable[..., Finished]
MONITORING = Path(__file__).resolve().parents[2] / "cluster" / "monitoring"
LONG = ["train.steps=100000", "train.checkpoint_every=20", "train.log_every=4"]


def wait_for(what: Callable[[], Any], kept: keeper.Kept, seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert kept.is_running(), kept.tail()
        assert time.monotonic() < deadline, what
        time.sleep(0.5)
    return found


def test_a_log_for_machines_is_one_object_a_line(tmp_path: Path, command: Command):
    done = command("run", "digits", *TINY, "train.steps=4", "--log-format", "json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "message"} <= set(line) for line in lines)
    assert [line["message"] for line in lines if line["message"].startswith("preprocess")] == ["preprocess for the first time"]
    wrong = command("--log-format=json", "run", "digits", "train.stepz=4", cwd=tmp_path)
    assert wrong.code == 2
    (line,) = [json.loads(line) for line in wrong.stderr.splitlines()]
    assert (line["level"], "train.stepz" in line["message"]) == ("error", True)
    unknown = command("run", "digits", "--log-format", "xml", cwd=tmp_path)
    assert (unknown.code, "--log-format xml is unknown; use text or json" in unknown.stderr) == (2, True)
    status = command("status", "--json", cwd=tmp_path).json["runs"]
    assert [(run["name"], run["busy"], run["stage"], run["step"]) for run in status] == [("digits", False, "done", 4)]
    assert command("status", "nothing", cwd=tmp_path).code == 2


def test_every_rule_and_panel_asks_for_numbers_that_there_are():
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0]["rules"]
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    asked = " ".join([*(rule["expr"] for rule in rules), *(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])])
    named = {word for word in asked.replace("{", " ").replace(")", " ").replace("(", " ").replace("[", " ").split() if word.startswith("ray_ddpm_")}
    assert named == {f"ray_{name}" for name in GAUGES}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[keeper.Kept, int]]:
    """A long training with one worker, whose numbers are served on a port."""
    (port,) = free_ports(1)
    settings = [*TINY, *LONG, f"cluster.metrics_port={port}", f"cluster.storage={tmp_path / 'storage'}"]
    kept = keeper.start(ddpm_command("run", "digits", *settings), log=tmp_path / "log", env=environment({}))
    try:
        yield kept, port
    finally:
        kept.end()


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's prometheus")
def test_prometheus_scrapes_a_training_and_an_alert_fires_on_a_killed_worker(running: tuple[keeper.Kept, int], tmp_path: Path, command: Command):
    kept, port = running
    (web,) = free_ports(1)
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rules))
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["alerts.yaml"],
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    options = [f"--config.file={tmp_path / 'prometheus.yaml'}", f"--storage.tsdb.path={tmp_path / 'tsdb'}", f"--web.listen-address=127.0.0.1:{web}"]
    prometheus = keeper.start(["prometheus", *options], log=tmp_path / "prometheus.log", env=dict(os.environ))
    try:

        def ask(expression: str) -> list[dict[str, Any]]:
            query = urllib.parse.urlencode({"query": expression})
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{web}/api/v1/query?{query}", timeout=10) as answer:
                    return json.load(answer)["data"]["result"]
            except OSError:
                return []

        step = wait_for(lambda: [one for one in ask("ray_ddpm_training_step") if float(one["value"][1]) > 0], kept)
        assert step[0]["metric"]["run"] == "digits"
        assert float(wait_for(lambda: ask("ray_ddpm_training_steps"), kept)[0]["value"][1]) == 100_000
        for name in ("training_loss", "images_per_second", "dataset_rows", "checkpoint_timestamp_seconds"):
            assert wait_for(lambda name=name: ask(f"ray_ddpm_{name} > 0"), kept), name
        assert ask('ALERTS{alertname="TrainingRestarted"}') == []
        status = command("status", "digits", "--json", cwd=tmp_path).json["runs"][0]
        assert (status["busy"], status["stage"], status["steps"]) == (True, "train", 100_000)
        assert status["steps_per_second"] > 0
        worker = next(process for process in psutil.process_iter(["cmdline"]) if is_worker(process, kept))
        worker.send_signal(signal.SIGKILL)
        alert = wait_for(lambda: ask('ALERTS{alertname="TrainingRestarted",alertstate="firing"}'), kept)
        assert alert[0]["metric"]["run"] == "digits"
        restarted = wait_for(lambda: command("status", "digits", "--json", cwd=tmp_path).json["runs"][0]["restart"], kept)
        assert "with 2 workers: worker " in restarted
    finally:
        prometheus.end()


def is_worker(process: psutil.Process, kept: keeper.Kept) -> bool:
    """Tells whether a process is a training worker of a command."""
    try:
        return TRAINING_WORKER in " ".join(process.cmdline()) and any(parent.pid == kept.pid for parent in process.parents())
    except psutil.Error:
        return False
