"""Points in the plane: shapes drawn by code, the dark pixels of a picture, or the rows of a table of two columns."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from ..streams import Purpose, stream
from .listing import Item, Listing, ListingBuilder

PICTURES, TABLES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"), (".csv", ".parquet")
DARK = 128
"""Grey values below are dark."""
MOST_SIDE, MOST_PIXELS = 1024, 100_000_000
MOST_POINTS = 1_000_000


@dataclass(frozen=True)
class PointsSource:
    """Points by their number.

    Attributes:
        address: the name of a shape, or the path of a file.
        num_points: of a shape or a picture; a table has as many as it has rows.
        seed: of the draw, likewise.
    """

    address: str
    num_points: int
    seed: int

    @property
    def is_remote(self) -> bool:
        return False

    def listing(self) -> Listing:
        values = _points(self.address, self.num_points, self.seed)
        stamp = _file_stamp(Path(self.address)) if self.address.lower().endswith(PICTURES) else ""
        is_table, builder = self.address.lower().endswith(TABLES), ListingBuilder()
        for number, value in enumerate(values):
            # A row of a table is as it was while its values are, wherever the file stands and whatever follows.
            builder.add(Item(f"{Path(self.address).name}#{number:07d}", None, value.nbytes, value.tobytes().hex() if is_table else stamp))
        return builder.build({})

    def open(self) -> None:
        _points(self.address, self.num_points, self.seed)

    def fetch(self, path: str) -> np.ndarray:
        point = _points(self.address, self.num_points, self.seed)[int(path.rpartition("#")[2])]
        if not np.isfinite(point).all():
            raise DataError(f"{point[0]:g}, {point[1]:g} are no two finite numbers", "not_a_point")
        return point


def _unit(seed: int, count: int, columns: int) -> np.ndarray:
    """Returns uniform draws (count, columns), the first of them the same whatever their number."""
    return stream(Purpose.POINTS, seed).random((count, columns))


def _noise(u: np.ndarray) -> np.ndarray:
    """Returns standard normal pairs (N, 2) of uniform pairs (Box and Muller 1958)."""
    radius, angle = np.sqrt(-2 * np.log1p(-u[:, 0])), 2 * np.pi * u[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def spiral(count: int, seed: int) -> np.ndarray:
    """Returns points (count, 2) on a spiral of two turns, equally many along each part of its way."""
    u = _unit(seed, count, 3)
    angle = 4 * np.pi * np.sqrt(0.02 + 0.98 * u[:, 0])
    return np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / (4 * np.pi) + 0.015 * _noise(u[:, 1:])


def moons(count: int, seed: int) -> np.ndarray:
    """Returns points (count, 2) on two half circles that reach into each other."""
    u = _unit(seed, count, 4)
    upper, angle = u[:, 3] < 0.5, np.pi * u[:, 0]
    x, y = np.where(upper, np.cos(angle) - 0.5, 0.5 - np.cos(angle)), np.where(upper, np.sin(angle) - 0.25, 0.25 - np.sin(angle))
    return np.stack([x, y], axis=1) + 0.05 * _noise(u[:, 1:3])


def smile(count: int, seed: int) -> np.ndarray:
    """Returns points (count, 2) on a face: its outline, two eyes and a mouth."""
    u = _unit(seed, count, 4)
    part, angle = u[:, 3], 2 * np.pi * u[:, 0]
    outline = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    mouth_angle = np.pi * (1.15 + 0.7 * u[:, 0])
    mouth = 0.6 * np.stack([np.cos(mouth_angle), np.sin(mouth_angle)], axis=1)
    side = np.where(part < 0.9, -0.35, 0.35)
    eyes = np.stack([side + 0.09 * np.cos(angle), 0.35 + 0.12 * np.sin(angle)], axis=1)
    chosen = np.where(part[:, None] < 0.55, outline, np.where(part[:, None] < 0.8, mouth, eyes))
    return chosen + 0.015 * _noise(u[:, 1:3])


def grid(count: int, seed: int) -> np.ndarray:
    """Returns points (count, 2) around the 25 nodes of a grid."""
    u = _unit(seed, count, 3)
    node = np.minimum((u[:, 0] * 25).astype(int), 24)
    return np.stack([node % 5 - 2, node // 5 - 2], axis=1) / 2 + 0.04 * _noise(u[:, 1:])


SHAPES: dict[str, Callable[[int, int], np.ndarray]] = {"spiral": spiral, "moons": moons, "smile": smile, "grid": grid}
"""Shapes by the name that follows `points:`."""


def points_address(named: str) -> str:
    """Returns what follows `points:` as it means the same from any folder.

    Raises:
        DataError: if it names neither a shape nor a file that is there.
    """
    if named in SHAPES:
        return named
    path = Path(named).expanduser()
    if path.suffix.lower() not in (*PICTURES, *TABLES):
        shapes = ", ".join(f"points:{name}" for name in SHAPES)
        raise DataError(f"data.source=points:{named} is no shape and no file of points; use {shapes}, or a .png, .csv or .parquet file")
    if not path.is_file():
        raise DataError(f"data.source=points:{named} does not exist; name a file that is there, or one of {', '.join(f'points:{name}' for name in SHAPES)}")
    return str(path.resolve())


@lru_cache(maxsize=2)
def _points(address: str, num_points: int, seed: int) -> np.ndarray:
    """Returns all points (N, 2), float32, those of a table that are none as NaN."""
    if address in SHAPES:
        return SHAPES[address](num_points, seed).astype(np.float32)
    path = Path(address)
    try:
        values = _from_table(path) if path.suffix.lower() in TABLES else _from_picture(path, num_points, seed)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data.source=points:{address} cannot be read ({' '.join(str(error).split())[:200]}); name a file of points that can") from error
    return values.astype(np.float32)


def _from_picture(path: Path, count: int, seed: int) -> np.ndarray:
    """Returns points (count, 2) in the dark pixels of a picture, the more of them the darker a pixel; its longer side goes from -1 to 1, y upwards."""
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP", "BMP", "GIF"]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(f"data.source=points:{path} has {image.width}x{image.height} pixels; use a picture of at most {MOST_PIXELS:,}")
            image.thumbnail((MOST_SIDE, MOST_SIDE))
            colours = image.convert("RGBA")
            white = Image.new("RGBA", colours.size, "white")
            grey = np.asarray(Image.alpha_composite(white, colours).convert("L")).astype(np.float64)
    except (UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"data.source=points:{path} is no picture that can be read ({error}); save it as PNG") from error
    weights = np.where(grey < DARK, 255 - grey, 0.0)
    if not weights.any():
        raise DataError(f"data.source=points:{path} has no dark pixel (grey below {DARK}); use a dark shape on a light ground")
    u = _unit(seed, count, 3)
    ends = np.cumsum(weights.ravel())
    places = np.minimum(np.searchsorted(ends, u[:, 0] * ends[-1], side="right"), weights.size - 1)
    height, width = weights.shape
    x, y = places % width + u[:, 1] - width / 2, height / 2 - places // width - u[:, 2]
    return np.stack([x, y], axis=1) / (max(height, width) / 2)


def _from_table(path: Path) -> np.ndarray:
    """Returns the rows (N, 2) of a table of two columns; what is no number is NaN."""
    table = pq.read_table(path) if path.suffix.lower() == ".parquet" else _csv(path)
    if table.num_columns != 2:
        raise DataError(f"data.source=points:{path} has {table.num_columns} columns ({', '.join(table.column_names)[:80]}); use a table of two, x and y")
    return np.stack([_numbers(column) for column in table.columns], axis=1)


def _csv(path: Path) -> pa.Table:
    """Returns a table of a CSV file, whose first line may name the columns."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline().strip()
    has_names = not all(_is_number(cell) for cell in first.split(","))
    return pyarrow.csv.read_csv(path, pyarrow.csv.ReadOptions(autogenerate_column_names=not has_names))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy()
    return np.array([float(cell) if isinstance(cell, int | float) or (isinstance(cell, str) and _is_number(cell)) else np.nan for cell in column.to_pylist()])


def _file_stamp(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
