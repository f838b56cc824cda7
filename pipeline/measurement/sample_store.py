"""Where samples and features are kept: files, each whole or not there, named after all that decides them."""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from components.data.shards import Split
from components.errors import DataError
from components.model.manifest import manifest_of
from components.storage import Location

if TYPE_CHECKING:
    from components.diffusion.recipe import Recipe

SAMPLES_VERSION = 1
"""Part of every address of samples: raise it when the same model, recipe and seed give other pixels than before."""
SEEDS_PER_PART = 256
ROWS_PER_PART = 2048


@dataclass(frozen=True)
class Identity:
    """What an extractor is, as its numbers carry it."""

    name: str
    digest: str
    preprocessing: str

    @property
    def file_name(self) -> str:
        """Short and unlike that of any other extractor."""
        return f"{self.name}-{self.digest[:16]}"


@dataclass(frozen=True)
class RealSet:
    """The images of one split of a dataset, and where their features are kept.

    Attributes:
        dataset: its folder.
        folder: of the features, named after the dataset.
    """

    folder: Location
    dataset: str
    split: Split

    def features_file(self, extractor: Identity, rows: range) -> Location:
        """Returns where the features of some rows lie."""
        return self.folder / extractor.file_name / f"{self.split}-{_span(rows)}.npy"


@dataclass(frozen=True)
class SampleSet:
    """The samples of one model by one recipe: endless, one for each seed, and kept part by part.

    Attributes:
        folder: named after all that decides the samples.
        checkpoint: folder of the model.
        weights: which of its averages.
        label_counts: training images of each class, which decide how often a seed has that class; empty for a model without labels.
        originals: images whose reconstructions samples are, those of an autoencoder: seed s is number s modulo their count. None of a denoiser.
    """

    folder: Location
    checkpoint: str
    weights: str
    recipe: "Recipe"
    label_counts: tuple[int, ...] = ()
    originals: RealSet | None = None

    def labels(self, seeds: Sequence[int]) -> np.ndarray | None:
        """Returns the class of each seed, drawn as often as the training images have it; None for a model without labels."""
        from components.streams import Purpose, stream

        if not self.label_counts:
            return None
        ends = np.cumsum(self.label_counts)
        return np.asarray([np.searchsorted(ends, stream(Purpose.SAMPLE_LABEL, seed).integers(ends[-1]), side="right") for seed in seeds], np.int64)


def pixels_file(folder: Location, seeds: range) -> Location:
    """Returns where the pixels of a part lie, while an evaluation needs them."""
    return folder / f"{_span(seeds)}.npy"


def checksum_file(samples: Location, seeds: range) -> Location:
    """Returns where the checksum of a part's pixels lies."""
    return samples / "checksums" / f"{_span(seeds)}.json"


def features_file(samples: Location, extractor: Identity, seeds: range) -> Location:
    """Returns where the features of a part lie."""
    return samples / extractor.file_name / f"{_span(seeds)}.npy"


def logits_file(samples: Location, extractor: Identity, seeds: range) -> Location:
    """Returns where the logits of a part lie, for an extractor that has any."""
    return samples / f"{extractor.file_name}-logits" / f"{_span(seeds)}.npy"


def _span(numbers: range) -> str:
    return f"{numbers.start:012d}-{len(numbers)}"


def parts_of(numbers: range, size: int) -> list[range]:
    """Returns a range cut at the multiples of a size, so that overlapping ranges share their parts."""
    edges = [numbers.start, *range((numbers.start // size + 1) * size, numbers.stop, size), numbers.stop]
    return [range(first, last) for first, last in pairwise(edges)]


def read_array(file: Location) -> np.ndarray | None:
    """Returns an array that was kept; None where it is not there, or is no whole file."""
    try:
        return np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def is_kept(file: Location) -> bool:
    """Tells whether an array was kept; on a file system, where reading is cheap, also whether it is whole."""
    return read_array(file) is not None if file.is_local else file.is_file()


def write_array(file: Location, values: np.ndarray) -> None:
    """Keeps an array, atomically."""
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    file.write_bytes(content.getvalue())


def read_checksum(file: Location) -> str | None:
    """Returns the checksum that was kept of a part; None where there is none."""
    try:
        return str(json.loads(file.read_text())["sha256"])
    except (OSError, ValueError, KeyError):
        return None


def sample_set(
    storage: Location, checkpoint: Location, weights: str, recipe: "Recipe", label_counts: tuple[int, ...] = (), originals: tuple[RealSet, str] | None = None
) -> SampleSet:
    """Returns the samples of a checkpoint's average by a recipe; equal weights have equal samples, wherever the checkpoint lies.

    Args:
        originals: of an autoencoder, with the digest of their dataset.

    Raises:
        DataError: if the folder is no checkpoint, or lacks the average.
    """
    decides: list[object] = [SAMPLES_VERSION, manifest_of(checkpoint)["denoiser.json"][1], checksum_of(checkpoint, weights), recipe.identity(), label_counts]
    if originals is not None:
        decides.append([originals[1], originals[0].split])
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24]
    return SampleSet(storage / "samples" / key, str(checkpoint), weights, recipe, label_counts, None if originals is None else originals[0])


def checksum_of(checkpoint: Location, weights: str) -> str:
    """Returns the SHA-256 of one of a checkpoint's averages.

    Raises:
        DataError: if the folder is no checkpoint, or lacks the average.
    """
    files = manifest_of(checkpoint)
    if f"{weights}.safetensors" not in files:
        raise DataError(f"{checkpoint} has no average {weights}; it holds {', '.join(sorted(files))}")
    return files[f"{weights}.safetensors"][1]


def read_parts(files: Iterator[Location]) -> Iterator[np.ndarray]:
    """Yields kept arrays.

    Raises:
        DataError: if one is not there.
    """
    for file in files:
        values = read_array(file)
        if values is None:
            raise DataError(f"{file} is missing or damaged; delete it, and run evaluate again")
        yield values
