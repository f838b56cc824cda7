"""Faults that are planned, done and compared; the trainings that they hit are in tests/faults."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.storage import Location
from pipeline.training.metrics_log import Attempt, MetricsLine, MetricsLogWriter
from workflows.faults import DAMAGES, KILLS, Kind, damage, plan_faults, raw_curve
from workflows.verify_resume import TrainingEnd, compare

Run = Callable[..., tuple[int, str, str]]
ENDING = TrainingEnd({"weights.safetensors": "aa", "state.json": "bb"}, ((2, 0.5), (4, 0.25)), ((2, 0.5), (4, 0.25)), 1)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 20])
def test_faults_are_dealt_evenly_in_order_and_the_same_for_a_seed(count: int):
    faults = plan_faults(KILLS, count, 200, 3)
    assert faults == plan_faults(KILLS, count, 200, 3)
    assert len(faults) == count
    assert [fault.step for fault in faults] == sorted(fault.step for fault in faults)
    assert all(0 <= fault.step < 120 for fault in faults)
    dealt = Counter(fault.kind for fault in faults)
    assert max((dealt[one] - dealt[other] for one in KILLS for other in KILLS), default=0) <= 1


def test_another_seed_has_other_moments():
    assert len({tuple(fault.step for fault in plan_faults(KILLS, 4, 1000, seed)) for seed in range(20)}) == 20


@pytest.mark.parametrize("draw", [0, 7, 12_345, 2**31 - 1])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_cuts_a_file_short_or_turns_one_bit_of_it(tmp_path: Path, kind: Kind, draw: int):
    content = bytes(range(256)) * 4
    (tmp_path / "weights.safetensors").write_bytes(content)
    damage(tmp_path, kind, draw)
    after = (tmp_path / "weights.safetensors").read_bytes()
    if kind == "newest checkpoint truncated":
        assert len(after) < len(content)
        assert content.startswith(after)
    else:
        assert sum((one ^ other).bit_count() for one, other in zip(content, after, strict=True)) == 1


def test_a_curve_shows_a_step_that_two_attempts_wrote_down(tmp_path: Path):
    folder = Location.of(tmp_path)
    for step in (2, 4):
        with MetricsLogWriter(Attempt(folder)) as metrics_log:
            metrics_log.append(MetricsLine(step=step, timestamp_ms=1, metrics={"train/loss": 1 / step}))
    assert raw_curve(folder) == [(2, 0.5), (4, 0.25)]
    (folder / "metrics" / "0003-00000.jsonl").write_text((folder / "metrics" / "0002-00000.jsonl").read_text())
    assert raw_curve(folder) == [(2, 0.5), (4, 0.25), (4, 0.25)]


def test_equal_endings_are_equal():
    assert [one.what for one in compare(ENDING, ENDING) if not one.equal] == []


@pytest.mark.parametrize(
    ("changes", "what", "difference"),
    [
        ({"checksums": {"weights.safetensors": "cc", "state.json": "bb"}}, "weights.safetensors", "cc where disturbed"),
        ({"checksums": {"state.json": "bb"}}, "weights.safetensors", "missing where disturbed"),
        ({"written": ((2, 0.5), (4, 0.2500001))}, "loss curve, as written down", "1 of 2 points differ: step 4 0.25 against 0.2500001"),
        ({"written": ((2, 0.5),)}, "loss curve, as written down", "1 of 2 points differ: step 4 0.25 against missing"),
        ({"logged": ((2, 0.5), (4, 0.25), (4, 0.25))}, "loss curve, in MLflow", "steps twice: 4"),
        ({"pages": 2}, "runs in MLflow", "2 runs, and it should be 1"),
    ],
)
def test_one_difference_is_named_and_no_other(changes: dict[str, Any], what: str, difference: str):
    assert [(one.what, one.difference) for one in compare(ENDING, replace(ENDING, **changes)) if not one.equal] == [(what, difference)]


def test_curves_without_points_show_nothing():
    empty = replace(ENDING, written=(), logged=())
    assert [one.difference for one in compare(empty, empty) if not one.equal] == ["no points", "no points"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cluster.storage=elsewhere", "cluster.storage cannot be set for this command; leave it out (both trainings have a temporary one)"),
        ("train.steps=9", "train.steps cannot be set for this command; leave it out (use --steps)"),
        ("cluster.address=auto", "cluster.address=auto is another machine, whose processes are not ours to kill; use local"),
    ],
)
def test_settings_that_are_not_for_verify_resume_are_refused_at_once(run: Run, tmp_path: Path, setting: str, message: str):
    code, out, err = run("verify-resume", "digits", setting)
    assert (code, out) == (2, "")
    assert f"error: {message}" in err
    assert list(tmp_path.iterdir()) == []
