"""A folder that rebuilds a denoiser by itself: JSON for what it is, safetensors for its weights, checksums for trust.

denoiser.json       network, diffusion process, image format
ema.safetensors     averaged weights: what samples are drawn from
ema-0.999.safetensors   a further average, named by its decay, where training kept any
weights.safetensors optimizer.safetensors state.json      what training needs to go on
manifest.json       every file with its size and SHA-256, written last
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..diffusion.schedule import DiffusionConfig, Schedule
from ..errors import DataError
from ..scratch import scratch
from ..storage import Location
from .unet import UNet, UNetConfig

MANIFEST = "manifest.json"
MAIN_AVERAGE = "ema"
TRAINING_FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")
STAGING = ".tmp"
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_DTYPES = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8}


class DenoiserSpec(BaseModel):
    """All that decides what a denoiser computes, apart from its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: UNetConfig
    diffusion: DiffusionConfig
    image_size: int = Field(ge=1)
    """Height and width, pixels."""
    channels: Literal[1, 3]
    """1 for grey, 3 for RGB."""
    label_names: tuple[str, ...] = ()
    """The classes that the network is told, in the order of their numbers; empty where it is told none."""

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if self.model.conditional != bool(self.label_names):
            right = "name the dataset's labels" if self.model.conditional else "name none"
            raise ValueError(f"label_names={self.label_names} does not fit model.conditional={self.model.conditional}; {right}")
        return self

    def build(self) -> UNet:
        """Returns the network with fresh weights."""
        return UNet(self.model, image_size=self.image_size, channels=self.channels, num_classes=len(self.label_names))

    @property
    def null_label(self) -> int | None:
        """The label that tells no class, one past the classes; None for a network that is told none."""
        return len(self.label_names) or None

    def labels_by_turns(self, seeds: Sequence[int]) -> torch.Tensor | None:
        """Returns a class for each seed, (len(seeds),) int64: all by turns; None for a network that is told none."""
        return torch.tensor([seed % len(self.label_names) for seed in seeds]) if self.label_names else None

    def label_number(self, label: str) -> int:
        """Returns the number of a class that is given by its name, or by its number where no class has that name.

        Raises:
            ValueError: if there is no such class.
        """
        names = self.label_names
        if not names:
            raise ValueError(f"label={label} means nothing to a model that is told no classes; leave it out, or train with model.conditional=true")
        if label in names:
            return names.index(label)
        if label.isdecimal() and int(label) < len(names):
            return int(label)
        some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"label={label} is unknown; use a class's name ({some}) or a number from 0 to {len(names) - 1}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, self.image_size, self.image_size)


@dataclass(frozen=True)
class Denoiser:
    """A network in evaluation mode, ready to sample from."""

    spec: DenoiserSpec
    network: UNet
    schedule: Schedule


class TrainingRecord(BaseModel):
    """Where training stood when the checkpoint was written."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    step: int
    """Optimiser steps done."""
    train_digest: str
    """Digest of the config and data that made these weights."""
    precision: Literal["float32", "bfloat16"]
    """Arithmetic of the network's forward and backward passes."""
    nonfinite_steps: int = 0
    """Steps whose gradient was not finite, and which were left out."""
    settings: Mapping[str, str] = {}
    """All that the digest is made of, for a message that says which of it differs."""
    open_losses: tuple[float, ...] = ()
    """Losses of the steps since the last point of the curve."""
    open_norms: tuple[float, ...] = ()
    """Norms of the gradients of these steps."""


@dataclass(frozen=True)
class TrainingState:
    """What a resumed training run needs beyond the denoiser."""

    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    record: TrainingRecord


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file with numpy alone, so that a registered model needs no further package to load.

    Raises:
        DataError: if the file is no safetensors file.
    """
    try:
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        return {name: _tensor(raw, start, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a readable safetensors file ({error}); restore it or use another checkpoint") from error


def _tensor(raw: bytes, start: int, entry: Mapping[str, Any]) -> torch.Tensor:
    first, last = entry["data_offsets"]
    values = np.frombuffer(raw[start + first : start + last], dtype=_DTYPES[entry["dtype"]])
    return torch.from_numpy(values.reshape(entry["shape"]).copy())


def sha256_of(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def average_name(decay: float) -> str:
    """Returns what a checkpoint calls the average of a further decay, such as ema-0.999."""
    return f"{MAIN_AVERAGE}-{decay}"


def write_checkpoint(
    path: Location,
    spec: DenoiserSpec,
    ema: Mapping[str, torch.Tensor],
    state: TrainingState | None = None,
    *,
    more_averages: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> None:
    """Writes a checkpoint folder, manifest last, replacing what was there; on a file system it appears in one step.

    Args:
        more_averages: further averaged weights by their `average_name`.
    """
    with _staging(path) as staging:
        _write_json(staging / "denoiser.json", spec.model_dump(mode="json"))
        for name, average in {MAIN_AVERAGE: ema, **(more_averages or {})}.items():
            write_weights(staging / f"{name}.safetensors", average)
        if state is not None:
            write_weights(staging / "weights.safetensors", state.weights)
            write_weights(staging / "optimizer.safetensors", state.optimizer)
            _write_json(staging / "state.json", state.record.model_dump())
        names = ["denoiser.json", *(f"{name}.safetensors" for name in (MAIN_AVERAGE, *(more_averages or {}))), *(() if state is None else TRAINING_FILES)]
        # By name, not by what is there: a file that somebody took away is an error, and not a checkpoint without it.
        files = {name: {"bytes": (staging / name).stat().st_size, "sha256": sha256_of(staging / name)} for name in sorted(names)}
        _write_json(staging / MANIFEST, {"format": 1, "files": files})
        _sync(staging)
        path.remove_tree()
        if path.is_local:
            staging.rename(path.path)
        else:
            path.upload(staging, last=MANIFEST)


@contextmanager
def _staging(path: Location) -> Iterator[Path]:
    if not path.is_local:
        with scratch("checkpoint") as folder:
            yield folder
        return
    staging = path.path.with_name(f".{path.name}.{os.getpid()}{STAGING}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_weights(path: Path, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file that is as readable to others as the files beside it.

    Raises:
        OSError: if it cannot be written, because the disk is full for example.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        raise (OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else OSError(str(error))) from error
    # The library puts a file in its place that only its owner may read.
    path.chmod(mode)


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def manifest_of(path: Location) -> dict[str, tuple[int, str]]:
    """Returns what a checkpoint's manifest says: file name -> bytes and SHA-256.

    Raises:
        DataError: if there is none, or it is no manifest.
        OSError: if the storage cannot be reached, which says nothing about the checkpoint.
    """
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        return {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a whole checkpoint: its {MANIFEST} cannot be read ({error}); name a checkpoint folder") from error


def verify(path: Path, only: Collection[str] | None = None) -> dict[str, str]:
    """Checks the files of a checkpoint on this machine against its manifest and returns file name -> SHA-256.

    Args:
        only: the files to check; all by default.

    Raises:
        DataError: naming the first file that is missing or differs.
    """
    entries = {name: entry for name, entry in manifest_of(Location.of(path)).items() if only is None or name in only}
    for name, (size, checksum) in entries.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or sha256_of(file) != checksum:
            raise DataError(f"{file} does not match the checksum in {MANIFEST}; restore it or use another checkpoint")
    return {name: checksum for name, (_, checksum) in entries.items()}


def is_complete(path: Location) -> bool:
    """Tells whether a checkpoint's files are all there with the sizes that its manifest says; their content is not read."""
    try:
        entries = manifest_of(path)
    except DataError:
        return False
    found = path.files()
    return all(found.get(name) == size for name, (size, _) in entries.items())


