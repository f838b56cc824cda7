"""What a training folder says of the training in it: how far it is, with which settings, and which of its checkpoints a number of steps means."""

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from pydantic import ValidationError

from components.model.manifest import is_complete, manifest_of
from components.model.retention import checkpoint_step, checkpoints
from components.storage import Location
from pipeline.artifacts import TrainedModel
from pipeline.errors import ConfigError
from pipeline.training.plan import TrainOutcome

if TYPE_CHECKING:
    from components.model.checkpoint import TrainingRecord


def is_as_long(receipt: TrainedModel, steps: int) -> bool:
    """Tells whether a training is what a number of steps means: it has that many, or ended early before."""
    return receipt.steps == steps if receipt.stopped_at is None else receipt.stopped_at <= steps


def kept_at(steps: int, folder: Location) -> Location | None:
    """Returns the checkpoint of a step, where more was trained already; None where it was not.

    Raises:
        ConfigError: if more was trained, and no checkpoint of that step is kept.
    """
    whole = [path for path in checkpoints(folder) if is_complete(path)]
    if not whole or checkpoint_step(whole[0]) <= steps:
        return None
    kept = next((path for path in whole if checkpoint_step(path) == steps), None)
    if kept is None:
        known = ", ".join(str(step) for step in sorted({checkpoint_step(path) for path in whole}))
        raise ConfigError(
            f"train.steps={steps}: the run has done {checkpoint_step(whole[0])} steps, and of those before it keeps checkpoints of {known} alone; "
            "use one of these, keep more by train.keep_every, or give the shorter run another --name"
        )
    return kept


def already_at(steps: int, folder: Location) -> TrainOutcome | None:
    """Returns what was trained up to a step, where more was trained already; raises like `kept_at`."""
    from components.model.checkpoint import read_weights

    kept = kept_at(steps, folder)
    if kept is None:
        return None
    record, before = record_of(kept), receipt_in(folder)
    with kept.local_copy(["ema.safetensors"]) as copy:
        parameters = sum(value.numel() for value in read_weights(copy / "ema.safetensors").values())
    return TrainOutcome(
        checkpoint=str(kept),
        weights_sha256=manifest_of(kept)["ema.safetensors"][1],
        parameters=parameters,
        steps=steps,
        precision=record.precision,
        layout=record.layout,
        compiled=record.compiled,
        num_workers=before.num_workers if before else 1,
        device=before.device if before else "unknown",
    )


def settings_of(folder: Location) -> Mapping[str, str]:
    """Returns the settings that a training's newest whole checkpoint was made with, nothing where there is none that says them."""
    newest = next(filter(is_complete, checkpoints(folder)), None)
    if newest is not None:
        with suppress(OSError, ValidationError):
            return record_of(newest).settings
    return {}


def steps_to_keep(checkpoint: Location) -> tuple[int, ...]:
    """Returns the steps of the best measurement so far, and of the checkpoint that is handed on."""
    best = record_of(checkpoint).best_step
    return (checkpoint_step(checkpoint), *(() if best is None else (best,)))


def receipt_in(folder: Location) -> TrainedModel | None:
    """Returns the receipt of a training, None where it has none."""
    with suppress(OSError, ValidationError):
        return TrainedModel.model_validate_json((folder / "receipt.json").read_text())
    return None


def record_of(checkpoint: Location) -> "TrainingRecord":
    """Returns where training stood at a checkpoint."""
    from components.model.checkpoint import TrainingRecord

    return TrainingRecord.model_validate_json((checkpoint / "state.json").read_text())
