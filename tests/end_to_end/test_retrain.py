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

import psutil
import pytest
from browser import CHROMIUM, read_page
from servers import environment, free_ports, mlflow_server
from support import TINY, Finished, ddpm_command, write_digits

from components.storage import Location
from pipeline.lease import held

pytestmark = pytest.mark.timeout(1200)  # a week takes minutes, on a busy machine many

Command = Callable[..., Finished]
SECRET = "a secret of the week"


@dataclass
class Week:
    """What each day left.

    Attributes:
        arguments: what every day's command is given.
        days: the command of each day that ended by itself.
        messages: bodies that the webhook received, their signatures verified.
    """

    home: Path
    mlflow: str
    command: Command
    arguments: list[str] = field(default_factory=list)
    days: dict[str, Finished] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        return {"MLFLOW_TRACKING_URI": self.mlflow, "DDPM_WEBHOOK_SECRET": SECRET}

    @property
    def model(self) -> str:
        """Name of the registered model, which follows the source."""
        return f"ddpm-{self.home.name}-source"

    def retrain(self, day: str, *changes: str) -> None:
        self.days[day] = self.command("retrain", *self.arguments, *changes, "--json", cwd=self.home, env=self.env)

    def outcome(self, day: str) -> str:
        return self.days[day].json["outcome"]

    def check(self, expected: dict[str, tuple[int, str | None]]) -> None:
        """Checks exit code and outcome of some days; a day that failed has no outcome."""
        found = {day: (done.code, None if done.code == 2 else self.outcome(day)) for day, done in self.days.items() if day in expected}
        assert found == expected, {day: done.stderr[-2000:] for day, done in self.days.items()}


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


