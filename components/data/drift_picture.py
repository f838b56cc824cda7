"""New images beside those before: some of both, their labels and their brightness."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..charts import COLOURS, DASHES, INK, draw_frame, plain, shortened
from ..counts import counted
from ..figures import Strip, contact_sheet
from .catalog import Dataset
from .drift import CHANCE, Distance, Drift, LabelCount, rows_of
from .shard_cache import ShardCache
from .summary import NO_LABEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI, BAR, LEAST_BARS, FRAME_HEIGHT, PADDING = 120, 0.34, 5, 1.5, 0.15
"""Inches: the height of one label's two bars, of a chart's frame, and the space around charts."""
LEAST_WIDTH, HEADROOM = 1160, 1.25
"""Pixels that both charts need; how much higher than its bars that of brightness is, for the names of its lines."""
BEFORE, NEW, ALARM = COLOURS[0], COLOURS[1], "#be242c"


def drift_picture(
    drift: Drift, before: Dataset, after: Dataset, *, max_label_drift: float, max_brightness_drift: float, copies: ShardCache | None = None
) -> Image.Image:
    """Returns a picture for the person who must decide whether new images are as they should be.

    Args:
        drift: of these two datasets.
        max_label_drift: largest distance of labels that is in order; `max_brightness_drift` likewise.
        copies: where shards that are not on a file system are copied to.

    Raises:
        DataError: if a part of a dataset cannot be read.
    """
    space = before.manifest.space
    shown = (("new", drift.new_images, after, drift.shown_new), ("before", drift.num_before, before, drift.shown_before))
    strips = []
    for name, count, dataset, numbers in shown:
        rows = rows_of(dataset, np.array(numbers, np.int64), copies)
        strips.append(Strip(name, counted(count, space.noun, ","), space.tiles(rows)))
    sheet = contact_sheet(strips, "New images beside those before", _caption(drift, before, after))
    charts = _charts(drift, max_label_drift, max_brightness_drift, max(sheet.width, LEAST_WIDTH))
    picture = Image.new("RGB", (charts.width, sheet.height + charts.height), "white")
    picture.paste(sheet, (0, 0))
    picture.paste(charts, (0, sheet.height))
    return picture


def _caption(drift: Drift, before: Dataset, after: Dataset) -> str:
    bad = f"{drift.bad_files:,} of {drift.new_images + drift.bad_files:,} new files quarantined"
    unseen = f", {drift.num_unseen_labels:,} unseen label{'' if drift.num_unseen_labels == 1 else 's'}" if drift.num_unseen_labels else ""
    return f"{bad}, {drift.removed_images:,} removed{unseen}; dataset {before.manifest.digest[:8]} to {after.manifest.digest[:8]}"


def _charts(drift: Drift, max_label_drift: float, max_brightness_drift: float, width: int) -> Image.Image:
    """Returns the chart of labels, unless there are none, beside that of brightness, a number of pixels wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    has_labels = [count.name for count in drift.label_counts] != [NO_LABEL]
    rows = _rows(drift)
    height = FRAME_HEIGHT + BAR * max(LEAST_BARS, len(rows) if has_labels else 0)
    figure = Figure(figsize=(width / DPI, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=PADDING, h_pad=PADDING, wspace=0.04))
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + has_labels, squeeze=False)[0]
    if has_labels:
        _draw_labels(axes[0], rows, (drift.num_before, drift.new_images))
        _report(axes[0], "Labels", drift.labels, max_label_drift)
    _draw_brightness(axes[-1], drift)
    _report(axes[-1], "Brightness", drift.brightness, max_brightness_drift)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3])


def _rows(drift: Drift) -> list[LabelCount]:
    """Returns the counts to draw: those that changed most, and the sum of the others."""
    shown = list(drift.label_counts)
    left = drift.num_labels - len(shown)
    if not left:
        return shown
    counted = [drift.num_before - sum(count.before for count in shown), drift.new_images - sum(count.new for count in shown)]
    return [*shown, LabelCount(name=f"{left:,} others", before=counted[0], new=counted[1])]


def _draw_labels(axes: "Axes", rows: Sequence[LabelCount], totals: tuple[int, int]) -> None:
    lines = np.arange(len(rows))
    draw_frame(axes)
    for offset, name, counts, total, colour in (
        (0.2, "before", [row.before for row in rows], totals[0], BEFORE),
        (-0.2, "new", [row.new for row in rows], totals[1], NEW),
    ):
        axes.barh(lines + offset, np.array(counts) / max(1, total), 0.4, color=colour, label=name)
    unseen = {row.name for row in rows if not row.before}
    axes.set_yticks(lines, [plain(shortened(row.name)) for row in rows])
    for row, tick in zip(rows, axes.get_yticklabels(), strict=True):
        tick.set_color(NEW if row.name in unseen else INK)
    room = max(0, LEAST_BARS - len(rows)) / 2
    axes.set_ylim(len(rows) - 0.4 + room, -0.6 - room)
    axes.xaxis.set_major_formatter(_percent)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of images" + ("; orange labels had none before" if unseen else ""), fontsize=9, color=INK)


def _draw_brightness(axes: "Axes", drift: Drift) -> None:
    draw_frame(axes)
    grey = drift.grey
    edges = np.linspace(0, 1, len(grey.before) + 1)
    for name, counts, mean, colour in (("before", grey.before, grey.mean_before, BEFORE), ("new", grey.new, grey.mean_new, NEW)):
        if sum(counts):
            axes.stairs(np.array(counts) / sum(counts), edges, fill=True, color=colour, alpha=0.35)
            axes.stairs(np.array(counts) / sum(counts), edges, color=colour, linewidth=1.4, label=f"{name}, mean {mean:.2f}")
            axes.axvline(mean, ymax=1 / HEADROOM, color=colour, linestyle=DASHES, linewidth=1.4)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, HEADROOM * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(_percent)
    axes.set_xlabel("mean grey value of an image, black 0 and white 1", fontsize=9, color=INK)
    axes.set_ylabel("share of images", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right", ncols=2, handlelength=1.2, columnspacing=1.2)


def _percent(value: float, _: float | None = None) -> str:
    return f"{100 * value:.3g} %"


def _report(axes: "Axes", what: str, distance: Distance, limit: float) -> None:
    """Writes a distance with its limit over a chart, in red where it is over and not by chance."""
    is_far, drifted = distance.value > limit, distance.exceeds(limit)
    chance = f"p < {CHANCE:g}" if distance.p_value < CHANCE else f"p = {distance.p_value:.2g}"
    verdict = "drifted" if drifted else "may be chance" if is_far else "in order"
    text = f"{what}: {verdict}\ndistance {distance.value:.3g}, limit {limit:g}, {chance}"
    axes.set_title(text, loc="left", fontsize=10, color=ALARM if drifted else INK)
