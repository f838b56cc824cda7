"""Pictures of the diffusion process: what noise does to data, how samples rise from it, and the schedules behind both."""

import colorsys
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from PIL import Image, ImageDraw

from .charts import COLOURS, draw_frame, plain
from .data.images import to_image
from .diffusion.config import DiffusionConfig
from .figures import CELL_GAP, INK, MARGIN, OUTLINE, PALE_INK, TEXT_SIZE, TITLE_SIZE, grid, save_animation, write, write_title
from .spaces.points import PointSpace
from .spaces.scatter import scatter_tile
from .spaces.space import Space

if TYPE_CHECKING:
    import torch

    from .diffusion.levels import Level
    from .diffusion.process import Process

MOST_BYTES = 2_000_000
"""Of any picture of this file."""
SHRINK, FEWEST_FRAMES = 0.8, 12


@dataclass(frozen=True)
class Moment:
    """What one step of a sampler sees.

    Attributes:
        t: its time, as the process counts it; -1 where all noise is gone.
        alpha_bar: there.
        x_t: rows (N, *shape).
        x_0: the estimate, likewise.
    """

    t: float
    alpha_bar: float
    x_t: np.ndarray
    x_0: np.ndarray


class Watch:
    """Takes note of some of a sampler's steps; to be given to `sample` as `on_step`.

    Attributes:
        moments: the steps that were noted.
    """

    def __init__(self, space: Space, steps: int, most: int) -> None:
        """Prepares it.

        Args:
            steps: of the sampler.
            most: steps to note, evenly spread.
        """
        self.moments: list[Moment] = []
        self._space = space
        self._noted = set(np.linspace(0, steps - 1, min(most, steps)).round().astype(int).tolist())

    def __call__(self, level: "Level", x_t: "torch.Tensor", x_0: "torch.Tensor") -> None:
        if level.index in self._noted:
            rows, estimate = (self._space.to_rows(values).cpu().numpy() for values in (x_t, x_0))
            self.moments.append(Moment(level.t, level.alpha_bar, rows, estimate))

    def ended(self, rows: np.ndarray) -> list[Moment]:
        """Returns all moments, what came out last."""
        return [*self.moments, Moment(-1, 1.0, rows, rows)]


def colours_by_place(points: np.ndarray) -> np.ndarray:
    """Returns colours (N, 3) uint8 by the direction in which points (N, 2) lie from their middle: equal places have equal colours.

    Lightness changes with the direction as the hue does, so that neighbours differ for every kind of colour vision.
    """
    offset = points - np.nanmedian(points, axis=0)
    turn = (np.arctan2(offset[:, 1], offset[:, 0]) / (2 * np.pi)) % 1.0
    table = np.array([colorsys.hls_to_rgb(0.58 + 0.55 * step, 0.30 + 0.28 * abs(2 * step - 1), 0.75) for step in np.linspace(0, 1, 256)])
    return (255 * table[np.nan_to_num(turn * 255).astype(int)]).astype(np.uint8)


def snr(alpha_bar: np.ndarray) -> np.ndarray:
    """Returns the signal-to-noise ratio alpha_bar / (1 - alpha_bar) of x_t (VDM Eq. 1 for variance-preserving processes)."""
    return alpha_bar / (1 - alpha_bar)


def posterior_variance(alpha_bar: np.ndarray) -> np.ndarray:
    """Returns the variance of q(x_{t-1} | x_t, x_0) at every t (DDPM Eq. 7), 0 at t = 0.

    Args:
        alpha_bar: (T,).
    """
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    return (1 - before) / (1 - alpha_bar) * (1 - alpha_bar / before)


def noised(space: Space, process: "Process", rows: np.ndarray, times: Sequence[float]) -> list[np.ndarray]:
    """Returns rows (N, *shape) as they are at some times: x_t ~ q(x_t | x_0) (DDPM Eq. 4), the same noise at each; -1 is the data themselves.

    What a process scales is scaled back: rows show the shares of data and noise.
    """
    import torch

    from .diffusion.noise import initial_noise

    x_0 = space.to_x_0(torch.from_numpy(np.ascontiguousarray(rows)))
    eps = initial_noise(range(len(rows)), space.shape)
    x_ts = [x_0 if t < 0 else process.add_noise(x_0, eps, torch.full((len(rows),), t)) / process.level_at(t).scale for t in times]
    return [space.to_rows(x_t).numpy() for x_t in x_ts]


