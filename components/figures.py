"""Grids, animations and curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .data.images import to_image

GRID_GAP = 1


def grid(pixels: np.ndarray, columns: int, width: int = 800) -> Image.Image:
    """Returns images side by side on white, scaled up by the largest whole factor that keeps the picture within a width.

    Args:
        pixels: (N, C, H, W) uint8, C of 1 or 3.
        width: of the picture, pixels; one that is wider without scaling stays as it is.
    """
    count, channels, tall, wide = pixels.shape
    rows = -(-count // columns)
    canvas = np.full((channels, rows * (tall + GRID_GAP) + GRID_GAP, columns * (wide + GRID_GAP) + GRID_GAP), 255, np.uint8)
    for index, image in enumerate(pixels):
        top = GRID_GAP + (index // columns) * (tall + GRID_GAP)
        left = GRID_GAP + (index % columns) * (wide + GRID_GAP)
        canvas[:, top : top + tall, left : left + wide] = image
    picture = to_image(canvas)
    factor = max(1, width // picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def save_animation(path: Path, frames: Sequence[Image.Image], milliseconds: int = 80, hold: int = 1500) -> None:
    """Writes frames as a looping GIF that rests on its last frame.

    Args:
        milliseconds: per frame.
        hold: milliseconds on the last frame.
    """
    durations = [milliseconds] * (len(frames) - 1) + [hold]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)


def save_loss_curve(path: Path, steps: Sequence[int], losses: Sequence[float]) -> None:
    """Writes the loss over steps as a PNG, logarithmic, with its running mean over a twentieth of the run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    window = max(1, len(losses) // 20)
    axes.plot(steps, losses, linewidth=0.8 if window > 1 else 1.8, alpha=0.4 if window > 1 else 1, color="tab:blue", label="loss")
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, linewidth=1.8, color="tab:blue", label=f"mean of {window} points")
    axes.set(xlabel="step", ylabel="L_simple", yscale="log", title="Training loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path)
