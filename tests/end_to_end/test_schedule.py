"""`ddpm schedule` for real: Prefect's server and runner as it starts them, with a script in the place of the attempt where only times matter."""

import itertools
import json
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keeper
import psutil
import pytest
import requests
from servers import Conditions, S3Server, environment, free_ports, mlflow_server
from support import ROOT, TINY, ddpm_command

from components.ingest.sources import DataConfig
from components.storage import Location
from workflows.preset_files import PRESETS
from workflows.schedule.attempt import STAGES
from workflows.schedule.plan import Plan, When
from workflows.schedule.processes import MARK

pytest.importorskip("prefect")

SCRIPT = ROOT / "tests" / "retrain_script.py"
BEGIN_S = 180


@dataclass
class Scheduler:
    """`ddpm schedule` of a folder, begun and killed as a test asks.

    Attributes:
        home: where the script keeps its journal.
    """

    home: Path
    port: int
    folder: Path
    starts: list[keeper.Kept] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def password(self) -> str:
        return (self.folder / "password").read_text().strip()

    def start(self, when: When) -> keeper.Kept:
        """Starts with the script in the place of `ddpm retrain`."""
        plan = Plan(
            file=str(PRESETS / "digits.yaml"),
            data=DataConfig(source=str(self.home / "images"), image_size=8).model_dump_json(),
            name="nightly",
            when=when,
            cwd=str(self.home),
            storage=str(self.home),
            port=self.port,
            command=(sys.executable, str(SCRIPT), str(self.home)),
        )
        launch = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "workflows.schedule.supervisor", plan.model_dump_json(), str(self.folder)]
        return self.keep(launch)

    def keep(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> keeper.Kept:
        kept = keeper.start(["env", "-C", str(self.home), *command], log=self.home / f"schedule-{len(self.starts)}.log", env=environment(env or {}))
        self.starts.append(kept)
        return kept

    def begin(self, when: When) -> keeper.Kept:
        """Starts, and returns once attempts are being made."""
        return self.ready(self.start(when))

    def ready(self, kept: keeper.Kept) -> keeper.Kept:
        wait_for(lambda: "ready " in kept.log.read_text() or not kept.is_running(), BEGIN_S)
        assert kept.is_running(), kept.tail()
        return kept

    @property
    def pid(self) -> int:
        return int(re.fullmatch(r"process (\d+) on .*", (self.folder / "lock").read_text())[1])  # pyrefly: ignore[unsupported-operation]

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """Asks the server as its page does: with the password, and the token without which it changes nothing."""
        user, _, password = self.password.partition(":")
        session = requests.Session()
        session.trust_env, session.auth = False, (user, password)
        client = uuid.uuid4().hex
        token = session.get(f"{self.url}/api/csrf-token", params={"client": client}, timeout=60).json()["token"]
        headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": client}
        for _ in range(5):
            answer = session.request(method, f"{self.url}/api/{path}", json=body, headers=headers, timeout=60)
            if answer.status_code != 503:  # its database was busy; its own clients ask again, too
                break
            time.sleep(1)
        answer.raise_for_status()
        return answer.json()

    def runs(self) -> list[dict[str, Any]]:
        """Returns the runs whose time has come, in the order of their times."""
        found = self.ask("POST", "flow_runs/filter", {"sort": "EXPECTED_START_TIME_ASC", "limit": 200})
        return [run for run in found if run["state_type"] != "SCHEDULED"]

    def run(self, run_id: str) -> dict[str, Any]:
        return self.ask("GET", f"flow_runs/{run_id}")

    def tasks(self, run_id: str) -> list[tuple[str, str]]:
        """Returns what the page shows of a run's stages, in the order of their beginnings."""
        found = self.ask("POST", "task_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
        return [(task["name"], task["state"]["name"]) for task in sorted(found, key=lambda task: task["start_time"])]

    def run_now(self) -> str:
        deployment = self.ask("GET", f"deployments/name/retrain/{self.folder.name}")["id"]
        return self.ask("POST", f"deployments/{deployment}/create_flow_run", {})["id"]

    def finished(self, run_id: str, timeout: float = 60) -> dict[str, Any]:
        wait_for(lambda: self.run(run_id)["state_type"] in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED"), timeout)
        return self.run(run_id)

    def behave(self, **behaviour: object) -> None:
        (self.home / "behaviour.json").write_text(json.dumps(behaviour))

    def journal(self) -> list[dict[str, Any]]:
        file = self.home / "journal.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def count(self, what: str, stage: str | None = None) -> int:
        return sum(entry["what"] == what and stage in (None, entry["stage"]) for entry in self.journal())

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


def wait_for(holds: Callable[[], object], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.2)


@contextmanager
def kept_together(made: Scheduler) -> Iterator[Scheduler]:
    try:
        yield made
    finally:
        for kept in made.starts:
            kept.end()


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scheduler]:
    home = tmp_path_factory.mktemp("schedule")
    with kept_together(Scheduler(home, free_ports(1)[0], home / "nightly")) as made:
        yield made


@pytest.fixture(scope="module")
def every_few_seconds(scheduler: Scheduler) -> Scheduler:
    scheduler.behave(seconds={"train": 0.5})
    scheduler.begin(When(interval_s=6))
    wait_for(lambda: scheduler.count("attempt") >= 2, 90)
    return scheduler


def check_that_none_overlap(journal: list[dict[str, Any]]) -> None:
    """Checks that a stage begins only when the one before it has ended, and that no attempt does a stage twice to its end."""
    for one, other in itertools.pairwise(entry for entry in journal if entry["what"] != "attempt"):
        assert one["what"] != "begin" or other["what"] in ("end", "interrupted"), (one, other)
    ends: list[str] = []
    for entry in journal:
        if entry["what"] == "end":
            assert entry["stage"] not in ends
            ends.append(entry["stage"])
        elif entry["what"] == "attempt":
            assert ends == list(STAGES)
            ends = []


def test_the_schedule_itself_makes_runs_of_four_named_stages(every_few_seconds: Scheduler):
    wait_for(lambda: len([run for run in every_few_seconds.runs() if run["state_type"] == "COMPLETED"]) >= 2, 60)
    done = [run for run in every_few_seconds.runs() if run["state_type"] == "COMPLETED"]
    assert all(run["auto_scheduled"] and run["state"]["name"] == "Kept" for run in done)
    assert every_few_seconds.tasks(done[0]["id"]) == [(stage, "Completed") for stage in STAGES]
    told = every_few_seconds.starts[0].log.read_text()
    assert f"{done[0]['name']} kept: kept by a script" in told


def test_the_page_needs_the_password_and_foreign_pages_are_not_let_in(every_few_seconds: Scheduler):
    session = requests.Session()
    session.trust_env = False
    deployment, deployments = (f"{every_few_seconds.url}/api/deployments/{path}" for path in ("name/retrain/nightly", "filter"))
    user, _, password = every_few_seconds.password.partition(":")
    answers = {auth: session.get(deployment, auth=auth, timeout=60).status_code for auth in (None, ("ddpm", "guessed"), (user, password))}
    assert list(answers.values()) == [401, 401, 200]
    assert session.post(deployments, json={}, auth=(user, password), timeout=60).status_code == 403, "without the token of a page"
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = {
        origin: session.options(deployments, headers=ask | {"Origin": origin}, timeout=60).headers.get("Access-Control-Allow-Origin")
        for origin in ("https://evil.example", every_few_seconds.url)
    }
    assert allowed == {"https://evil.example": None, every_few_seconds.url: every_few_seconds.url}


def test_nothing_listens_beyond_loopback_and_the_password_is_nobody_elses(every_few_seconds: Scheduler):
    family = every_few_seconds.processes()
    listening = {entry.laddr for process in family for entry in process.net_connections("inet") if entry.status == psutil.CONN_LISTEN}
    assert every_few_seconds.port in {address.port for address in listening}
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert (every_few_seconds.folder / "password").stat().st_mode & 0o777 == 0o600
    assert not [process for process in family if every_few_seconds.password in " ".join(process.cmdline())]


def test_a_second_start_says_who_runs_it_and_leaves(every_few_seconds: Scheduler):
    second = every_few_seconds.start(When(interval_s=6))
    assert second.code(timeout=60) == 2
    assert f"--name nightly is scheduled already by process {every_few_seconds.pid} on " in second.tail()


def test_killed_in_the_middle_and_started_again_it_loses_and_doubles_nothing(every_few_seconds: Scheduler):
    scheduler = every_few_seconds
    scheduler.behave(seconds={"train": 600})
    before = scheduler.count("begin", "train")
    wait_for(lambda: scheduler.count("begin", "train") > before, 60)
    running = next(run["id"] for run in scheduler.runs() if run["state_type"] == "RUNNING")
    os.kill(scheduler.pid, signal.SIGKILL)
    time.sleep(13)  # two times and more are missed
    old = {process.pid for process in scheduler.processes()}
    assert old, "the kill left processes behind, which the next start has to find"

    scheduler.behave(seconds={"train": 0.5})
    scheduler.begin(When(interval_s=6))
    assert not old & {process.pid for process in scheduler.processes()}
    run = scheduler.finished(running)
    assert (run["state_type"], run["state"]["name"], run["run_count"]) == ("COMPLETED", "Kept", 2)
    again = [("preprocess", "Cached"), *((stage, "Completed") for stage in STAGES[1:])]
    assert scheduler.tasks(running) == [("preprocess", "Completed"), ("train", "Crashed"), *again]
    wait_for(lambda: scheduler.count("attempt") >= 4, 60)
    check_that_none_overlap(scheduler.journal())
    begun = [run for run in scheduler.runs() if run["run_count"]]
    assert len(begun) - scheduler.count("attempt") in (0, 1), "each run that began is one attempt, but for the one under way"
    assert [run["state"]["name"] for run in scheduler.runs() if run["state"]["name"] == "Missed"]


def test_asked_to_end_it_leaves_no_process_and_the_interrupted_run_for_later(every_few_seconds: Scheduler):
    kept = every_few_seconds.starts[-1]
    os.kill(every_few_seconds.pid, signal.SIGTERM)
    assert kept.code(timeout=90) == 0, kept.tail()
    assert every_few_seconds.processes() == []


@pytest.fixture(scope="module")
def on_change(scheduler: Scheduler, tmp_path_factory: pytest.TempPathFactory) -> Scheduler:
    """Starts again, now following changes; the first look finds a source it has not seen."""
    from PIL import Image

    images = scheduler.home / "images"
    images.mkdir()
    Image.new("L", (8, 8)).save(images / "first.png")
    scheduler.behave()
    for leftover in scheduler.home.glob("*.done"):
        leftover.unlink()
    before = scheduler.count("attempt")
    scheduler.begin(When(poll_s=1))
    wait_for(lambda: (scheduler.folder / "seen.json").is_file() and scheduler.count("attempt") > before, 90)
    wait_for(lambda: all(run["state_type"] not in ("RUNNING", "PENDING") for run in scheduler.runs()), 60)
    return scheduler


@pytest.mark.slow
def test_an_attempt_follows_a_change_and_nothing_else(on_change: Scheduler):
    deployment = on_change.ask("GET", "deployments/name/retrain/nightly")
    assert deployment["schedules"] == [], "the times of the earlier start are gone"
    before = on_change.count("attempt")
    time.sleep(4)
    assert on_change.count("attempt") == before
    (on_change.home / "images" / "second.png").write_bytes((on_change.home / "images" / "first.png").read_bytes())
    wait_for(lambda: on_change.count("attempt") == before + 1, 60)
    assert json.loads((on_change.folder / "seen.json").read_text())["number"] == 2


@pytest.mark.slow
def test_a_failed_stage_is_tried_again_and_finished_ones_are_found(on_change: Scheduler):
    on_change.behave(codes={"train": [1]}, outcome="promoted")
    before = on_change.count("begin", "preprocess"), on_change.count("begin", "train")
    run = on_change.finished(on_change.run_now())
    assert (run["state_type"], run["state"]["name"], run["state"]["message"]) == ("COMPLETED", "Promoted", "promoted by a script")
    assert (on_change.count("begin", "preprocess"), on_change.count("begin", "train")) == (before[0] + 1, before[1] + 2)


@pytest.mark.slow
def test_a_finished_run_shows_its_summary_and_links_into_mlflow(on_change: Scheduler):
    on_change.behave()
    run_id = on_change.finished(on_change.run_now())["id"]
    found = on_change.ask("POST", "artifacts/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
    artifacts = {artifact["key"]: artifact["data"] for artifact in found}
    assert set(artifacts) == {"script-summary", "script-run", "script-version"}
    assert "kept by a script" in artifacts["script-summary"]
    assert "http://127.0.0.1:5000/#/models/script/versions/3" in artifacts["script-version"]


@pytest.mark.parametrize(
    ("code", "kind", "name", "message"),
    [
        (11, "COMPLETED", "Skipped", "skipped by a script"),
        (12, "FAILED", "Stopped", "stopped by a script"),
        (2, "FAILED", "Failed", "exit code 2: preprocess fails with 2"),
    ],
)
@pytest.mark.slow
def test_a_stage_that_ends_the_attempt_ends_the_run_at_once_and_names_its_state(on_change: Scheduler, code: int, kind: str, name: str, message: str):
    on_change.behave(codes={"preprocess": [code]})
    run = on_change.finished(on_change.run_now())
    assert (run["state_type"], run["state"]["name"], run["state"]["message"]) == (kind, name, message)
    assert [stage for stage, _ in on_change.tasks(run["id"])] == ["preprocess"]


@pytest.mark.slow
def test_a_run_asked_for_while_another_goes_on_is_cancelled_and_cancelling_ends_every_process(on_change: Scheduler):
    on_change.behave(seconds={"preprocess": 600})
    before = on_change.count("begin")
    running = on_change.run_now()
    wait_for(lambda: on_change.count("begin") > before, 60)
    assert on_change.finished(on_change.run_now())["state"]["message"] == "Deployment concurrency limit reached."
    script = on_change.journal()[-1]["pid"]
    on_change.ask("POST", f"flow_runs/{running}/set_state", {"state": {"type": "CANCELLING"}})
    assert on_change.finished(running)["state_type"] == "CANCELLED"
    assert on_change.journal()[-1]["what"] == "interrupted"
    assert not psutil.pid_exists(script)


@pytest.mark.slow
def test_a_server_that_dies_ends_all_with_its_last_words(on_change: Scheduler):
    server = next(process for process in on_change.processes() if "prefect server start" in " ".join(process.cmdline()))
    server.kill()
    kept = on_change.starts[-1]
    assert kept.code(timeout=90) == 1
    assert "error: Prefect's server ended with code -9; it said: " in kept.tail()
    assert on_change.processes() == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_itself_retrains_promotes_and_then_skips(tmp_path: Path):
    with kept_together(Scheduler(tmp_path, free_ports(1)[0], tmp_path / "storage" / "schedule" / "digits")) as scheduler:
        kept = scheduler.keep(ddpm_command("schedule", "digits", *TINY, "--on-change", "--poll", "1s", "--retries", "3", "--port", str(scheduler.port)))
        scheduler.ready(kept)
        wait_for(scheduler.runs, 60)
        first = scheduler.finished(scheduler.runs()[0]["id"], 600)
        assert (first["state_type"], first["state"]["name"]) == ("COMPLETED", "Promoted"), first["state"]
        assert scheduler.tasks(first["id"]) == [(stage, "Completed") for stage in STAGES]
        second = scheduler.finished(scheduler.run_now(), 200)
        assert (second["state_type"], second["state"]["name"]) == ("COMPLETED", "Skipped"), second["state"]
        assert [stage for stage, _ in scheduler.tasks(second["id"])] == ["preprocess"]
        assert f"{second['name']} skipped: nothing new since" in kept.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("conditions", ["honoured", "ignored"])
def test_two_schedulers_on_one_bucket_make_one_attempt(
    conditions: Conditions, s3_of_kind: Callable[[Conditions], S3Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two machines share the bucket and MLflow, and no folder; both are asked at the same moment."""
    s3, storage = s3_of_kind(conditions), f"s3://bucket/{tmp_path.name}"
    with ExitStack() as stack:
        env = s3.env | {"MLFLOW_TRACKING_URI": stack.enter_context(mlflow_server(tmp_path / "mlflow"))}
        machines = []
        for name, port in zip(("one", "other"), free_ports(2), strict=True):
            machine = stack.enter_context(kept_together(Scheduler(tmp_path / name, port, tmp_path / name / "own" / "schedule" / "digits")))
            machine.home.mkdir()
            settings = [*TINY, "cluster.num_workers=1", f"cluster.storage={storage}", "--storage", str(machine.home / "own")]
            machine.keep(ddpm_command("schedule", "digits", *settings, "--cron", "0 0 29 2 *", "--port", str(port)), env)
            machines.append(machine)
        for machine in machines:
            machine.ready(machine.starts[0])
        asked = [machine.run_now() for machine in machines]
        states = [machine.finished(run_id, 900)["state"] for machine, run_id in zip(machines, asked, strict=True)]
        assert sorted(state["name"] for state in states) == ["Promoted", "Skipped"], states
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        journal = Location.of(storage) / "retrain" / "digits" / "attempts"
        assert [json.loads((journal / number / "attempt.json").read_text())["outcome"] for number in journal.folders()] == ["promoted"]
        import mlflow

        versions = mlflow.MlflowClient(env["MLFLOW_TRACKING_URI"]).search_model_versions()
        assert [version.version for version in versions] == ["1"]