def forward_picture(space: Space, process: "Process", rows: np.ndarray, title: str, times: int = 8) -> Image.Image:
    """Returns the figure of what noise does to rows (N, *shape), from the data to t = T - 1; images are shown side by side, points together."""
    shown = [-1, *process.times(times - 1)]
    tiles = [as_one_tile(space, x_t) for x_t in noised(space, process, rows, shown)]
    return forward_figure(tiles, shown, [1.0 if t < 0 else process.level_at(t).alpha_bar for t in shown], title)


def as_one_tile(space: Space, rows: np.ndarray) -> np.ndarray:
    """Returns one picture (C, H, W) uint8 of all rows."""
    tiles = space.tiles(rows)
    if not space.one_tile_per_row:
        return tiles[0]
    picture = np.asarray(grid(tiles, max(1, round(len(tiles) ** 0.5)), width=0))
    return picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)


def reverse_frames(space: Space, moments: Sequence[Moment], columns: int) -> list[Image.Image]:
    """Returns the frames of samples that rise from noise: points in the colour of where each ends, images as x_t beside the estimate of x_0."""
    captions = [f"t = {moment.t:.4g}, SNR {ratio_in_words(moment.alpha_bar)}" if moment.t >= 0 else "samples" for moment in moments]
    if isinstance(space, PointSpace):
        return points_frames([moment.x_t for moment in moments], captions, space.limits())
    return image_frames([space.tiles(moment.x_t) for moment in moments], [space.tiles(moment.x_0) for moment in moments], captions, columns)


def all_schedules(num_steps: int) -> dict[str, np.ndarray]:
    """Returns alpha_bar (T,) of every schedule that there is."""
    from .diffusion.schedule import Schedule

    kinds = get_args(DiffusionConfig.model_fields["betas"].annotation)
    return {kind: Schedule(DiffusionConfig(num_steps=num_steps, betas=kind)).alpha_bar.numpy() for kind in kinds}


