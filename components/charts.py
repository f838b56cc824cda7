"""Curves and intervals, as PNG on white: what a number does over time steps, over sampling steps, and over models."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, PADDING, DPI = 5.8, 0.1, 200
TITLE_COLUMNS, NAME_COLUMNS = 62, 32
COLOURS = ("#2f6db3", "#c8601a", "#2e8560", "#8153a3", "#b03a48", "#6a7178")
"""Apart from each other for every kind of colour vision, together with the markers."""
DASHES = (0, (5, 3))
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, PALE_INK, RULE = "#202124", "#6e7278", "#dfe1e4"
LOG_RATIO, MANY_DECADES = 8, 10**3
"""Values that span more than the first are drawn on a logarithmic axis, with ticks at 1, 2 and 5 up to the second."""
TICK_RATIO = 1.6
"""Ticks of a logarithmic axis that are nearer than this would run into one another."""
Z95 = 1.96


@contextmanager
def _axes(path: Path, title: str, height: float = 3.5) -> "Iterator[Axes]":
    """Gives axes to draw on, and writes them as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=PADDING, h_pad=PADDING))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    figure.suptitle(plain(textwrap.fill(title, TITLE_COLUMNS)), x=PADDING / WIDTH, ha="left", fontsize=11, color=INK)
    draw_frame(axes)
    yield axes
    figure.savefig(path)


def draw_frame(axes: "Axes") -> None:
    """Gives axes the lines, ticks and colours that all charts have."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE_INK)
    axes.tick_params(which="both", colors=PALE_INK, labelcolor=INK, labelsize=9)
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)


def plain(text: str) -> str:
    """Returns text in which Matplotlib finds no formula."""
    return text.replace("$", r"\$")


def shortened(name: str) -> str:
    """Returns a name that leaves room for what it names."""
    return name if len(name) <= NAME_COLUMNS else name[: NAME_COLUMNS - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _label(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(plain(x), fontsize=10, color=INK)
    axes.set_ylabel(plain(y), fontsize=10, color=INK)


def _legend(axes: "Axes") -> None:
    """Writes the names of several lines; one line alone is named by the title."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _count(value: float, _: float | None = None) -> str:
    return f"{value:,.0f}"


def _scale_y(axes: "Axes", values: Sequence[float]) -> None:
    """Makes the axis logarithmic where the values need it and can have it."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > LOG_RATIO * min(finite):
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_yscale("log")
        subs = (1, 2, 5) if max(finite) < MANY_DECADES * min(finite) else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def save_loss_curve(path: Path, steps: Sequence[int], losses: Sequence[float], held_out: Sequence[tuple[int, float]] = ()) -> None:
    """Writes the training loss over steps, with its running mean over a twentieth of the run, and the held-out loss where it was measured.

    Args:
        held_out: step and loss of every measurement.
    """
    window = max(1, len(losses) // 20)
    with _axes(path, "Training loss") as axes:
        axes.plot(steps, losses, linewidth=0.8 if window > 1 else 1.6, alpha=0.4 if window > 1 else 1, color=COLOURS[0], label="loss")
        if window > 1:
            smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
            axes.plot(steps[window - 1 :], smooth, linewidth=1.8, color=COLOURS[0], label=f"mean of {window} points")
        if held_out:
            places, values = zip(*held_out, strict=True)
            axes.plot(places, values, linewidth=1.6, color=COLOURS[1], marker=MARKERS[1], markersize=3.5, label="held-out images, averaged weights")
        _scale_y(axes, [*losses, *(value for _, value in held_out)])
        axes.xaxis.set_major_formatter(_count)
        _label(axes, "step", "loss")
        _legend(axes)


_TIMES = {"ddpm": "timestep t, from little noise to pure noise", "flow": "time t, from the data to pure noise", "edm": "sigma, standard deviation of the noise"}


def save_timestep_losses(path: Path, timesteps: Sequence[float], losses: Mapping[str, Sequence[float]], process: str = "ddpm") -> None:
    """Writes the loss at single noise levels, a line for each name, such as `train` and `held out`.

    Args:
        timesteps: as the process counts them.
        losses: of `loss_by_timestep`, one per timestep.
        process: ddpm, flow or edm.
    """
    with _axes(path, "Loss by noise level" if process == "edm" else "Loss by timestep") as axes:
        for index, (name, values) in enumerate(losses.items()):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            axes.plot(timesteps, values, color=colour, marker=marker, markersize=3.5, linewidth=1.6, label=plain(name))
        _scale_y(axes, [value for values in losses.values() for value in values])
        if process == "edm":
            axes.set_xscale("log")
        else:
            axes.set_xlim(left=min(0, *timesteps))
        _label(axes, _TIMES[process], "L_simple" if process == "ddpm" else "mean squared error")
        _legend(axes)


class StepsPoint(NamedTuple):
    """A distance measured with some sampler and number of steps; `se` is its standard error, 0 where it is not known."""

    sampler: str
    steps: int
    value: float
    se: float


def save_steps_chart(path: Path, points: Sequence[StepsPoint], metric: str, floor: float | None = None) -> None:
    """Writes a distance against the number of sampling steps, a line for each sampler, with intervals of 95 %.

    Args:
        metric: name of the distance, such as `FID, 10,000 samples`.
        floor: what real images measure against real ones at the same count: no sampler can be expected below it.
    """
    with _axes(path, f"{metric}, by sampling steps") as axes:
        for index, sampler in enumerate(dict.fromkeys(point.sampler for point in points)):
            mine = sorted((point for point in points if point.sampler == sampler), key=lambda point: point.steps)
            steps, values, errors = zip(*((point.steps, point.value, Z95 * point.se) for point in mine), strict=True)
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            axes.errorbar(steps, values, yerr=errors, color=colour, marker=marker, markersize=4.5, linewidth=1.6, capsize=3, label=plain(sampler))
        if floor is not None:
            axes.axhline(floor, color=PALE_INK, linestyle=DASHES, linewidth=1.2)
            axes.annotate("real against real", (0, floor), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8.5, color=PALE_INK)
        lowest = [point.value - Z95 * point.se for point in points] + ([] if floor is None else [floor])
        _scale_y(axes, lowest + [point.value for point in points])
        _tick_steps(axes, {point.steps for point in points})
        _label(axes, "network evaluations per image", metric)
        _legend(axes)


def _tick_steps(axes: "Axes", steps: set[int]) -> None:
    """Makes the axis logarithmic, with ticks at the numbers of steps themselves, the largest for certain."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ticks: list[int] = []
    for number in sorted(steps, reverse=True):
        if not ticks or ticks[-1] >= TICK_RATIO * number:
            ticks.append(number)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_count)


