"""A plan beside the run that it is of: what it says before, and what came of it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_nodes
from support import TINY, Finished

from components.storage import Location
from pipeline.planning.records import Plan, read_plan

Command = Callable[..., Finished]
TOLERANCE = 0.3
SETTINGS = [*TINY, "cluster.price_per_hour=2.5"]
STAGES = ["preprocess", "train", "evaluate", "register"]
QUICK_TO_MEASURE = ["evaluate.extractor=dct8", "evaluate.num_samples=64", "evaluate.steps=4", "train.sample_every=1000"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planned")


@pytest.fixture(scope="module")
def planned(place: Path, command: Command) -> dict[str, Any]:
    done = command("plan", "digits", *SETTINGS, "--json", cwd=place)
    assert done.code == 0, done.stderr
    return done.json


@pytest.fixture(scope="module")
def ran(place: Path, command: Command, planned: dict[str, Any]) -> dict[str, Any]:
    done = command("run", "digits", *SETTINGS, "--json", cwd=place)
    assert done.code == 0, done.stderr
    return done.json


def quantities(tree: Any) -> Iterator[dict[str, Any]]:
    """Yields every number of a plan that says how it is known."""
    if isinstance(tree, dict) and "basis" in tree:
        yield tree
    else:
        for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
            yield from quantities(part)


def test_json_is_the_plan_with_a_basis_for_each_number(planned: dict[str, Any]):
    plan = Plan.model_validate(planned)
    assert [stage.stage for stage in plan.stages] == STAGES
    assert plan.speed_source == "probe"
    assert plan.num_workers == 2
    assert len(list(quantities(planned))) == 2 * len(STAGES) + 14
    assert all(quantity["value"] > 0 for quantity in quantities(planned))
    assert plan.images.value == round(1797 * 0.9)
    assert plan.epochs.value == pytest.approx(12 * 32 / plan.images.value)
    assert plan.images_per_second.value == pytest.approx(2 * plan.images_per_second_per_worker.value)
    assert plan.seconds.value == pytest.approx(sum(stage.seconds.value for stage in plan.stages))


def test_the_price_is_that_of_all_device_hours(planned: dict[str, Any]):
    plan = Plan.model_validate(planned)
    assert plan.device_hours.value == pytest.approx(2 * plan.seconds.value / 3600)
    assert plan.cost is not None
    assert plan.cost.value == pytest.approx(2.5 * plan.device_hours.value)


@pytest.mark.slow
def test_the_plan_leaves_nothing_behind_but_itself(place: Path, planned: dict[str, Any], ran: dict[str, Any]):
    assert not list((place / "storage" / "plans").glob("*"))


@pytest.mark.slow
def test_checkpoints_are_as_large_as_planned(planned: dict[str, Any], ran: dict[str, Any]):
    folders = list(Path(ran["train"]["folder"]).glob("step_*"))
    sizes = [sum(file.stat().st_size for file in folder.iterdir() if file.name != "manifest.json") for folder in folders]
    assert sizes == pytest.approx([planned["checkpoint_bytes"]["value"]] * len(sizes), rel=0.02)
    assert sum(sizes) == pytest.approx(planned["checkpoints_bytes"]["value"], rel=0.02)


@pytest.mark.slow
def test_the_run_says_what_was_planned_and_what_it_took(place: Path, planned: dict[str, Any], ran: dict[str, Any]):
    import mlflow

    kept = read_plan(Location.of(place / "storage" / "runs" / "digits"))
    assert kept is not None
    uri = f"sqlite:///{place / 'storage' / 'mlflow' / 'mlflow.db'}"
    metrics = mlflow.MlflowClient(tracking_uri=uri).get_run(ran["train"]["mlflow_run_id"]).data.metrics
    for stage in planned["stages"]:
        name, seconds = stage["stage"], stage["seconds"]["value"]
        assert ran[name]["planned_seconds"] == pytest.approx(seconds, abs=1e-3)
        assert kept.actual_s[name] == pytest.approx(ran[name]["seconds"], abs=1e-3)
        assert metrics[f"time/{name}_planned_seconds"] == pytest.approx(seconds)
        assert metrics[f"time/{name}_seconds"] == pytest.approx(ran[name]["seconds"], abs=1e-3)
    assert kept.actual_images_per_second == ran["train"]["images_per_second"]


@pytest.mark.slow
def test_stages_that_are_done_take_no_time(place: Path, command: Command, ran: dict[str, Any]):
    done = command("plan", "digits", *SETTINGS, "--json", cwd=place)
    assert done.code == 0, done.stderr
    plan = Plan.model_validate(done.json)
    assert plan.speed_source == "none needed"
    assert [(stage.seconds.value, stage.seconds.basis, stage.note) for stage in plan.stages] == [(0.0, "done", "done already")] * 4
    assert plan.images.value == ran["preprocess"]["num_train"]


@pytest.mark.slow
def test_the_last_training_of_the_same_settings_tells_the_speed(place: Path, command: Command, ran: dict[str, Any]):
    done = command("plan", "digits", *SETTINGS, "train.steps=24", "--name", "longer", "--last", "--json", cwd=place)
    assert done.code == 0, done.stderr
    plan = Plan.model_validate(done.json)
    assert plan.speed_source == "last measured"
    assert plan.images_per_second.value == ran["train"]["images_per_second"]
    assert plan.images_per_second.basis == "last measured"
    table = command("plan", "digits", *SETTINGS, "--name", "longer", "--last", cwd=place)
    assert "of the last training of these settings" in table.stdout
    other = command("plan", "digits", *SETTINGS, "model.base_channels=16", "--name", "other", "--last", cwd=place)
    assert other.code == 2
    assert "--last: no training of these settings" in other.stderr


@pytest.mark.slow
def test_a_run_over_its_budget_is_refused_before_anything_is_trained(place: Path, command: Command, ran: dict[str, Any]):
    over = [*SETTINGS, "train.steps=1000000000", "cluster.max_hours=0.5", "--name", "over"]
    done = command("run", "digits", *over, "--plan-first", cwd=place)
    assert done.code == 2
    assert done.stdout == ""
    assert "plan of over" in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: cluster.max_hours=0.5 is less than the plan of ")
    assert [path.name for path in (place / "storage" / "runs" / "over").iterdir()] == ["plan.json"]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "settings"), [("digits", ["train.steps=300"]), ("cifar10-small", ["train.steps=60"])])
def test_the_plan_is_within_30_percent_of_the_run(tmp_path: Path, command: Command, make_images: Callable[..., Path], preset: str, settings: list[str]):
    """The run lies between two plans, so that what else the machine does is in both: its rate is at most 30 % outside of theirs."""
    arguments = [preset, *settings, *QUICK_TO_MEASURE]
    if preset == "cifar10-small":
        arguments.append(f"data.source={make_images(tmp_path / 'photos', 400)}")
    before = command("plan", *arguments, "--name", "before", "--json", cwd=tmp_path, timeout=600)
    ran = command("run", *arguments, "--json", cwd=tmp_path, timeout=600)
    after = command("plan", *arguments, "--name", "after", "--json", cwd=tmp_path, timeout=600)
    for done in (before, ran, after):
        assert done.code == 0, done.stderr
    rates = [plan.json["images_per_second"]["value"] for plan in (before, after)]
    assert (1 - TOLERANCE) * min(rates) <= ran.json["train"]["images_per_second"] <= (1 + TOLERANCE) * max(rates), (rates, ran.stdout)
    seconds = [plan.json["seconds"]["value"] for plan in (before, after)]
    taken = sum(stage["seconds"] for stage in ran.json.values())
    assert (1 - TOLERANCE) * min(seconds) <= taken <= (1 + TOLERANCE) * max(seconds), (before.stdout, ran.stdout, after.stdout)


@pytest.mark.slow
def test_an_autoencoder_that_is_trained_first_is_planned_too(tmp_path: Path, command: Command):
    done = command("plan", "digits-latent", "evaluate.num_samples=64", "--json", cwd=tmp_path, timeout=600)
    assert done.code == 0, done.stderr
    plan = Plan.model_validate(done.json)
    assert plan.autoencoder is not None
    assert [stage.stage for stage in plan.stages] == ["preprocess", "encode", "train", "evaluate", "register"]
    assert plan.seconds.value == pytest.approx(plan.autoencoder.seconds.value + sum(stage.seconds.value for stage in plan.stages))
    assert (tmp_path / "storage" / "runs" / "digits-autoencoder" / "plan.json").is_file()


@pytest.mark.slow
def test_a_cluster_is_measured_by_a_job_of_its_own(tmp_path: Path, command: Command):
    with ray_nodes.start_nodes(tmp_path, cpus=(0, 1, 1), in_namespaces=False) as nodes:
        arguments = ["digits", *SETTINGS, f"cluster.storage={tmp_path / 'storage'}", "--address", nodes.dashboard_url]
        env = ray_nodes.environment(nodes.env)
        done = command("plan", *arguments, "--json", cwd=tmp_path, env=env, timeout=600)
        assert done.code == 0, done.stderr
        refused = command("submit", *arguments, "--plan-first", "train.steps=1000000000", "cluster.max_hours=1", cwd=tmp_path, env=env, timeout=600)
    plan = Plan.model_validate(done.json)
    assert (plan.speed_source, plan.num_workers) == ("probe", 2)
    assert refused.code == 2
    assert "error: cluster.max_hours=1 is less than the plan of " in refused.stderr
    kept = json.loads((tmp_path / "storage" / "runs" / "digits" / "plan.json").read_text())
    assert kept["steps"] == 1_000_000_000
