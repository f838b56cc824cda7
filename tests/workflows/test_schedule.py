import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image
from support import ROOT

from components.errors import DataError
from components.ingest.sources import DataConfig
from components.storage import Location
from workflows.schedule import processes
from workflows.schedule.attempt import Outcome, StageError, read_outcome, run_stage
from workflows.schedule.changes import Seen, Watch, fingerprint
from workflows.schedule.command import folder_of
from workflows.schedule.plan import Plan, When, duration_of, retrain_command, seconds_of
from workflows.schedule.supervisor import environment, password_of

Run = Callable[..., tuple[int, str, str]]
SCRIPT = ROOT / "tests" / "retrain_script.py"


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    """Returns a function that says how the script behaves and returns its command."""

    def behave(**behaviour: object) -> tuple[str, ...]:
        (tmp_path / "behaviour.json").write_text(json.dumps(behaviour))
        return (sys.executable, str(SCRIPT), str(tmp_path))

    return behave


def a_plan(tmp_path: Path, source: str = "digits", **fields: object) -> Plan:
    file = tmp_path / "preset.yaml"
    file.touch()
    base = {
        "file": str(file),
        "data": DataConfig(source=source, image_size=8).model_dump_json(),
        "name": "digits",
        "when": When(poll_s=1),
        "command": ("true",),
    }
    return Plan.model_validate(base | {"cwd": str(tmp_path), "storage": str(tmp_path)} | fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no time asked for; use one of --cron '0 3 * * *', --interval 1h and --on-change"),
        (["--cron", "0 3 * * *", "--on-change"], "--cron and --on-change asked for; use one of"),
        (["--cron", "0 3 * *"], "--cron '0 3 * *' has 4 fields; use five"),
        (["--interval", "1 hour"], "--interval 1 hour is no duration; use a number and a unit, such as 90s, 15m, 1h or 1d"),
        (["--on-change", "--poll", "0s"], "--poll 0s is no duration"),
        (["--cron", "0 3 * * *", "--time-zone", "Mars/Olympus"], "--time-zone Mars/Olympus is unknown; use a name such as Europe/Berlin or Etc/UTC"),
        (["--interval", "1h", "--name", "a/b"], "--name a/b is no run name"),
        (["--interval", "1h", "train.lr=fast"], "train.lr='fast' is wrong"),
        (["--interval", "1h", "--storage", "s3://bucket"], "--storage s3://bucket can hold no database; name a folder on this machine"),
    ],
)
def test_a_mistake_is_one_message(run: Run, tmp_path: Path, arguments: list[str], message: str):
    pytest.importorskip("prefect")
    code, stdout, stderr = run("schedule", "digits", *arguments)
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_time_that_never_comes_is_one_message_and_no_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("prefect")
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, stderr = run("schedule", "digits", "--cron", "61 3 * * *")
    assert code == 2
    assert stderr.splitlines() == [
        "error: --cron '61 3 * * *' is no time (Invalid cron string: \"61 3 * * *\"); use minute, hour, day, month, day of the week, such as '0 3 * * *'"
    ]
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("workflows.schedule.command.is_installed", lambda: False)
    code, _, stderr = run("schedule", "digits", "--interval", "1h")
    assert (code, stderr) == (2, "error: ddpm schedule needs Prefect, which is not installed; install the extra: uv pip install -e '.[schedule]'\n")


@pytest.mark.parametrize("text", ["1s", "90s", "15m", "1h", "36h", "2d"])
def test_durations_survive_the_round_trip(text: str):
    assert duration_of(seconds_of("--interval", text)) == text


def test_a_schedule_says_when_it_runs():
    assert str(When(cron="0 3 * * *", time_zone="Europe/Berlin")) == "at 0 3 * * * (Europe/Berlin)"
    assert str(When(interval_s=5400)) == "every 90m, counted from midnight UTC"
    assert str(When(poll_s=30)) == "when source or preset have changed, looked at every 30s"


def test_an_attempt_is_the_command_that_crontab_would_call():
    command = retrain_command("digits", ("train.steps=5",), "nightly")
    assert command == (sys.executable, "-m", "workflows", "retrain", "digits", "train.steps=5", "--name", "nightly")