def kill_in_mid_training(week: Week) -> None:
    """Starts an attempt and kills all its processes once it has written a checkpoint."""
    command = ddpm_command("retrain", *week.arguments)
    with subprocess.Popen(command, cwd=week.home, env=environment(week.env), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 250
        while not list((week.home / "storage" / "runs" / "digits-0003").glob("train/*/step_*/manifest.json")):
            assert running.poll() is None, running.stderr.read() if running.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for process in [*psutil.Process(running.pid).children(recursive=True), psutil.Process(running.pid)]:
            process.kill()


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Iterator[Week]:
    home, port = tmp_path_factory.mktemp("week"), free_ports(1)[0]
    week, source = Week(home, f"http://127.0.0.1:{port}", command), home / "source"

    with webhook(week) as url, ExitStack() as later:
        week.arguments = ["digits", *TINY, "cluster.num_workers=1", "data.source=source", "retrain.alert_after=2", f"retrain.webhook={url}"]
        with mlflow_server(home / "mlflow", port=port):
            write_digits(source, 0, 600)
            week.retrain("monday")
            with held(Location.of(home / "storage" / "retrain" / "digits" / ".lock"), wait=False):
                week.retrain("monday, another at once")
            week.retrain("tuesday")
            for index in range(20):
                (source / "3" / f"broken{index}.png").write_text("no image")
            week.retrain("wednesday")
            for file in source.glob("3/broken*"):
                file.unlink()
        write_digits(source, 600, 900)
        week.retrain("thursday")
        later.enter_context(mlflow_server(home / "mlflow", port=port))
        kill_in_mid_training(week)
        week.retrain("friday")
        yield week


@pytest.fixture(scope="module")
def weekend(week: Week) -> Week:
    week.retrain("saturday", "train.steps=60")
    week.retrain("sunday", "train.steps=2", "retrain.start=scratch")
    return week


@pytest.fixture(scope="module")
def next_week(weekend: Week) -> Week:
    told = len(weekend.messages)
    write_digits(weekend.home / "source", 900, 950)
    weekend.retrain("over budget", "retrain.max_hours=1e-9")
    weekend.retrain("another network", "model.base_channels=16")
    weekend.retrain("left open", "--until", "preprocess")
    weekend.retrain("other settings", "train.lr=0.001", "--until", "preprocess")
    del weekend.messages[told:]
    return weekend


def attempt(week: Week, number: int) -> dict[str, Any]:
    return json.loads((week.home / "storage" / "retrain" / "digits" / "attempts" / f"{number:04d}" / "attempt.json").read_text())


def test_the_days_end_as_written_beforehand(week: Week):
    week.check(
        {
            "monday": (0, "promoted"),
            "monday, another at once": (11, "skipped"),
            "tuesday": (11, "skipped"),
            "wednesday": (12, "stopped"),
            "thursday": (2, None),
            "friday": (0, "promoted"),
        }
    )
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
    assert attempt(week, 3)["start"]["model"] == f"models:/{week.model}/1"
    assert attempt(week, 3)["new_images"] == 300


def test_candidate_and_champion_are_measured_on_the_same_new_reference(week: Week):
    third, champion_test = attempt(week, 3), attempt(week, 3)["champion_test"]
    assert third["metric"]["unit"]["reference_digest"] == third["dataset_digest"] != third["before_digest"]
    assert champion_test["champion_version"] == 1
    assert champion_test["test"]["candidate"] == pytest.approx(third["metric"]["value"])
    assert champion_test["test"]["champion"] != attempt(week, 1)["metric"]["value"]


def test_every_day_with_news_is_told_once_signed_and_the_second_failure_in_a_row_is_an_alert(week: Week):
    messages = week.messages[:5]
    texts = [message["text"] for message in messages]
    assert [message["summary"]["outcome"] for message in messages] == ["promoted", "skipped", "stopped", "failed", "promoted"]
    assert texts[0].startswith("digits #1: promoted v1: fd_dct8_v1_64 ")
    assert texts[3].startswith("ALERT, 2 failures in a row: digits: failed: RegistryError: MLFLOW_TRACKING_URI=http://127.0.0.1:")
    assert "300 new images" in texts[4]
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


@pytest.mark.slow
def test_a_better_recipe_is_promoted_and_a_worse_one_is_kept_out(weekend: Week):
    weekend.check({"saturday": (0, "promoted"), "sunday": (10, "kept")})
    assert [message["summary"]["outcome"] for message in weekend.messages[5:]] == ["promoted", "kept"]
    assert weekend.messages[6]["text"].startswith("digits #5: kept champion v3: ")


@pytest.mark.slow
def test_the_registry_tells_the_week(weekend: Week, command: Command):
    done = command("models", "log", weekend.model, "--json", cwd=weekend.home, env={"MLFLOW_TRACKING_URI": weekend.mlflow})
    assert done.code == 0, done.stderr
    assert [(move["kind"], move["version"], move["champion"]) for move in done.json] == [
        ("promoted", 1, 1),
        ("promoted", 2, 2),
        ("promoted", 3, 3),
        ("kept", 4, 3),
    ]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_a_browser_shows_the_week_on_the_models_page(weekend: Week, tmp_path: Path):
    shown = read_page(f"{weekend.mlflow}/#/models/{weekend.model}?workflowType=machine_learning", tmp_path, "@ champion")
    assert "Champion: version 3." in shown
    for move in ("v4 kept; champion v3", "v3 promoted; champion v3", "v2 promoted; champion v2", "v1 promoted; champion v1"):
        assert move in shown


@pytest.mark.slow
def test_a_plan_over_its_budget_is_refused_with_what_would_fit(next_week: Week):
    next_week.check({"over budget": (12, "stopped")})
    assert "retrain.max_hours=1e-09 is less than the plan of" in next_week.days["over budget"].json["reason"]


@pytest.mark.slow
def test_a_champion_of_another_network_cannot_be_started_from(next_week: Week):
    next_week.check({"another network": (2, None)})
    assert f"retrain.start cannot be the champion models:/{next_week.model}/3: model.base_channels 16 here, 8 there" in next_week.days["another network"].stderr


@pytest.mark.slow
def test_an_open_attempt_is_given_up_when_the_settings_change(next_week: Week):
    next_week.check({"left open": (0, "open"), "other settings": (0, "open")})
    first, second = (next_week.days[day].json["attempt"] for day in ("left open", "other settings"))
    assert second == first + 1
    assert (attempt(next_week, first)["outcome"], attempt(next_week, first)["reason"]) == ("abandoned", "the settings changed")
    assert attempt(next_week, second)["outcome"] is None
    assert attempt(next_week, second)["new_images"] == 50


def test_nothing_is_left_running(week: Week):
    left = [process for process in psutil.process_iter() if process.pid != os.getpid() and str(week.home) in " ".join(_words(process))]
    assert not [process for process in left if "mlflow" not in " ".join(_words(process))]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []
