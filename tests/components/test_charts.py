"""Charts, by what is drawn on their axes: lines through the numbers, intervals around them, scales that fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from components.charts import (
    DPI,
    WIDTH,
    Column,
    Interval,
    StepsPoint,
    save_intervals,
    save_loss_curve,
    save_parallel_coordinates,
    save_steps_chart,
    save_timestep_losses,
)

POINTS = [StepsPoint("ddim", 50, 4.0, 0.1), StepsPoint("ancestral", 50, 7.0, 0.3), StepsPoint("ddim", 10, 9.0, 0.2), StepsPoint("ancestral", 250, 3.5, 0.0)]

SamplingSummary = Callable[..., Any]
"""Gives matplotlib's axes, whose own types stop at the base classes of what is drawn."""


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SamplingSummary:
    """Calls a function that writes a chart, checks the file, and returns the axes that it shows."""
    saved: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (saved.append(figure), savefig(figure, path))[1])

    def draw(save: Callable[..., None], *args: Any) -> Any:
        save(tmp_path / "chart.png", *args)
        with Image.open(tmp_path / "chart.png") as image:
            assert image.width == round(WIDTH * DPI)
            assert np.asarray(image.convert("RGB"))[:, [0, -1]].min() == 255
        return saved[-1].axes[0]

    return draw


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Returns the points of the named lines."""
    handles, labels = axes.get_legend_handles_labels()
    plain = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in zip(labels, plain, strict=True)}


def texts(axes: Any) -> str:
    return "\n".join(text.get_text() for text in axes.figure.findobj(Text))


def test_the_loss_at_each_timestep_is_a_line_for_each_set_of_images(drawn: SamplingSummary):
    axes = drawn(save_timestep_losses, [0, 500, 999], {"train": [1.0, 0.1, 0.01], "held out": [1.1, 0.2, 0.02]})
    assert lines(axes) == {"train": ([0, 500, 999], [1.0, 0.1, 0.01]), "held out": ([0, 500, 999], [1.1, 0.2, 0.02])}
    assert axes.get_yscale() == "log"
    assert axes.get_legend() is not None


@pytest.mark.parametrize("losses", [[1.0, 0.9, 0.8], [1.0, 0.0, 0.5], [100.0, float("nan"), 0.0], [float("nan")] * 3])
def test_losses_that_cannot_be_or_need_not_be_logarithmic_are_drawn_on_a_linear_scale(drawn: SamplingSummary, losses: list[float]):
    axes = drawn(save_timestep_losses, [0, 500, 999], {"train": losses})
    assert axes.get_yscale() == "linear"
    assert axes.get_legend() is None


def test_a_distance_is_drawn_by_steps_with_bars_of_1_96_standard_errors_and_a_floor(drawn: SamplingSummary):
    axes = drawn(save_steps_chart, POINTS, "FID", 2.0)
    ddim, ancestral = axes.containers
    for container, (xs, ys, errors) in zip((ddim, ancestral), [([10, 50], [9.0, 4.0], [0.2, 0.1]), ([50, 250], [7.0, 3.5], [0.3, 0.0])], strict=True):
        line, _, (bars,) = container
        assert (list(line.get_xdata()), list(line.get_ydata())) == (xs, ys)
        expected = [[[x, y - 1.96 * error], [x, y + 1.96 * error]] for x, y, error in zip(xs, ys, errors, strict=True)]
        np.testing.assert_allclose(bars.get_segments(), expected)
    assert axes.get_xscale() == "log"
    assert list(axes.get_xticks()) == [250, 50, 10]
    assert [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == "--"] == [[2.0, 2.0]]
    assert "real against real" in texts(axes)
    assert "real against real" not in texts(drawn(save_steps_chart, POINTS, "FID"))


def test_numbers_of_steps_that_are_close_share_a_tick(drawn: SamplingSummary):
    axes = drawn(save_steps_chart, [StepsPoint("ddim", steps, 1.0, 0.0) for steps in (10, 11, 900, 1000)], "FID")
    assert list(axes.get_xticks()) == [1000, 11]


def test_an_interval_below_zero_keeps_the_scale_linear(drawn: SamplingSummary):
    assert drawn(save_steps_chart, [StepsPoint("a", 10, 50.0, 0.1), StepsPoint("a", 20, 0.1, 0.1)], "FID").get_yscale() == "linear"
    assert drawn(save_steps_chart, [StepsPoint("a", 10, 50.0, 0.1), StepsPoint("a", 20, 0.1, 0.01)], "FID").get_yscale() == "log"


def test_intervals_stand_below_one_another_in_their_order(drawn: SamplingSummary):
    intervals = [Interval("v3", 9.8, 9.6, 10.1), Interval("a" * 100, -9.1, -9.3, 9.0)]
    axes = drawn(save_intervals, intervals, "FID", 0.0, "champion")
    [bars] = axes.collections
    np.testing.assert_allclose(bars.get_segments(), [[[9.6, 0], [10.1, 0]], [[-9.3, 1], [9.0, 1]]])
    [points] = [line for line in axes.lines if line.get_marker() == "o"]
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([9.8, -9.1], [0, 1])
    assert axes.yaxis_inverted()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["v3", "a" * 31 + "\N{HORIZONTAL ELLIPSIS}"]
    assert "champion" in texts(axes)


def test_a_name_is_no_formula(drawn: SamplingSummary):
    axes = drawn(save_intervals, [Interval(r"$\frac{$", 1, 0, 2)], r"$\oops$", 1.0, "$x$ $")
    assert [label.get_text() for label in axes.get_yticklabels()] == [r"\$\frac{\$"]


def test_the_training_loss_is_drawn_with_its_running_mean(drawn: SamplingSummary):
    steps, losses = list(range(0, 400, 10)), np.linspace(4, 1, 40).tolist()
    drawn_lines = lines(drawn(save_loss_curve, steps, losses))
    assert drawn_lines["loss"] == (steps, losses)
    xs, ys = drawn_lines["mean of 2 points"]
    assert xs == steps[1:]
    np.testing.assert_allclose(ys, (np.asarray(losses[1:]) + losses[:-1]) / 2)
    assert list(lines(drawn(save_loss_curve, steps[:5], losses[:5]))) == ["loss"]


def test_parallel_coordinates_have_a_line_for_each_trial_each_axis_with_its_own_scale_and_the_best_on_top(drawn: SamplingSummary):
    columns = [
        Column("train.lr", (1e-4, 2e-3, 4e-2)),
        Column("train.optimizer", ("adamw", "muon", "sgd")),
        Column("steps", (90.0, 90.0, 90.0)),
        Column("validation/loss", (0.3, None, 0.4)),
    ]
    axes = drawn(save_parallel_coordinates, columns, 0)
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert [list(np.round(line.get_ydata(), 6)) for line in lines] == [[0.5, 0.5, 0.5], [1.0, 1.0, 0.5, 1.0], [0.0, 0.0, 0.5, 0.0]]
    assert lines[-1].get_linewidth() > lines[0].get_linewidth()
    assert {text.get_text() for text in axes.texts} == {"0.0001", "0.04", "adamw", "muon", "sgd", "90", "0.3", "0.4"}