def forward_figure(tiles: Sequence[np.ndarray], timesteps: Sequence[float], alpha_bar: Sequence[float], title: str, columns: int = 4) -> Image.Image:
    """Returns data at several times side by side, each with its t and signal-to-noise ratio beneath.

    Args:
        tiles: pictures (C, H, W) uint8, C of 1 or 3, all of one size.
        timesteps: of each; -1 is the data themselves.
        alpha_bar: at each.
    """
    pictures = [_enlarged(tile, 200) for tile in tiles]
    wide, tall = pictures[0].size
    rows, pitch = -(-len(tiles) // columns), (wide + 2 * CELL_GAP, tall + 2 * TEXT_SIZE + 3 * CELL_GAP)
    top = MARGIN + TITLE_SIZE + TEXT_SIZE + 3 * CELL_GAP
    sheet = Image.new("RGB", (2 * MARGIN + min(columns, len(tiles)) * pitch[0] - 2 * CELL_GAP, top + rows * pitch[1] + MARGIN // 2), "white")
    draw = ImageDraw.Draw(sheet)
    write_title(draw, title, "x_t, and its signal-to-noise ratio SNR = alpha_bar / (1 - alpha_bar)", sheet.width)
    for index, (picture, t, level) in enumerate(zip(pictures, timesteps, alpha_bar, strict=True)):
        x, y = MARGIN + index % columns * pitch[0], top + index // columns * pitch[1]
        draw.rectangle((x - 1, y - 1, x + wide, y + tall), outline=OUTLINE)
        sheet.paste(picture, (x, y))
        write(draw, (x, y + tall + CELL_GAP // 2), "data" if t < 0 else f"t = {t:.4g}", TEXT_SIZE, INK, wide)
        write(draw, (x, y + tall + TEXT_SIZE + CELL_GAP), "no noise" if t < 0 else f"SNR {ratio_in_words(level)}", TEXT_SIZE - 2, PALE_INK, wide)
    return sheet


def ratio_in_words(alpha_bar: float) -> str:
    """Returns a signal-to-noise ratio as a figure says it: to two digits, and in decibels."""
    ratio = float(snr(np.asarray(alpha_bar)))
    return f"{ratio:.2g} ({round(10 * np.log10(max(ratio, 1e-30))):+d} dB)"


def points_frames(xs: Sequence[np.ndarray], captions: Sequence[str], limits: tuple[float, float, float, float], size: int = 360) -> list[Image.Image]:
    """Returns frames of points on their way, each point in the colour of where it ends.

    Args:
        xs: points (N, 2) of each frame, the last those that are drawn in the end.
        captions: of each frame.
    """
    colours = colours_by_place(xs[-1])
    return [_captioned(scatter_tile(x, limits, size, colours), caption) for x, caption in zip(xs, captions, strict=True)]


def image_frames(xs: Sequence[np.ndarray], estimates: Sequence[np.ndarray], captions: Sequence[str], columns: int) -> list[Image.Image]:
    """Returns frames of images on their way: x_t beside the network's estimate of x_0.

    Args:
        xs: tiles (N, C, H, W) of x_t of each frame.
        estimates: likewise, of x_0.
        captions: of each frame.
    """
    frames = []
    for x, estimate, caption in zip(xs, estimates, captions, strict=True):
        left, right = (grid(tiles, columns, width=360).convert("RGB") for tiles in (x, estimate))
        top, foot = TEXT_SIZE + 2 * CELL_GAP, TEXT_SIZE + 2 * CELL_GAP
        frame = Image.new("RGB", (left.width + right.width + 3 * CELL_GAP, top + left.height + foot), "white")
        draw = ImageDraw.Draw(frame)
        for place, name, picture in ((CELL_GAP, "x_t", left), (2 * CELL_GAP + left.width, "estimate of x_0", right)):
            write(draw, (place, CELL_GAP), name, TEXT_SIZE, INK, picture.width)
            frame.paste(picture, (place, top))
        write(draw, (CELL_GAP, top + left.height + CELL_GAP), caption, TEXT_SIZE, PALE_INK, frame.width - 2 * CELL_GAP)
        frames.append(frame)
    return frames


def _captioned(tile: np.ndarray, caption: str) -> Image.Image:
    picture = Image.fromarray(tile.transpose(1, 2, 0))
    frame = Image.new("RGB", (picture.width, picture.height + TEXT_SIZE + 2 * CELL_GAP), "white")
    frame.paste(picture, (0, 0))
    draw = ImageDraw.Draw(frame)
    draw.rectangle((0, 0, picture.width - 1, picture.height - 1), outline=OUTLINE)
    write(draw, (CELL_GAP, picture.height + CELL_GAP), caption, TEXT_SIZE, PALE_INK, picture.width - 2 * CELL_GAP)
    return frame


def gif_bytes(frames: Sequence[Image.Image], milliseconds: int = 80, hold: int = 1500, most_bytes: int = MOST_BYTES) -> bytes:
    """Returns frames as a looping GIF that rests on its last frame; where it would be too large, with fewer and then smaller frames."""
    frames = list(frames)
    while True:
        content = io.BytesIO()
        save_animation(content, frames, milliseconds, hold)
        if content.tell() <= most_bytes:
            return content.getvalue()
        if len(frames) > 2 * FEWEST_FRAMES:
            frames = [*frames[:-1:2], frames[-1]]
            milliseconds *= 2
        else:
            frames = [frame.resize((max(1, round(frame.width * SHRINK)), max(1, round(frame.height * SHRINK)))) for frame in frames]


def save_schedules(path: Path, schedules: Mapping[str, np.ndarray]) -> None:
    """Writes one figure of several schedules: alpha_bar, signal-to-noise ratio and posterior variance over t / T.

    Args:
        schedules: alpha_bar (T,) by name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    parts = (("alpha_bar: share of the signal's variance", lambda level: level, False), ("SNR = alpha_bar / (1 - alpha_bar)", snr, True))
    parts += (("variance of q(x_{t-1} | x_t, x_0)", posterior_variance, True),)
    for axes, (name, function, is_logarithmic) in zip(panels, parts, strict=True):
        draw_frame(axes)
        for number, (schedule, alpha_bar) in enumerate(schedules.items()):
            values, steps = function(alpha_bar), (np.arange(len(alpha_bar)) + 1) / len(alpha_bar)
            style = ("-", "--", "-.", ":")[number % 4]
            shown = values > 0 if is_logarithmic else np.ones(len(values), bool)
            axes.plot(steps[shown], values[shown], style, color=COLOURS[number % len(COLOURS)], linewidth=2, label=schedule)
        axes.set_title(plain(name), fontsize=10, loc="left")
        axes.set_xlabel("t / T", fontsize=9)
        if is_logarithmic:
            axes.set_yscale("log")
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _enlarged(tile: np.ndarray, least: int) -> Image.Image:
    """Returns a tile as a picture, enlarged by a whole factor to about a width, or shrunk to it."""
    picture = to_image(tile).convert("RGB")
    factor = least / picture.width
    if factor >= 1:
        return picture.resize((picture.width * round(factor), picture.height * round(factor)), Image.Resampling.NEAREST)
    return picture.resize((least, max(1, round(picture.height * factor))), Image.Resampling.LANCZOS)