def test_a_schedule_lies_beside_its_runs_or_where_a_database_can():
    assert folder_of(Location("/data/store"), None, "digits") == Location("/data/store/schedule/digits")
    assert folder_of(Location("/data/store"), "/var/lib/ddpm", "digits") == Location("/var/lib/ddpm/schedule/digits")
    on_s3 = {folder_of(Location(f"s3://{bucket}/store"), None, "digits") for bucket in ("one", "other")}
    assert len(on_s3) == 2
    assert all(folder.path.is_relative_to(Path.home() / ".ddpm" / "schedule") for folder in on_s3)


@pytest.mark.parametrize("outcome", ["promoted", "kept"])
def test_four_calls_are_one_attempt_and_the_last_says_what_became_of_it(script: Callable[..., tuple[str, ...]], tmp_path: Path, outcome: str):
    command, said = script(outcome=outcome), list[str]()
    found = [run_stage(command, stage, str(tmp_path), said.append) for stage in ("preprocess", "train", "evaluate", "register")]
    assert [result.outcome for result in found] == ["open", "open", "open", outcome]
    assert found[-1].model == "models:/script/3"
    assert said == ["doing preprocess", "doing train", "doing evaluate", "doing register"]


def test_an_attempt_that_ends_early_is_skipped(script: Callable[..., tuple[str, ...]], tmp_path: Path):
    result = run_stage(script(codes={"preprocess": [11]}), "preprocess", str(tmp_path), print)
    assert (result.outcome, result.reason) == ("skipped", "skipped by a script")


@pytest.mark.parametrize(
    ("code", "message", "is_final", "is_stopped"),
    [(12, "stopped by a script", True, True), (2, "exit code 2: train fails with 2", True, False), (1, "exit code 1: train fails with 1", False, False)],
)
def test_a_failure_says_why_and_whether_it_may_pass(
    script: Callable[..., tuple[str, ...]], tmp_path: Path, code: int, message: str, is_final: bool, is_stopped: bool
):
    with pytest.raises(StageError) as caught:
        run_stage(script(codes={"train": [code]}), "train", str(tmp_path), print)
    assert (str(caught.value), caught.value.is_final, caught.value.is_stopped) == (message, is_final, is_stopped)


def test_a_command_that_does_not_answer_in_json_is_no_success():
    with pytest.raises(StageError, match="exit code 0 without the JSON object") as caught:
        read_outcome(0, io.BytesIO(b"done"), [])
    assert caught.value.is_final


def test_prefects_password_does_not_travel_into_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "ddpm:secret")
    look = "import os, sys; sys.exit(' '.join(name for name in os.environ if name.startswith('PREFECT')) or 'none')"
    with pytest.raises(StageError, match="exit code 1: none"):
        run_stage((sys.executable, "-c", look), "register", str(tmp_path), print)


def test_an_interrupted_stage_is_asked_to_end_and_leaves_no_process(script: Callable[..., tuple[str, ...]], tmp_path: Path):
    command, pids = script(seconds={"preprocess": 600}), list[int]()

    def interrupt(_: str) -> None:
        pids.append(json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[-1])["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(command, "preprocess", str(tmp_path), interrupt)
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[-1])["what"] == "interrupted"
    assert not psutil.pid_exists(pids[0])


def test_the_page_gets_the_summary_and_links_to_a_server(tmp_path: Path):
    pytest.importorskip("prefect")
    from workflows.schedule.flow import links_of, summary_of

    (tmp_path / "summary.md").write_text("# Attempt 7\n")
    outcome = Outcome(outcome="kept", reason="no better", name="digits", run_name="digits-7", mlflow_run_id="abc", model="models:/ddpm-digits/3",
                      mlflow_uri="http://tracking:5000/", summary=str(tmp_path / "summary.md"))  # fmt: skip
    assert summary_of(outcome).startswith("# Attempt 7\n")
    assert "`models:/ddpm-digits/3`" in summary_of(outcome)
    assert links_of(outcome) == {
        "run in MLflow": "http://tracking:5000/#/runs/abc?workflowType=machine_learning",
        "version in MLflow": "http://tracking:5000/#/models/ddpm-digits/versions/3?workflowType=machine_learning",
    }
    assert links_of(outcome.model_copy(update={"mlflow_uri": "sqlite:////store/mlflow.db"})) == {}
    assert summary_of(outcome.model_copy(update={"summary": None})).startswith("**kept**: no better\n")


def test_times_of_an_interval_do_not_move_with_a_restart():
    pytest.importorskip("prefect")
    from workflows.schedule.runner import schedule_of

    anchors = [schedule.anchor_date for _ in range(2) if (schedule := schedule_of(When(interval_s=3600)))]
    assert anchors[0] == anchors[1]
    assert (anchors[0].hour, anchors[0].minute, anchors[0].second) == (0, 0, 0)


