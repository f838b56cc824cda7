"""`ddpm sweep` on the digits: what a sweep leaves behind, and that one which is killed ends with the same table."""

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keeper
import pytest
import servers
from support import TINY, Finished, ddpm_command

from components.storage import Location
from pipeline.training.metrics_log import read_metrics

Command = Callable[..., Finished]
ALIKE = ("trial", "run", "settings", "steps", "value", "decided_by", "state", "failure")
"""What two sweeps of the same settings have in common, wherever they ran and whatever interrupted them."""
RATES = "train.lr=[1e-6,1e-3,1e-2]"
SMALL = [*TINY, "train.validate_every=4", "cluster.num_workers=1"]


def table_of(found: Finished) -> list[dict[str, Any]]:
    return [{key: trial[key] for key in ALIKE} for trial in found.json["trials"]]


def client_of(home: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{home}/storage/mlflow/mlflow.db", registry_uri=f"sqlite:///{home}/storage/mlflow/mlflow.db")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def done(home: Path, command: Command) -> Finished:
    found = command("sweep", "digits", *SMALL, RATES, "--json", cwd=home, timeout=600)
    assert found.code == 0, found.stderr
    return found


@pytest.mark.slow
def test_the_best_trial_is_the_lowest_of_those_that_trained_for_longest_and_becomes_champion(home: Path, done: Finished):
    trials = done.json["trials"]
    assert sorted(trial["settings"]["train.lr"] for trial in trials) == [1e-6, 1e-3, 1e-2]
    assert {trial["steps"] for trial in trials} <= set(done.json["rungs"])
    best = trials[done.json["best"]]
    assert (best["state"], best["steps"]) == ("finished", 12)
    assert best["value"] == min(trial["value"] for trial in trials if trial["steps"] == 12)
    assert done.json["stages"]["register"]["promoted"]
    champion = client_of(home).get_model_version_by_alias("ddpm-digits", "champion")
    assert (champion.tags["ddpm.run"], champion.run_id) == (best["run"], best["mlflow_run_id"])


@pytest.mark.slow
def test_trials_share_one_dataset_and_are_runs_beneath_one_run_of_mlflow(home: Path, done: Finished):
    assert [entry.name for entry in (home / "storage/runs").iterdir() if (entry / "preprocess").is_dir()] == ["digits-sweep"]
    assert done.json["stages"]["preprocess"]["skipped"]
    client = client_of(home)
    experiment = client.get_experiment_by_name("ddpm-digits").experiment_id
    (parent,) = client.search_runs([experiment], "tags.`ddpm.kind` = 'sweep'")
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {child.info.run_id for child in children} == {trial["mlflow_run_id"] for trial in done.json["trials"]}
    assert {child.info.run_name for child in children} == {"digits-sweep-000", "digits-sweep-001", "digits-sweep-002"}
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    best = done.json["trials"][done.json["best"]]
    assert parent.data.params == {"best.train.lr": str(best["settings"]["train.lr"])}
    assert parent.data.tags["best.run"] == best["run"]
    folder = Path(client.download_artifacts(parent.info.run_id, "sweep"))
    assert sorted(file.name for file in folder.iterdir()) == ["parallel_coordinates.png", "sweep.json", "trials.csv"]
    with (folder / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["best"] for row in rows].index("True") == done.json["best"]
    assert [float(row["validation/loss"]) for row in rows] == [trial["value"] for trial in done.json["trials"]]


@pytest.mark.slow
def test_the_same_command_again_skips_everything_and_has_the_same_table(home: Path, done: Finished, command: Command):
    again = command("sweep", "digits", *SMALL, RATES, "--json", cwd=home, timeout=600)
    assert again.code == 0, again.stderr
    assert again.json | {"stages": None} == done.json | {"stages": None}
    assert all(stage["skipped"] for stage in again.json["stages"].values())


def test_what_no_trial_takes_is_one_line_before_anything_is_made(command: Command, tmp_path: Path):
    for arguments, said in (
        (["train.lrr=[1,2]"], "train.lrr is not a setting; did you mean train.lr?"),
        (["train.lr=[1e-4]"], "train.lr=[1e-4] holds one value"),
        ([RATES, "--metric", "fid"], "--metric fid is unknown; use validation/loss, validation/distance or evaluation"),
        ([RATES, "--max-hours", "0"], "--max-hours 0 is no time"),
        ([RATES, "--name", "a/b"], "--name a/b is no run name"),
    ):
        refused = command("sweep", "digits", *arguments, cwd=tmp_path)
        assert refused.code == 2
        assert said in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_hours_that_are_over_end_a_sweep_with_the_best_so_far_and_more_go_on(command: Command, tmp_path: Path):
    short = command("sweep", "digits", *SMALL, RATES, "--max-hours", "1e-6", "--json", cwd=tmp_path, timeout=600)
    assert short.code == 0, short.stderr
    first = short.json["rungs"][0]
    assert [(trial["steps"], trial["state"]) for trial in short.json["trials"]] == [(first, "out of time"), (0, "not started"), (0, "not started")]
    assert (short.json["best"], short.json["stages"]["train"]["steps"]) == (0, first)
    assert "--max-hours 1e-06 were over" in short.json["limit"]
    again = command("sweep", "digits", *SMALL, RATES, "--max-hours", "1e-6", "--json", cwd=tmp_path, timeout=600)
    assert table_of(again) == table_of(short)
    more = command("sweep", "digits", *SMALL, RATES, "--json", cwd=tmp_path, timeout=600)
    assert more.json["limit"] is None
    assert more.json["trials"][more.json["best"]]["steps"] == 12


@pytest.mark.slow
def test_finished_trials_are_evaluated_where_samples_decide(command: Command, tmp_path: Path):
    found = command("sweep", "digits", *SMALL, RATES, "--metric", "evaluation", "--json", cwd=tmp_path, timeout=600)
    assert found.code == 0, found.stderr
    finished = [trial for trial in found.json["trials"] if trial["state"] == "finished"]
    assert all(trial["value"] is not None for trial in finished)
    assert found.json["trials"][found.json["best"]]["value"] == min(trial["value"] for trial in finished)
    assert found.json["stages"]["evaluate"]["metric"]["value"] == min(trial["value"] for trial in finished)


@pytest.mark.slow
def test_optuna_suggests_the_same_settings_each_time(command: Command, tmp_path: Path):
    asked = [*SMALL, "train.lr=1e-5..1e-2:log", "--search", "optuna", "--trials", "3", "--json"]
    found = command("sweep", "digits", *asked, cwd=tmp_path, timeout=600)
    assert found.code == 0, found.stderr
    (tmp_path / "storage/sweeps/digits-sweep/sweep.json").unlink()  # as where it was killed before its end
    again = command("sweep", "digits", *asked, cwd=tmp_path, timeout=600)
    assert table_of(again) == table_of(found)
    assert all(stage["skipped"] for stage in again.json["stages"].values())


@pytest.mark.slow
def test_a_trial_that_cannot_be_trained_fails_alone(command: Command, tmp_path: Path):
    found = command("sweep", "digits", *SMALL, "train.lr=[1e30,1e-3]", "train.max_nonfinite_steps=0", "--json", cwd=tmp_path, timeout=600)
    assert found.code == 0, found.stderr
    states = {trial["settings"]["train.lr"]: trial["state"] for trial in found.json["trials"]}
    assert states == {1e30: "failed", 1e-3: "finished"}


EIGHT = [
    *("train.steps=90", "train.global_batch_size=32", "train.log_every=1", "train.checkpoint_every=5", "train.sample_every=100", "train.warmup_steps=2"),
    *("model.base_channels=8", "model.num_groups=4", "evaluate.num_samples=64", "evaluate.steps=4", "evaluate.batch_size=16", "evaluate.extractor=dct8"),
    *("train.lr=1e-4..3e-2:log", "model.dropout=0..0.2", "train.validate_every=30", "cluster.num_workers=1", "--trials", "8"),
]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_sweep_of_eight_trials_that_is_killed_has_the_table_of_an_undisturbed_one(command: Command, tmp_path: Path):
    home, other = tmp_path / "killed", tmp_path / "straight"
    home.mkdir()
    other.mkdir()
    kept = keeper.start(ddpm_command("sweep", "digits", *EIGHT, f"cluster.storage={home / 'storage'}"), log=home / "log", env=servers.environment({}))
    try:
        deadline = time.monotonic() + 1000
        while not _is_within_a_rung(home / "storage", trials=3):
            assert kept.is_running(), kept.tail()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        kept.end()
    again = command("sweep", "digits", *EIGHT, f"cluster.storage={home / 'storage'}", "--json", cwd=home, timeout=1000)
    straight = command("sweep", "digits", *EIGHT, f"cluster.storage={other / 'storage'}", "--json", cwd=other, timeout=1000)
    assert (again.code, straight.code) == (0, 0), again.stderr + straight.stderr
    assert len(table_of(straight)) == 8
    assert {trial["state"] for trial in table_of(straight)} == {"finished", "stopped"}
    assert table_of(again) == table_of(straight)
    assert again.json["best"] == straight.json["best"]
    for stage, key in (("preprocess", "digest"), ("train", "weights_sha256"), ("evaluate", "samples_sha256")):
        assert again.json["stages"][stage][key] == straight.json["stages"][stage][key], stage
    for home_of, found in ((home, again), (other, straight)):
        champion = client_of(home_of).get_model_version_by_alias("ddpm-digits", "champion")
        assert champion.run_id == found.json["trials"][found.json["best"]]["mlflow_run_id"]


def _is_within_a_rung(storage: Path, trials: int) -> bool:
    """Tells whether so many trials have begun, and the last of them is on its way from one rung to the next."""
    runs = sorted(storage.glob("runs/digits-sweep-*/train/*"))
    if len(runs) < trials:
        return False
    lines = read_metrics(Location.of(runs[-1]))
    return bool(lines) and lines[-1].step not in (30, 90) and lines[-1].step > 5
