"""What `ddpm sweep` takes for varied, what it draws of it, and what it refuses, before anything is started."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.sweeping.plan import check_trials, measured_by, rungs_of, trial_config
from pipeline.sweeping.space import Choice, Range, combinations, draw, parse_space, to_overrides
from workflows.preset_files import PRESETS

DIGITS = str(PRESETS / "digits.yaml")


def test_lists_are_choices_and_two_dots_are_ranges_of_whole_numbers_or_fractions():
    space, plain = parse_space(
        [
            "train.lr=[1e-4,2e-4,4e-4]",
            "model.dropout=0..0.2",
            "train.weight_decay=1e-4..1e-2:log",
            "model.base_channels=8..16",
            "train.ema_decay=0..1",
            "train.flip=[true,false]",
            "train.optimizer=[adamw,muon]",
            "train.steps=90",
        ]
    )
    assert space == {
        "train.lr": Choice((1e-4, 2e-4, 4e-4)),
        "model.dropout": Range(0.0, 0.2, log=False, whole=False),
        "train.weight_decay": Range(1e-4, 1e-2, log=True, whole=False),
        "model.base_channels": Range(8, 16, log=False, whole=True),
        "train.ema_decay": Range(0, 1, log=False, whole=False),  # a setting that is a fraction stays one
        "train.flip": Choice((True, False)),
        "train.optimizer": Choice(("adamw", "muon")),
    }
    assert plain == ["train.steps=90"]


def test_the_value_of_a_setting_that_is_a_list_is_varied_by_a_list_of_lists_alone():
    space, plain = parse_space(["model.channel_mults=[[1,2],[1,2,2]]", "train.adam_betas=[0.9,0.99]", "train.freeze=[]"])
    assert space == {"model.channel_mults": Choice(([1, 2], [1, 2, 2]))}
    assert plain == ["train.adam_betas=[0.9,0.99]", "train.freeze=[]"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.lr=1e-4"], "nothing is varied; give a setting several values"),
        (["train.lr=[1e-4]"], "train.lr=[1e-4] holds one value; write train.lr=1e-4 for one"),
        (["train.lr=[]"], "train.lr=[] holds no value; give several"),
        (["train.lr=[1e-4,0.0001]"], "holds a value twice; state each once"),
        (["train.lr=[1e-4,2e-4"], "train.lr=[1e-4,2e-4 is not a YAML value"),
        (["train.lr=1e-3..1e-3"], "write train.lr=1e-3 for one value"),
        (["train.lr=2e-3..1e-3"], "write 1e-3..2e-3"),
        (["train.lr=0..1:log"], "begins at 0, which has no order of magnitude; begin above 0"),
        (["train.lr=[1e-4,2e-4]", "train.lr=1e-3"], "train.lr is given a value and varied, too"),
        (["train.steps=[10,20]"], "train.steps is not varied, because trials are compared at equal steps"),
        (["data.mode=[L,RGB]"], "data.mode is not varied, because all trials share one dataset"),
        (["evaluate.steps=10..50"], "evaluate.steps is not varied"),
    ],
)
def test_what_cannot_be_varied_is_refused_by_one_line(arguments: list[str], said: str):
    with pytest.raises(ConfigError) as caught:
        parse_space(arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_a_further_trial_changes_none_of_those_before_and_no_two_are_alike(trials: int, seed: int):
    space, _ = parse_space(["train.lr=1e-4..1e-2:log", "train.warmup_steps=1..4", "train.flip=[true,false]"])
    drawn = draw(space, trials, seed)
    assert draw(space, trials + 1, seed)[:trials] == drawn
    assert len({json.dumps(one) for one in drawn}) == trials
    assert all(1e-4 <= one["train.lr"] <= 1e-2 and 1 <= one["train.warmup_steps"] <= 4 for one in drawn)  # type: ignore[operator]


def test_choices_alone_are_all_tried_and_no_more():
    space, _ = parse_space(["train.lr=[1e-4,2e-4,4e-4]", "train.warmup_steps=1..2"])
    assert combinations(space) == 6
    assert len(draw(space, None, 0)) == 6
    with pytest.raises(ConfigError, match=r"--trials 7 is more than the 6 combinations that there are; use up to 6"):
        draw(space, 7, 0)
    space, _ = parse_space(["model.dropout=0..0.2"])
    with pytest.raises(ConfigError, match="--trials is needed, because a range has no number of combinations"):
        draw(space, None, 0)


def test_what_is_drawn_is_what_a_run_is_told_to_the_last_bit():
    space, _ = parse_space(["train.lr=1e-5..1e-2:log", "model.channel_mults=[[1,2],[1,2,2]]", "train.optimizer=[adamw,muon]"])
    for drawn in draw(space, 8, 3):
        config = load_config(Path(DIGITS), to_overrides(drawn))
        assert config.train.lr == drawn["train.lr"]
        assert list(config.model.channel_mults) == drawn["model.channel_mults"]  # type: ignore[attr-defined]
        assert config.train.optimizer == drawn["train.optimizer"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.lrr=[1,2]"], "train.lrr is not a setting; did you mean train.lr?"),
        (["train.lr=[-1,1]"], "train.lr=-1 is wrong"),
        (["model.dropout=0..2"], "model.dropout=2.0 is wrong"),
        (["model.num_groups=[8,7]"], "num_groups"),
        (["train.lr=[1e-3,1e-2]", "train.lr_schedule=cosine"], "set train.decay_steps, such as train.decay_steps=1100"),
        (["train.lr=[1e-3,1e-2]", "train.validate_every=10", "train.early_stop=3"], "train.early_stop=3 ends trials"),
    ],
)
def test_settings_that_no_run_takes_are_refused_whichever_are_drawn(arguments: list[str], said: str):
    space, plain = parse_space(arguments)
    with pytest.raises(ConfigError) as caught:
        check_trials(DIGITS, plain, space, [])
    assert said in str(caught.value)


def test_losses_of_unlike_questions_are_not_compared():
    space, plain = parse_space(["diffusion.prediction=[v,eps]"])
    first = trial_config(DIGITS, plain, {})
    for metric in ("validation/loss", "evaluation"):
        with pytest.raises(ConfigError, match=r"diffusion.prediction changes what the network is asked, so that held-out losses are not comparable"):
            measured_by(metric, space, first)
    sampled = trial_config(DIGITS, ["train.validate_every=10", "train.validate_samples=64"], {})
    assert {metric: measured_by(metric, space, sampled) for metric in ("validation/distance", "evaluation")} == {
        "validation/distance": "validation/distance",
        "evaluation": "validation/distance",
    }


def test_a_sweep_without_held_out_images_is_refused():
    space, _ = parse_space(["train.lr=[1e-3,1e-2]"])
    with pytest.raises(ConfigError, match=r"data.holdout_fraction=0.0 leaves no images to measure trials on; use data.holdout_fraction=0.1"):
        measured_by("validation/loss", space, trial_config(DIGITS, ["data.holdout_fraction=0"], {}))


@settings(deadline=None)
@given(st.integers(1, 3000))
def test_trials_are_measured_at_every_rung_and_where_they_end(steps: int):
    try:
        rungs, every = rungs_of(load_config(Path(DIGITS), [f"train.steps={steps}"]))
    except ConfigError as error:  # which names a number of steps that would do
        steps = int(str(error).partition("use train.steps=")[2].partition(",")[0])
        rungs, every = rungs_of(load_config(Path(DIGITS), [f"train.steps={steps}"]))
    assert rungs[-1] == steps
    assert all(rung % every == 0 for rung in rungs)
    assert all(later >= 3 * earlier for earlier, later in itertools.pairwise(rungs)) or steps < 3


def test_a_measurement_that_misses_the_end_is_refused():
    with pytest.raises(ConfigError, match=r"train.validate_every=40 does not measure a trial where it ends, at train.steps=1100; use a divisor of it"):
        rungs_of(load_config(Path(DIGITS), ["train.validate_every=40"]))