class Interval(NamedTuple):
    """A value with its interval of 95 %, and the name of what was measured."""

    name: str
    value: float
    low: float
    high: float


def save_intervals(path: Path, intervals: Sequence[Interval], metric: str, reference: float | None = None, reference_name: str = "") -> None:
    """Writes values with their intervals one below the other, the first at the top.

    Args:
        reference: drawn as a line across all, such as 0 for differences or the champion's value.
    """
    lines = range(len(intervals))
    with _axes(path, f"{metric}, with intervals of 95 %", 1.25 + 0.34 * len(intervals)) as axes:
        if reference is not None:
            axes.axvline(reference, color=PALE_INK, linestyle=DASHES, linewidth=1.2)
            axes.annotate(
                plain(reference_name), (reference, 0), (4, 3), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8.5, color=PALE_INK
            )
        axes.hlines(lines, [each.low for each in intervals], [each.high for each in intervals], color=COLOURS[0], linewidth=2.4, alpha=0.55)
        axes.plot([each.value for each in intervals], lines, "o", color=COLOURS[0], markersize=6)
        axes.set_yticks(lines, [plain(shortened(each.name)) for each in intervals])
        axes.set_ylim(len(intervals) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        _label(axes, metric, "")


class Column(NamedTuple):
    """An axis of parallel coordinates: the value of every line, a number, a name, or None where a line has none."""

    name: str
    values: tuple[float | str | None, ...]


def save_parallel_coordinates(path: Path, columns: Sequence[Column], best: int | None = None) -> None:
    """Writes lines across upright axes, each with its own scale, coloured by the last axis: what was tried, and what came of it.

    Args:
        columns: axes from left to right, the last a number of which lower is better.
        best: the line that stands out.
    """
    from matplotlib import colormaps

    places, last = [_on_axis(column.values) for column in columns], columns[-1].name
    with _axes(path, f"Trials, coloured by {last}; the best is the thick line", 4.0) as axes:
        for line in sorted(range(len(places[0])), key=lambda index: index == best):
            points = [(x, column[line]) for x, column in enumerate(places) if math.isfinite(column[line])]
            value, stands_out = places[-1][line], line == best
            colour = COLOURS[1] if stands_out else colormaps["viridis"](value) if math.isfinite(value) else RULE
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, linewidth=2.6 if stands_out else 1.2)
        _name_axes(axes, columns)


def _name_axes(axes: "Axes", columns: Sequence[Column]) -> None:
    """Draws the axes of parallel coordinates, with the values that stand at their ends, or of names all."""
    axes.set_xticks(range(len(columns)), [plain(shortened(column.name).replace(".", ".\n").replace("/", "/\n")) for column in columns])
    axes.set_yticks([])
    axes.set_ylim(-0.08, 1.08)
    axes.set_xlim(-0.3, len(columns) - 0.4)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    for x, column in enumerate(columns):
        axes.axvline(x, color=PALE_INK, linewidth=0.8, zorder=0)
        for place, text in _ends(column.values):
            axes.annotate(plain(text), (x, place), (4, 3), textcoords="offset points", fontsize=8, color=PALE_INK)


def _numbers(values: Sequence[float | str | None]) -> list[float]:
    return [value for value in values if not isinstance(value, str) and value is not None and math.isfinite(value)]


def _names(values: Sequence[float | str | None]) -> list[str]:
    """Returns the names of an axis in order, none where it has numbers alone."""
    return sorted({str(value) for value in values if value is not None}) if any(isinstance(value, str) for value in values) else []


def _on_axis(values: Sequence[float | str | None]) -> list[float]:
    """Returns where values stand, from 0 to 1; not finite where there is none. Numbers of several orders of magnitude stand by their logarithms."""
    if names := _names(values):
        return [math.nan if value is None else names.index(str(value)) / max(1, len(names) - 1) for value in values]
    numbers = _numbers(values)
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    scale = math.log if low > 0 and high > LOG_RATIO * low else float
    span = scale(high) - scale(low) if numbers else 0.0
    kept = [value if not isinstance(value, str) and value is not None and math.isfinite(value) else None for value in values]
    return [math.nan if value is None else (scale(value) - scale(low)) / span if span else 0.5 for value in kept]


def _ends(values: Sequence[float | str | None]) -> list[tuple[float, str]]:
    if names := _names(values):
        return [(index / max(1, len(names) - 1), name) for index, name in enumerate(names)]
    numbers = _numbers(values)
    ends = sorted({min(numbers), max(numbers)}) if numbers else []
    return [(0.5 if len(ends) == 1 else float(index), f"{value:.4g}") for index, value in enumerate(ends)]
