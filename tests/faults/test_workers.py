"""The number of workers is no part of a result: the real command trains the same, dropout included, with one, two and four of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import TINY

from components.model.checkpoint import read_weights
from components.storage import Location
from pipeline.training.metrics_log import read_metrics

pytestmark = pytest.mark.slow
WORKERS = (1, 2, 4)
SETTINGS = [*TINY, "model.dropout=0.3", "train.lanes=4", "train.log_every=1", "train.precision=float32"]


def curve(trained: dict[str, Any], name: str) -> np.ndarray:
    """Returns (steps, 2): each point's step and value."""
    lines = read_metrics(Location.of(trained["folder"]))
    return np.asarray([(line.step, line.metrics[name]) for line in lines])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Any]) -> dict[int, dict[str, Any]]:
    home, receipts = tmp_path_factory.mktemp("workers"), {}
    for count in WORKERS:
        done = command("train", "digits", *SETTINGS, f"cluster.num_workers={count}", "--name", f"by-{count}", "--json", cwd=home)
        assert done.code == 0, done.stderr
        receipts[count] = done.json["train"]
    return receipts


def test_each_run_had_its_own_number_of_workers_and_the_same_inputs(trained: dict[int, dict[str, Any]]):
    assert [receipt["num_workers"] for receipt in trained.values()] == list(WORKERS)
    assert len({receipt["inputs"] for receipt in trained.values()}) == 1


@pytest.mark.parametrize("count", WORKERS[1:])
def test_with_dropout_every_point_of_the_curves_is_that_of_one_worker(trained: dict[int, dict[str, Any]], count: int):
    for name in ("train/loss", "train/gradient_norm"):
        np.testing.assert_allclose(curve(trained[count], name), curve(trained[1], name), rtol=1e-5)


@pytest.mark.parametrize("count", WORKERS[1:])
def test_with_dropout_the_final_weights_are_those_of_one_worker_to_float_tolerance(trained: dict[int, dict[str, Any]], count: int):
    ours, alone = (read_weights(Path(trained[each]["path"]) / "weights.safetensors") for each in (count, 1))
    for name, value in alone.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
