"""A folder that rebuilds a denoiser by itself: JSON for what it is, safetensors for its weights, checksums for trust.

denoiser.json       network, diffusion process, image format
ema.safetensors     averaged weights: what samples are drawn from
ema-0.999.safetensors   a further average, named by its decay, where training kept any
weights.safetensors optimizer.safetensors state.json      what training needs to go on
autoencoder.json autoencoder.safetensors    what decodes latents, in a registered version
manifest.json       every file with its size and SHA-256, written last
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ..diffusion.process import Process, make_process
from ..errors import DataError
from ..scratch import scratch
from ..storage import Location
from .manifest import MAIN_AVERAGE, MANIFEST, STAGING, averages_in, copied, sha256_of, verify
from .spec import DenoiserSpec

TRAINING_FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_DTYPES = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8}


@dataclass(frozen=True)
class Denoiser:
    """A network in evaluation mode, ready to sample from."""

    spec: DenoiserSpec
    network: nn.Module
    process: Process


class TrainingRecord(BaseModel):
    """Where training stood when the checkpoint was written."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    step: int
    """Optimiser steps done."""
    train_digest: str
    """Digest of the config and data that made these weights."""
    precision: Literal["float32", "bfloat16"]
    """Arithmetic of the network's forward and backward passes."""
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    """Order of images and weights in memory."""
    compiled: bool = False
    """Whether the step was compiled."""
    nonfinite_steps: int = 0
    """Steps whose gradient was not finite, and which were left out."""
    settings: Mapping[str, str] = {}
    """All that the digest is made of, for a message that says which of it differs."""
    open_losses: tuple[float, ...] = ()
    """Losses of the steps since the last point of the curve."""
    open_norms: tuple[float, ...] = ()
    """Norms of the gradients of these steps."""
    validations: tuple[tuple[int, float], ...] = ()
    """Step and deciding number of every measurement on held-out rows so far."""
    recent_losses: tuple[float, ...] = ()
    """Losses of the last steps, in the order of their steps modulo their number, by which spikes are known."""
    recent_norms: tuple[float, ...] = ()
    """Norms of the gradients of these steps."""
    steps_seen: int = 0
    """Steps among which spikes were looked for."""
    spike_steps: int = 0
    """Steps that were spikes."""

    @property
    def best_step(self) -> int | None:
        """Step of the lowest measurement so far; None without any."""
        return min(self.validations, key=lambda validation: validation[1])[0] if self.validations else None


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


def write_checkpoint(
    path: Location,
    spec: DenoiserSpec,
    ema: Mapping[str, torch.Tensor],
    state: TrainingState | None = None,
    *,
    more_averages: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    more_files: Mapping[str, Path] | None = None,
) -> None:
    """Writes a checkpoint folder, manifest last, replacing what was there; on a file system it appears in one step.

    Args:
        more_averages: further averaged weights by their `average_name`.
        more_files: what else goes with it, by name.
    """
    with _staging(path) as staging:
        _write_json(staging / "denoiser.json", spec.model_dump(mode="json"))
        for name, average in {MAIN_AVERAGE: ema, **(more_averages or {})}.items():
            write_weights(staging / f"{name}.safetensors", average)
        if state is not None:
            write_weights(staging / "weights.safetensors", state.weights)
            write_weights(staging / "optimizer.safetensors", state.optimizer)
            _write_json(staging / "state.json", state.record.model_dump())
        for name, file in (more_files or {}).items():
            shutil.copyfile(file, staging / name)
        names = [
            "denoiser.json",
            *(more_files or {}),
            *(f"{name}.safetensors" for name in (MAIN_AVERAGE, *(more_averages or {}))),
            *(() if state is None else TRAINING_FILES),
        ]
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
    spec = spec.model_copy(update={"space": spec.space.opened(path, device)})
    return Denoiser(spec, network, make_process(spec.diffusion).to(device))


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