def test_the_password_is_made_once_and_readable_by_its_owner_only(tmp_path: Path):
    first = password_of(Location(str(tmp_path)))
    assert password_of(Location(str(tmp_path))) == first
    assert len(first) > 30
    assert (tmp_path / "password").stat().st_mode & 0o777 == 0o600


def test_settings_of_a_persons_own_prefect_do_not_reach_the_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_KEY", "of another server")
    monkeypatch.setenv("PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS", "*")
    env = environment(a_plan(tmp_path, port=4321), Location(str(tmp_path)), "ddpm:secret")
    assert "PREFECT_API_KEY" not in env
    assert env["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"] == "http://127.0.0.1:4321,http://localhost:4321"
    assert (env["DO_NOT_TRACK"], env["PREFECT_SERVER_ANALYTICS_ENABLED"]) == ("1", "false")


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[Callable[..., psutil.Process]]:
    """Returns a function that starts a process of a schedule's folder."""
    made: list[subprocess.Popen[bytes]] = []

    def start(folder: str, code: str = "import time; print(flush=True); time.sleep(600)") -> psutil.Process:
        made.append(subprocess.Popen([sys.executable, "-c", code], env=os.environ | {processes.MARK: folder}, stdout=subprocess.PIPE))
        stdout = made[-1].stdout
        assert stdout is not None
        stdout.readline()
        return psutil.Process(made[-1].pid)

    yield start
    for process in made:
        process.kill()
        process.communicate()


def test_only_processes_of_the_same_folder_are_recognised(orphan: Callable[..., psutil.Process]):
    mine, other = orphan("/store/schedule/digits"), orphan("/store/schedule/digits-2")
    assert processes.family("/store/schedule/digits") == [mine]
    processes.end([mine], 10)
    assert processes.family("/store/schedule/digits") == []
    assert processes.is_alive(other)


def test_a_process_that_will_not_end_is_killed(orphan: Callable[..., psutil.Process]):
    stubborn = orphan("/store/schedule/x", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)")
    processes.end([stubborn], 0.3)
    assert not processes.is_alive(stubborn)


@pytest.fixture
def watched(tmp_path: Path) -> tuple[Watch, Path]:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("L", (8, 8)).save(images / "0.png")
    return Watch(a_plan(tmp_path, str(images)), Seen()), images


def test_an_attempt_is_due_once_for_a_change_that_has_settled(watched: tuple[Watch, Path], tmp_path: Path):
    watch, images = watched
    folder = Location(str(tmp_path))
    assert [watch.is_due(), watch.is_due()] == [False, True]
    watch.asked(folder)
    assert [watch.is_due(), watch.is_due()] == [False, False]
    Image.new("L", (8, 8)).save(images / "1.png")
    first = watch.is_due()
    Image.new("L", (8, 8)).save(images / "2.png")
    assert [first, watch.is_due(), watch.is_due()] == [False, False, True]
    watch.asked(folder)
    assert Seen.load(folder) == watch.seen
    assert watch.seen.key == "change-3"


def test_an_attempt_asked_for_again_after_a_crash_has_the_same_key(watched: tuple[Watch, Path], tmp_path: Path):
    watch, _ = watched
    assert watch.seen.key == Seen.load(Location(str(tmp_path))).key == "change-1"


def test_a_new_recipe_is_a_change(watched: tuple[Watch, Path], tmp_path: Path):
    plan = a_plan(tmp_path, str(watched[1]))
    before = fingerprint(plan)
    assert fingerprint(plan) == before
    assert fingerprint(plan.model_copy(update={"overrides": ("train.lr=0.1",)})) != before
    Path(plan.file).write_text("train: {lr: 0.1}")
    assert fingerprint(plan) != before


def test_a_source_that_is_gone_is_told(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        fingerprint(a_plan(tmp_path, "/nowhere"))


def test_a_scheduler_that_waits_for_days_holds_no_heavy_library():
    pytest.importorskip("prefect")
    look = "import sys, workflows.schedule.{module}; sys.exit(' '.join({'torch', 'ray', 'mlflow'} & set(sys.modules)) or 0)"
    for module in ("supervisor", "runner", "changes"):
        done = subprocess.run([sys.executable, "-c", look.replace("{module}", module)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), module
