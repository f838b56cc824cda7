"""From what was measured to a plan: identities that hold whatever the numbers."""

from pathlib import Path

import numpy as np
import pytest

from components.metrics.classifier import images_seen
from components.storage import Location
from pipeline.config import RunConfig, config_digest, load_config
from pipeline.planning.estimate import Work, kept_checkpoints, over_budget, plan_of
from pipeline.planning.history import is_kind, speed_digest
from pipeline.planning.records import EvaluateSpeed, Plan, Quantity, Speeds, TrainSpeed
from pipeline.planning.rehearsal import cost_of, rehearsal_settings, sample_of
from pipeline.preprocess import list_source
from workflows.plan import cron_starts, runs_per_month
from workflows.preset_files import PRESETS, find_preset

DAILY = Quantity(value=30, basis="assumed")
WORK = Work(files=1000, todo=1000, images=900, held_out=100, images_basis="assumed", dataset_bytes=None)
TRAIN = TrainSpeed(start_s=10, images_per_second=100, draw_s=1, host_bytes=10**9, gpu_bytes=None, checkpoint_bytes=4000, ema_bytes=1000)
EVALUATE = EvaluateSpeed(
    start_s=1, batch_size=64, batch_s=0.1, call_s=0.02, features_s=1e-3, classifier_start_s=0, classifier_s=0, kernel_s=1, pairs_s=0.1, features=64
)
SPEEDS = Speeds(
    digest="d", device="a CPU", use_gpu=False, num_workers=2, threads=1, num_samplers=2, measured="2026-01-01T00:00:00+00:00", source="measured",
    ray_s=5, preprocess_start_s=1, file_s=0.01, encode_s=0, train=TRAIN, evaluate=EVALUATE,
)  # fmt: skip


def digits(*overrides: str) -> RunConfig:
    return load_config(find_preset("digits"), overrides)


def planned(config: RunConfig, work: Work = WORK, speeds: Speeds = SPEEDS) -> Plan:
    return plan_of(config, "r", speeds, work, DAILY)


def seconds(plan: Plan, stage: str) -> float:
    return next(planned.seconds.value for planned in plan.stages if planned.stage == stage)


def test_twice_the_steps_are_twice_the_time_beyond_the_start():
    one, two, three = (seconds(planned(digits(f"train.steps={steps}", "train.sample_every=100000")), "train") for steps in (1000, 2000, 3000))
    assert three - two == pytest.approx(two - one) == pytest.approx(1000 * 64 / 100)


def test_steps_that_are_done_are_not_planned_again():
    whole = planned(digits("train.sample_every=100000"))
    rest = planned(digits("train.sample_every=100000"), Work(1000, 0, 900, 100, "computed", 5000, frozenset({"preprocess"}), 550))
    assert seconds(whole, "train") - seconds(rest, "train") == pytest.approx(550 * 64 / 100 + TRAIN.draw_s)
    assert (seconds(rest, "preprocess"), rest.stages[0].seconds.basis) == (0.0, "done")
    assert rest.dataset_bytes.value == 5000


def test_sampling_scales_with_steps_and_with_samples_per_actor():
    few, more = (seconds(planned(digits("evaluate.num_samples=1024", f"evaluate.steps={steps}")), "evaluate") for steps in (10, 20))
    turns_of_batches = 2 * 4
    assert more - few > turns_of_batches * 10 * EVALUATE.batch_s
    four, eight = (seconds(planned(digits(f"evaluate.num_samples={256 * parts}")), "evaluate") for parts in (4, 8))
    assert eight - four > 2 * 4 * 50 * EVALUATE.batch_s


def test_a_plan_is_held_against_device_hours():
    plan = planned(digits())
    assert over_budget(plan, None) == ""
    assert over_budget(plan, plan.device_hours.value) == ""
    assert over_budget(plan, plan.device_hours.value / 2).startswith("cluster.max_hours=")


def test_price_and_budget_are_no_part_of_a_result():
    assert config_digest(digits("cluster.price_per_hour=3", "cluster.max_hours=9")) == config_digest(digits())
    assert speed_digest(digits("cluster.price_per_hour=3"), 2) == speed_digest(digits("train.steps=7"), 2) != speed_digest(digits(), 1)


def test_checkpoints_that_are_kept_are_counted():
    assert kept_checkpoints(digits("train.keep_last=2")) == 2
    assert kept_checkpoints(digits("train.steps=200")) == 1
    assert kept_checkpoints(digits("train.steps=2750", "train.keep_every=275")) == 10


@pytest.mark.parametrize(
    ("line", "starts"),
    [("0 3 * * *", 30), ("*/15 * * * *", 30 * 96), ("0 0,12 * * *", 60), ("30 1-4 * * *", 120), ("0 3 1-31/1 * *", 30)],
)
def test_a_cron_line_comes_as_often_as_it_says(line: str, starts: int):
    assert cron_starts(line, "Etc/UTC") == starts


def test_days_of_the_week_have_names_and_two_sundays():
    assert cron_starts("0 3 * * 0", "Etc/UTC") == cron_starts("0 3 * * sun", "Etc/UTC") == cron_starts("0 3 * * 7", "Etc/UTC")
    assert cron_starts("0 3 * * mon-fri", "Etc/UTC") + cron_starts("0 3 * * sat,sun", "Etc/UTC") == 30


def test_without_a_schedule_one_run_a_day_is_assumed(tmp_path: Path):
    assert runs_per_month(digits(f"cluster.storage={tmp_path}"), "digits") == DAILY


def test_a_sample_of_a_source_is_spread_over_it_and_a_larger_one_holds_it(tmp_path: Path):
    listed = list_source(digits().data, Location.of(tmp_path))
    few, more = (sample_of(listed, count, 256) for count in (64, 256))
    paths = [set(sample.listing.table["path"].to_pylist()) for sample in (few, more)]
    assert paths[0] < paths[1] < set(listed.listing.table["path"].to_pylist())
    assert len(set(more.listing.table["label"].to_pylist())) == 10
    assert few.plan != more.plan != listed.plan


def test_settings_of_a_rehearsal_are_those_of_the_training_but_for_its_length():
    train = digits().train
    short = rehearsal_settings(train, 83, compiled=False)
    assert (short.steps, short.log_every, short.sample_every) == (80, 10, 70)
    changed = {name for name, value in short.model_dump().items() if value != train.model_dump()[name]}
    assert changed == {"steps", "log_every", "checkpoint_every", "sample_every", "compile"}


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_the_cost_of_a_step_is_known_without_computing_it(preset: str):
    config = load_config(find_preset(preset))
    shape = (4, 16, 16) if preset == "photos-latent" else (2, 4, 4) if preset == "digits-latent" else config.data.space.shape
    flops, parameters = cost_of(config.model, shape)
    assert flops > 0
    assert parameters == sum(parameter.numel() for parameter in config.model.build(shape).parameters())


def test_a_device_is_of_a_kind_by_its_name():
    assert is_kind("NVIDIA H100 80GB HBM3", "H100")
    assert is_kind("NVIDIA A100-SXM4-40GB", "A100")
    assert not is_kind("NVIDIA H200", "H100")
    assert is_kind("AMD EPYC", None)


def test_the_images_that_a_classifier_sees_have_a_lower_and_an_upper_bound():
    assert images_seen(100) == 30 * 90
    assert images_seen(20_000) == 6 * 18_000
    assert images_seen(1_000_000) == 4 * 900_000
    assert np.all(np.diff([images_seen(rows) for rows in (10, 100, 1000)]) > 0)