def averages_in(path: Location) -> list[str]:
    """Returns the averages that a checkpoint holds, such as ["ema", "ema-0.999"].

    Raises:
        DataError: if the folder is no whole checkpoint.
        OSError: if the storage cannot be reached.
    """
    names = [name.removesuffix(".safetensors") for name in manifest_of(path) if name.endswith(".safetensors")]
    return sorted(name for name in names if name == MAIN_AVERAGE or name.startswith(f"{MAIN_AVERAGE}-"))


def read_spec(path: Location) -> DenoiserSpec:
    """Returns what the denoiser of a checkpoint is.

    Raises:
        DataError: if the folder is no whole checkpoint.
    """
    manifest_of(path)
    try:
        return DenoiserSpec.model_validate_json((path / "denoiser.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path / 'denoiser.json'} cannot be read ({error}); restore it or use another checkpoint") from error


def load_denoiser(path: Location, device: torch.device | str = "cpu", weights: str = MAIN_AVERAGE) -> Denoiser:
    """Rebuilds the denoiser with averaged weights, checksums verified; reads no more than that.

    Args:
        weights: which average, one of `averages_in`.

    Raises:
        DataError: if the folder is no whole checkpoint, or lacks that average.
    """
    try:
        known = averages_in(path)
        if weights not in known:
            raise DataError(f"weights={weights} is not in {path}; use one of {', '.join(known)}")
        wanted = ("denoiser.json", f"{weights}.safetensors")
        with copied(path, (*wanted, MANIFEST)) as folder:
            verify(folder, None if path.is_local else wanted)
            spec = DenoiserSpec.model_validate_json((folder / "denoiser.json").read_text(encoding="utf-8"))
            network = spec.build()
            network.load_state_dict(read_weights(folder / f"{weights}.safetensors"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); restore it or use another checkpoint") from error
    network = network.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return Denoiser(spec, network, Schedule(spec.diffusion).to(device))


@contextmanager
def copied(path: Location, only: Collection[str] | None) -> Iterator[Path]:
    """Gives a checkpoint's files, all or those named, on this machine.

    Raises:
        DataError: if one is missing.
        OSError: if the storage cannot be reached, or this machine's disk is full.
    """
    try:
        with path.local_copy(None if only is None else list(only)) as folder:
            yield folder
    except FileNotFoundError as error:
        raise DataError(f"{path} lacks a file ({error}); restore it or use another checkpoint") from error


@dataclass(frozen=True)
class Resumable:
    """Everything that training needs to go on from a checkpoint: the averaged weights, and the rest.

    Attributes:
        more_averages: further averaged weights by their `average_name`.
    """

    ema: Mapping[str, torch.Tensor]
    state: TrainingState
    more_averages: Mapping[str, Mapping[str, torch.Tensor]]


def load_training_state(path: Location) -> Resumable:
    """Reads what training needs to go on, checksums verified.

    Raises:
        DataError: if the folder is no whole checkpoint, or holds no training state.
    """
    with copied(path, None) as folder:
        verify(folder)
        if not (folder / "state.json").is_file():
            raise DataError(f"{path} holds no training state; resume from a checkpoint that training wrote")
        record = TrainingRecord.model_validate_json((folder / "state.json").read_text(encoding="utf-8"))
        state = TrainingState(read_weights(folder / "weights.safetensors"), read_weights(folder / "optimizer.safetensors"), record)
        averages = {name: read_weights(folder / f"{name}.safetensors") for name in averages_in(Location.of(folder))}
        return Resumable(averages.pop(MAIN_AVERAGE), state, averages)
