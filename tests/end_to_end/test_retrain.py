"""A week of scheduled retraining in minutes: what arrives, what breaks, and what became of the champion, as written beforehand."""

import hashlib
import hmac
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from browser import CHROMIUM, read_page
from PIL import Image
from servers import environment, free_ports, mlflow_server
from sklearn.datasets import load_digits
from support import TINY, Finished, ddpm_command

from components.storage import Location
from pipeline.lease import held

pytestmark = pytest.mark.timeout(1200)  # a week takes minutes, on a busy machine many

Command = Callable[..., Finished]
SECRET = "a secret of the week"


@dataclass
class Week:
    """What each day left.

    Attributes:
        days: the command of each day that ended by itself.
        messages: bodies that the webhook received, their signatures verified.
    """

    home: Path
    mlflow: str
    days: dict[str, Finished] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def outcome(self, day: str) -> str:
        return self.days[day].json["outcome"]


def arrive(source: Path, first: int, last: int) -> None:
    """Writes some of the 1,797 digits as PNG files, a folder for each label."""
    pixels, labels = load_digits(return_X_y=True)
    for index in range(first, last):
        folder = source / str(labels[index])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels[index].reshape(8, 8) * 15.9).astype(np.uint8)).save(folder / f"{index:04d}.png")


@contextmanager
def webhook(week: Week) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            signed = f"{self.headers['X-Ddpm-Timestamp']}.".encode() + body
            assert self.headers["X-Ddpm-Signature"] == f"sha256={hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()}"
            week.messages.append(json.loads(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def kill_in_mid_training(arguments: list[str], home: Path, env: dict[str, str]) -> None:
    """Starts an attempt and kills all its processes once it has written a checkpoint."""
    with subprocess.Popen(ddpm_command(*arguments), cwd=home, env=environment(env), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 250
        while not list((home / "storage" / "runs" / "digits-0003").glob("train/*/step_*/manifest.json")):
            assert running.poll() is None, running.stderr.read() if running.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for process in [*psutil.Process(running.pid).children(recursive=True), psutil.Process(running.pid)]:
            process.kill()


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Iterator[Week]:
    home, port = tmp_path_factory.mktemp("week"), free_ports(1)[0]
    week, source = Week(home, f"http://127.0.0.1:{port}"), home / "source"
    env = {"MLFLOW_TRACKING_URI": week.mlflow, "DDPM_WEBHOOK_SECRET": SECRET}

    with webhook(week) as url, ExitStack() as later:

        def retrain(day: str, *changes: str) -> None:
            arguments = ["digits", *TINY, "data.source=source", "retrain.alert_after=2", f"retrain.webhook={url}", *changes]
            week.days[day] = command("retrain", *arguments, "--json", cwd=home, env=env)

        with mlflow_server(home / "mlflow", port=port):
            arrive(source, 0, 600)
            retrain("monday")
            with held(Location.of(home / "storage" / "retrain" / "digits" / ".lock"), wait=False):
                retrain("monday, another at once")
            retrain("tuesday")
            for index in range(20):
                (source / "3" / f"broken{index}.png").write_text("no image")
            retrain("wednesday")
            for file in source.glob("3/broken*"):
                file.unlink()
        arrive(source, 600, 900)
        retrain("thursday")
        later.enter_context(mlflow_server(home / "mlflow", port=port))
        changed = ["digits", *TINY, "data.source=source", "retrain.alert_after=2", f"retrain.webhook={url}"]
        kill_in_mid_training(["retrain", *changed], home, env)
        retrain("friday")
        retrain("saturday", "train.steps=60")
        retrain("sunday", "train.steps=2", "retrain.start=scratch")
        told = len(week.messages)
        arrive(source, 900, 950)
        retrain("next, over budget", "retrain.max_hours=1e-9")
        retrain("next, another network", "model.base_channels=16")
        retrain("next, left open", "--until", "preprocess")
        retrain("next, other settings", "train.lr=0.001", "--until", "preprocess")
        del week.messages[told:]
        yield week


def attempt(week: Week, number: int) -> dict[str, Any]:
    return json.loads((week.home / "storage" / "retrain" / "digits" / "attempts" / f"{number:04d}" / "attempt.json").read_text())


def test_the_days_end_as_written_beforehand(week: Week):
    codes = {day: done.code for day, done in week.days.items()}
    assert codes == {
        "monday": 0,
        "monday, another at once": 11,
        "tuesday": 11,
        "wednesday": 12,
        "thursday": 2,
        "friday": 0,
        "saturday": 0,
        "sunday": 10,
        "next, over budget": 12,
        "next, another network": 2,
        "next, left open": 0,
        "next, other settings": 0,
    }, {day: done.stderr[-2000:] for day, done in week.days.items()}
    outcomes = [week.outcome(day) for day, code in codes.items() if code != 2]
    assert outcomes == ["promoted", "skipped", "skipped", "stopped", "promoted", "promoted", "kept", "stopped", "open", "open"]
    assert "another attempt of digits is running in process" in week.days["monday, another at once"].json["reason"]
    assert "nothing new since attempt 1 (promoted)" in week.days["tuesday"].json["reason"]
    assert "20 of 20 new files (100%) are quarantined" in week.days["wednesday"].json["reason"]
    assert "does not answer" in week.days["thursday"].stderr
    assert "Traceback" not in week.days["thursday"].stderr


def test_a_day_without_news_trains_and_draws_nothing(week: Week):
    assert set(week.days["tuesday"].json["stages"]) == {"preprocess"}
    assert week.days["tuesday"].json["attempt"] is None


def test_the_killed_attempt_goes_on_from_its_checkpoint_with_its_number(week: Week):
    friday = week.days["friday"].json
    assert (friday["attempt"], friday["run_name"]) == (3, "digits-0003")
    assert re.search(r"start \d+: from step [1-9]", week.days["friday"].stderr)
    assert "starting from fresh" not in week.days["friday"].stderr
    assert attempt(week, 3)["start"]["model"] == "models:/ddpm-digits/1"
    assert attempt(week, 3)["new_images"] == 300


def test_candidate_and_champion_are_measured_on_the_same_new_reference(week: Week):
    third, contest = attempt(week, 3), attempt(week, 3)["contest"]
    assert third["metric"]["unit"]["reference_digest"] == third["dataset_digest"] != third["before_digest"]
    assert contest["champion_version"] == 1
    assert contest["test"]["candidate"] == pytest.approx(third["metric"]["value"])
    assert contest["test"]["champion"] != attempt(week, 1)["metric"]["value"]


def test_a_plan_over_its_budget_is_refused_with_what_would_fit(week: Week):
    assert "retrain.max_hours=1e-09 is less than the plan of" in week.days["next, over budget"].json["reason"]


def test_a_champion_of_another_network_cannot_be_started_from(week: Week):
    assert "retrain.start cannot be the champion models:/ddpm-digits/3: model.base_channels 16 here, 8 there" in week.days["next, another network"].stderr


def test_an_open_attempt_is_given_up_when_the_settings_change(week: Week):
    first, second = (week.days[day].json["attempt"] for day in ("next, left open", "next, other settings"))
    assert second == first + 1
    assert (attempt(week, first)["outcome"], attempt(week, first)["reason"]) == ("abandoned", "the settings changed")
    assert attempt(week, second)["outcome"] is None
    assert attempt(week, second)["new_images"] == 50


def test_the_registry_tells_the_week(week: Week, command: Command):
    done = command("models", "log", "ddpm-digits", "--json", cwd=week.home, env={"MLFLOW_TRACKING_URI": week.mlflow})
    assert done.code == 0, done.stderr
    assert [(move["kind"], move["version"], move["champion"]) for move in done.json] == [
        ("promoted", 1, 1),
        ("promoted", 2, 2),
        ("promoted", 3, 3),
        ("kept", 4, 3),
    ]


def test_every_day_with_news_is_told_once_signed_and_the_second_failure_in_a_row_is_an_alert(week: Week):
    texts = [message["text"] for message in week.messages]
    assert [message["summary"]["outcome"] for message in week.messages] == ["promoted", "skipped", "stopped", "failed", "promoted", "promoted", "kept"]
    assert texts[0].startswith("digits #1: promoted v1: fd_dct8_v1_64 ")
    assert texts[3].startswith("ALERT, 2 failures in a row: digits: failed: RegistryError: MLFLOW_TRACKING_URI=http://127.0.0.1:")
    assert "300 new images" in texts[4]
    assert texts[6].startswith("digits #5: kept champion v3: ")
    assert all(SECRET not in json.dumps(message) for message in week.messages)


def test_the_run_holds_the_summary(week: Week):
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=week.mlflow, registry_uri=week.mlflow)
    run_id = week.days["friday"].json["mlflow_run_id"]
    assert {file.path for file in client.list_artifacts(run_id, "retrain")} == {"retrain/summary.json", "retrain/summary.md"}
    text = Path(client.download_artifacts(run_id, "retrain/summary.md")).read_text()
    assert text.startswith("**digits #3: promoted v2: ")
    assert f"<{week.mlflow}/#/experiments/" in text
    assert client.get_run(run_id).data.params["retrain.webhook"] == "127.0.0.1 (the address is not shown)"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_a_browser_shows_the_week_on_the_models_page(week: Week, tmp_path: Path):
    shown = read_page(f"{week.mlflow}/#/models/ddpm-digits?workflowType=machine_learning", tmp_path, "@ champion")
    assert "Champion: version 3." in shown
    for move in ("v4 kept; champion v3", "v3 promoted; champion v3", "v2 promoted; champion v2", "v1 promoted; champion v1"):
        assert move in shown


def test_nothing_is_left_running(week: Week):
    left = [process for process in psutil.process_iter() if process.pid != os.getpid() and str(week.home) in " ".join(_words(process))]
    assert not [process for process in left if "mlflow" not in " ".join(_words(process))]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []
