"""Where images come from: a folder of files or of parquet, on disk or on S3, a torchvision dataset, or the built-in digits.

A source is listed once, and fetches any image of its listing by path; it is small, so that it travels to every worker.
"""

import dataclasses
import json
import os
import re
from typing import Literal, Protocol, Self

import numpy as np
from pydantic import Field, JsonValue, field_validator, model_validator

from ..errors import DataError
from ..spaces.pixels import PixelSettings, PixelSpace
from ..spaces.points import PointSpace
from ..spaces.space import Space
from ..storage import Location
from .builtin import TORCHVISION, DigitsSource, TorchvisionSource
from .folders import FolderSource, Found, walk
from .listing import Listing
from .points import MOST_POINTS, PointsSource, points_address
from .splits import ALL, by_file, by_first_folder, choose, split_of_file
from .tables import ParquetSource, holds_images

_CAME_LATER: dict[str, JsonValue] = {"result": "unless default"}
POINTS = "points:"
"""What the address of a source of points begins with."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]*")


class DataConfig(PixelSettings):
    """Which images or points, and what becomes of them."""

    source: str = Field("digits", min_length=1)
    """A folder of images, or of parquet files with an image column: a path or s3://BUCKET/PREFIX. Or one of `digits`, `cifar10`, `mnist`,
    `fashion-mnist`, `celeba`. Or points: `points:NAME` (spiral, moons, smile, grid), `points:FILE.png` (its dark pixels), or `points:FILE.csv` or
    `points:FILE.parquet` of two columns."""
    num_points: int = Field(10_000, ge=4, le=MOST_POINTS, json_schema_extra=_CAME_LATER)
    """Points that are drawn of a shape or a picture; a table has as many as it has rows."""
    points_seed: int = Field(0, ge=0, lt=2**63, json_schema_extra=_CAME_LATER)
    """Seed of that draw."""
    autoencoder: str | None = Field(None, json_schema_extra=_CAME_LATER)
    """Diffuse in the latent space of an autoencoder: the folder of a diffusers `AutoencoderKL` (safetensors), a checkpoint of an
    autoencoder trained here, models:/NAME@champion, or preset:NAME, whose autoencoder is trained first on the same images. It is told by the
    content of its files, wherever they lie; images are then encoded by a stage of its own."""
    root: str | None = Field(None, json_schema_extra={"result": False})
    """Folder where torchvision datasets lie or are downloaded to; by default `downloads` below the storage root."""
    image_column: str | None = None
    """Column of a parquet source that holds the images; by default the only one of type struct<bytes, path>, else the only one of encoded bytes."""
    label_column: str = "label"
    """Column of a parquet source that holds the labels, if it is there."""
    split: Literal["train", "validation", "test", "all"] | None = Field(None, json_schema_extra=_CAME_LATER)
    """Which split to train on, where files or folders of the source name several; `train` by default. The others are never trained on.
    `all` takes every one."""
    holdout_split: Literal["train", "validation", "test"] | None = Field(None, json_schema_extra=_CAME_LATER)
    """Split of the source that is held out of training; what is in it is not trained on even where it is in the other split too."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What becomes of images whose content is that of an earlier one."""
    holdout_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the images that is held out of training, chosen by a hash of their content."""
    max_bad_fraction: float = Field(0.05, ge=0.0, le=1.0)
    """Largest share of images that may be quarantined before the stage stops."""
    shard_bytes: int = Field(16 << 20, ge=1 << 10)
    """Pixels per shard, bytes, approximately."""

    @field_validator("source")
    @classmethod
    def _no_secret(cls, source: str) -> str:
        scheme, separator, rest = source.partition("://")
        if not separator:
            return source
        if scheme != "s3":
            raise ValueError(f"{scheme}:// is no source; use a folder, s3://BUCKET/PREFIX, or the name of a dataset")
        bucket, _, prefix = rest.rstrip("/").partition("/")
        if "@" in bucket or "?" in rest:
            raise ValueError("the address holds keys or options, which would be logged; put them into the AWS_* variables")
        if not _BUCKET.fullmatch(bucket) or "//" in f"/{prefix}":
            raise ValueError("this is not a bucket with an optional prefix; use s3://BUCKET/PREFIX")
        return source

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> Self:
        if self.holdout_split is not None and self.holdout_fraction:
            raise ValueError(f"holdout_fraction={self.holdout_fraction} and holdout_split={self.holdout_split} both hold images out; set one of them")
        return self

    @property
    def space(self) -> Space:
        """What rows are."""
        return PointSpace() if self.source.startswith(POINTS) else PixelSpace.of(self)


class Source(Protocol):
    """A place that images come from."""

    @property
    def is_remote(self) -> bool:
        """Whether fetching waits on a network, so that it is worth fetching several images at once."""
        ...

    def listing(self) -> Listing:
        """Returns every image, looked up anew. Raises DataError if there is none."""
        ...

    def open(self) -> None:
        """Makes sure that this machine has the source. Raises DataError if it has not: that is no fault of any image."""
        ...

    def fetch(self, path: str) -> bytes | np.ndarray:
        """Returns an image's encoded bytes, or uint8 values (H, W) or (H, W, 3). Raises DataError if it cannot be read."""
        ...


_CLASSES: dict[str, type[FolderSource | ParquetSource | TorchvisionSource | DigitsSource | PointsSource]] = {
    kind.__name__: kind for kind in (FolderSource, ParquetSource, TorchvisionSource, DigitsSource, PointsSource)
}


def address_of(source: str) -> str:
    """Returns what `data.source` names, as it means the same from any folder."""
    if source.startswith(POINTS):
        return POINTS + points_address(source.removeprefix(POINTS))
    return source if source == "digits" or source in TORCHVISION else str(Location.of(source))


def source_to_json(source: Source) -> str:
    """Returns a source as text, for another process."""
    if not isinstance(source, tuple(_CLASSES.values())):
        raise TypeError(f"{type(source).__name__} is none of {', '.join(_CLASSES)}")
    return json.dumps({"class": type(source).__name__} | dataclasses.asdict(source))


def source_from_json(text: str) -> Source:
    """Returns the source that `source_to_json` wrote. Raises ValueError if it wrote none such."""
    fields = json.loads(text)
    kind = fields.pop("class", None)
    if kind not in _CLASSES:
        raise ValueError(f"class={kind} is no source; use one of {', '.join(_CLASSES)}")
    return _CLASSES[kind](**fields)


def list_source(config: DataConfig, downloads: str = "downloads", found: Found | None = None) -> tuple[Source, Listing]:
    """Returns the source that `data.source` names, and what it holds, in one walk over it.

    Args:
        downloads: where torchvision datasets go when `data.root` is not set.
        found: what the walk adds to, for whoever wants to see how far it is.

    Raises:
        DataError: if it is neither a known name nor a readable folder, or holds no images.
    """
    if config.source.startswith(POINTS):
        if config.split not in (None, "train", ALL) or config.holdout_split is not None:
            raise DataError("data.split and data.holdout_split mean nothing to points, which have no splits; leave them out, or use data.holdout_fraction")
        points = PointsSource(points_address(config.source.removeprefix(POINTS)), config.num_points, config.points_seed)
        return points, points.listing()
    if config.source == "digits" or config.source in TORCHVISION:
        root = os.path.abspath(os.path.expanduser(config.root or downloads))
        if config.split not in (None, "train", ALL) or config.holdout_split is not None:
            key = "holdout_split" if config.holdout_split is not None else "split"
            raise DataError(f"data.{key}={getattr(config, key)} is not in data.source={config.source}, of which the training part is read; leave it out")
        builtin = DigitsSource() if config.source == "digits" else TorchvisionSource(config.source, root)
        return builtin, builtin.listing()
    root = Location.of(config.source)
    if root.is_local:
        _check_folder(root, config.source)
    found = walk(root, found)
    source = _folder_source(config, root, found)
    if isinstance(source, FolderSource):
        return source, by_first_folder(source.listing_of(found), config.source, config.split, config.holdout_split)
    splits = choose(config.source, (split_of_file(file.path) for file in found.parquets), config.split, config.holdout_split)
    if splits is not None:
        found.parquets = [file for file in found.parquets if splits.takes(split_of_file(file.path))]
    return source, by_file(source.listing_of(found), splits)


def _check_folder(root: Location, named: str) -> None:
    try:
        is_folder, is_there = root.path.is_dir(), root.path.exists()
    except OSError as error:
        raise DataError(f"data.source={named} cannot be looked at ({error.strerror}); give permission") from error
    if not is_folder:
        wrong = "is not a folder" if is_there else "does not exist"
        raise DataError(f"data.source={named} {wrong}; name a folder of images or parquet files, or one of {', '.join(['digits', *TORCHVISION])}")
    if not os.access(root.path, os.R_OK | os.X_OK):
        raise DataError(f"data.source={named} cannot be read; give read permission")


def _folder_source(config: DataConfig, root: Location, found: Found) -> FolderSource | ParquetSource:
    """Returns a source of the kind of files that a walk found.

    Raises:
        DataError: if it found both kinds, and the settings do not say which is meant.
    """
    images, parquets = len(found.images), len(found.parquets)
    if parquets and (config.image_column is not None or not images):
        return ParquetSource(str(root), config.image_column, config.label_column)
    if parquets and holds_images(root, found.parquets):
        raise DataError(
            f"data.source={config.source} holds {images} image files and {parquets} parquet files with images; "
            "name the subfolder of one kind, or set data.image_column to read the parquet files"
        )
    return FolderSource(str(root))
