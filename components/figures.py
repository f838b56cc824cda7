"""Grids, contact sheets and animations."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .counts import counted
from .data.images import to_image

GRID_GAP = 1
CELL, CELL_GAP, MARGIN = 112, 8, 24
MOST_ENLARGED = 8
"""Larger squares for single pixels make an image harder to recognise."""
NAME_WIDTH, LEAST_WIDTH = 180, 560
TITLE_SIZE, TEXT_SIZE = 22, 15
INK, PALE_INK, OUTLINE = (32, 33, 36), (110, 114, 120), (206, 208, 212)
ALARM = (190, 36, 44)
PAIR_COLUMNS, MOST_PAIRS = 8, 16


def grid(pixels: np.ndarray, columns: int, width: int = 800) -> Image.Image:
    """Returns images side by side on white, scaled up by the largest whole factor that keeps the picture within a width.

    Args:
        pixels: (N, C, H, W) uint8, C of 1 or 3: tiles of a space.
        width: of the picture, pixels; one that is wider without scaling stays as it is.
    """
    count, channels, tall, wide = pixels.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = np.full((channels, rows * (tall + GRID_GAP) + GRID_GAP, columns * (wide + GRID_GAP) + GRID_GAP), 255, np.uint8)
    for index, image in enumerate(pixels):
        top = GRID_GAP + (index // columns) * (tall + GRID_GAP)
        left = GRID_GAP + (index % columns) * (wide + GRID_GAP)
        canvas[:, top : top + tall, left : left + wide] = image
    picture = to_image(canvas)
    factor = max(1, width // picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


@dataclass(frozen=True)
class Strip:
    """One line of a contact sheet.

    Attributes:
        name: stands before the images, `note` below it in a paler ink.
        pixels: (N, C, H, W) uint8, C of 1 or 3: tiles of a space.
    """

    name: str
    note: str
    pixels: np.ndarray


def contact_sheet(strips: Sequence[Strip], title: str, caption: str, headings: Sequence[str] = ()) -> Image.Image:
    """Returns lines of images with their names on white, below a title; small images are scaled up by a whole factor, large ones down.

    Several models over the same seeds: a strip for each model, its name and number, and the seeds as headings.

    Args:
        strips: of images of one size.
        headings: over the columns, or none.
    """
    tall, wide = _cell_size(*strips[0].pixels.shape[-2:])
    header = _header_width(strips)
    columns = max(len(strip.pixels) for strip in strips)
    top = MARGIN + TITLE_SIZE + TEXT_SIZE + 3 * CELL_GAP + (TEXT_SIZE + CELL_GAP if headings else 0)
    width = max(LEAST_WIDTH, 2 * MARGIN + header + columns * (wide + CELL_GAP) - CELL_GAP)
    sheet = Image.new("RGB", (width, top + len(strips) * (tall + CELL_GAP) - CELL_GAP + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    write_title(draw, title, caption, width)
    for column, heading in enumerate(headings):
        _write_centred(draw, (MARGIN + header + column * (wide + CELL_GAP) + wide // 2, top - TEXT_SIZE - CELL_GAP), heading, PALE_INK, wide)
    for line, strip in enumerate(strips):
        y = top + line * (tall + CELL_GAP)
        write(draw, (MARGIN, y + tall // 2 - TEXT_SIZE - 3), strip.name, TEXT_SIZE, INK, NAME_WIDTH)
        write(draw, (MARGIN, y + tall // 2 + 3), strip.note, TEXT_SIZE - 2, PALE_INK, NAME_WIDTH)
        for column, image in enumerate(strip.pixels):
            x = MARGIN + header + column * (wide + CELL_GAP)
            draw.rectangle((x - 1, y - 1, x + wide, y + tall), outline=OUTLINE)
            sheet.paste(_scaled(to_image(image), (wide, tall)), (x, y))
    return sheet


def titled(picture: Image.Image, title: str, caption: str) -> Image.Image:
    """Returns one picture below a title, enlarged by a whole factor to about the width of a sheet."""
    factor = max(1, LEAST_WIDTH // picture.width)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)
    top, width = MARGIN + TITLE_SIZE + TEXT_SIZE + 3 * CELL_GAP, max(LEAST_WIDTH, picture.width + 2 * MARGIN)
    sheet = Image.new("RGB", (width, top + picture.height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    write_title(draw, title, caption, width)
    draw.rectangle((MARGIN - 1, top - 1, MARGIN + picture.width, top + picture.height), outline=OUTLINE)
    sheet.paste(picture, (MARGIN, top))
    return sheet


def interpolation_sheet(pixels: np.ndarray, pairs: Sequence[tuple[int, int]], caption: str = "") -> Image.Image:
    """Returns a line of images for each pair of seeds, from the first seed's image to the second's, the fraction of the way over each column.

    Args:
        pixels: (R, N, C, H, W) uint8, R the number of pairs, N of fractions, evenly spaced from 0 to 1.
        pairs: of seeds.
    """
    strips = [Strip(f"seed {first} \N{RIGHTWARDS ARROW} {second}", "", row) for (first, second), row in zip(pairs, pixels, strict=True)]
    fractions = [f"{fraction:.3g}" for fraction in np.linspace(0, 1, pixels.shape[1])]
    return contact_sheet(strips, "Between seeds", caption, fractions)


def closest_pairs(samples: np.ndarray, nearest: np.ndarray, distances: Sequence[float], threshold: float) -> Image.Image:
    """Returns samples, each above the training image nearest to it, with their distance; pairs nearer than a threshold are framed in red.

    Args:
        samples: (N, C, H, W) uint8, the closest pair first; the first MOST_PAIRS are shown.
        nearest: images of the same shape.
        threshold: distance below which a sample counts as a copy.
    """
    shown = min(len(samples), MOST_PAIRS)
    (tall, wide), columns = _cell_size(*samples.shape[-2:]), min(shown, PAIR_COLUMNS)
    strips = [Strip("sample", "", samples), Strip("training image", "nearest to it", nearest)]
    header, pitch = _header_width(strips), (wide + 2 * CELL_GAP, 2 * tall + TEXT_SIZE + 4 * CELL_GAP)
    top, lines = MARGIN + TITLE_SIZE + TEXT_SIZE + 4 * CELL_GAP, -(-shown // PAIR_COLUMNS)
    width = max(LEAST_WIDTH, 2 * MARGIN + header + columns * pitch[0] - CELL_GAP)
    sheet = Image.new("RGB", (width, top + lines * pitch[1] - 2 * CELL_GAP + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    copies = sum(distance < threshold for distance in distances[:shown])
    caption = f"{copies} of {counted(shown, 'pair')} {'is' if copies == 1 else 'are'} nearer than the threshold {threshold:.4g}"
    write_title(draw, "Closest pairs of sample and training image", caption + (", framed in red" if copies else ""), width)
    for line, (row, strip) in itertools.product(range(lines), enumerate(strips)):
        y = top + line * pitch[1] + row * tall + tall // 2
        write(draw, (MARGIN, y - (TEXT_SIZE if strip.note else TEXT_SIZE // 2) - 3), strip.name, TEXT_SIZE, INK, NAME_WIDTH)
        write(draw, (MARGIN, y + 3), strip.note, TEXT_SIZE - 2, PALE_INK, NAME_WIDTH)
    for index in range(shown):
        place = MARGIN + header + index % PAIR_COLUMNS * pitch[0], top + index // PAIR_COLUMNS * pitch[1]
        _paste_pair(sheet, place, (wide, tall), (samples[index], nearest[index]), distances[index], distances[index] < threshold)
    return sheet


def _paste_pair(sheet: Image.Image, place: tuple[int, int], cell: tuple[int, int], pair: tuple[np.ndarray, np.ndarray], distance: float, is_copy: bool) -> None:
    (x, y), (wide, tall), draw = place, cell, ImageDraw.Draw(sheet)
    border = 4 if is_copy else 1
    draw.rectangle((x - border, y - border, x + wide + border - 1, y + 2 * tall + border - 1), outline=ALARM if is_copy else OUTLINE, width=border)
    for row, image in enumerate(pair):
        sheet.paste(_scaled(to_image(image), cell), (x, y + row * tall))
    _write_centred(draw, (x + wide // 2, y + 2 * tall + CELL_GAP), f"{distance:.4g}", ALARM if is_copy else INK, wide + CELL_GAP)


def _cell_size(height: int, width: int) -> tuple[int, int]:
    """Returns height and width of a cell for images of a size."""
    longest = max(height, width)
    if longest <= CELL:
        factor = min(MOST_ENLARGED, CELL // longest)
        return height * factor, width * factor
    return max(1, round(height * CELL / longest)), max(1, round(width * CELL / longest))


def _header_width(strips: Sequence[Strip]) -> int:
    widest = max(max(_font(TEXT_SIZE).getlength(strip.name), _font(TEXT_SIZE - 2).getlength(strip.note)) for strip in strips)
    return min(NAME_WIDTH, round(widest)) + 3 * CELL_GAP if widest else 0


def _scaled(image: Image.Image, cell: tuple[int, int]) -> Image.Image:
    return image.resize(cell, Image.Resampling.NEAREST if image.width <= cell[0] else Image.Resampling.LANCZOS)


def write_title(draw: ImageDraw.ImageDraw, title: str, caption: str, width: int) -> None:
    """Writes a title and a caption at the top of a sheet of a width."""
    write(draw, (MARGIN, MARGIN - 4), title, TITLE_SIZE, INK, width - 2 * MARGIN)
    write(draw, (MARGIN, MARGIN + TITLE_SIZE + CELL_GAP - 2), caption, TEXT_SIZE, PALE_INK, width - 2 * MARGIN)


def _write_centred(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, ink: tuple[int, int, int], width: int) -> None:
    """Writes one small line of text around a place at its upper edge."""
    written = min(width, round(_font(TEXT_SIZE - 2).getlength(text)))
    write(draw, (place[0] - written // 2, place[1]), text, TEXT_SIZE - 2, ink, width)


def write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, ink: tuple[int, int, int], width: int) -> None:
    """Writes one line of text, its middle left out where it is too wide."""
    font, keep, short = _font(size), min(len(text), width), text
    while keep and font.getlength(short) > width:
        keep -= 1
        short = f"{text[: -(-keep // 2)]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - keep // 2 :]}"
    draw.text(place, short, fill=ink, font=font)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Returns the typeface that comes with Matplotlib, which has the letters of most alphabets."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def save_animation(file: Path | BinaryIO, frames: Sequence[Image.Image], milliseconds: int = 80, hold: int = 1500) -> None:
    """Writes frames as a looping GIF that rests on its last frame.

    Args:
        milliseconds: per frame.
        hold: milliseconds on the last frame.
    """
    durations = [milliseconds] * (len(frames) - 1) + [hold]
    frames[0].save(file, "GIF", save_all=True, append_images=list(frames[1:]), duration=durations, loop=0, optimize=True)
