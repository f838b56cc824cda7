"""Averages of a training that are made after it, as checkpoints that are measured like any."""

from components.model.manifest import averages_in, is_complete, power_average_width
from components.model.retention import snapshots_folder
from components.model.spec import read_spec
from components.storage import Location
from pipeline.artifacts import TrainedModel
from pipeline.errors import ConfigError


def rebuilt(model: TrainedModel, width: float) -> Location:
    """Returns a checkpoint whose average has a width at the end of a training; it is made once.

    Raises:
        ConfigError: if the training kept no averages that it could be made of.
    """
    from components.model.checkpoint import read_weights, write_checkpoint
    from components.model.post_hoc import coefficients, combined

    target = Location.of(model.folder) / "post_hoc" / f"step_{model.steps:09d}-width-{width:g}"
    if is_complete(target):
        return target
    kept = _kept(model)
    if len(kept) < 2:
        raise ConfigError(
            f"evaluate.ema_widths has nothing to be made of: {model.folder} kept {len(kept)} averages of train.ema_widths; "
            "train with train.ema_widths=[0.05,0.1] and train.ema_snapshot_every"
        )
    shares = coefficients([(step, width) for step, width, _, _ in kept], model.steps, width)
    weights = []
    for _, _, folder, name in kept:
        with folder.local_copy([f"{name}.safetensors"]) as copy:
            weights.append(read_weights(copy / f"{name}.safetensors"))
    write_checkpoint(target, read_spec(Location.of(model.path)), combined(weights, shares.tolist()))
    return target


def _kept(model: TrainedModel) -> list[tuple[float, float, Location, str]]:
    """Returns step, width, folder and name of every power-function average up to the end of a training, the last checkpoint's own among them."""
    snapshots = snapshots_folder(Location.of(model.folder))
    places = [(int(name.removeprefix("step_")), snapshots / name) for name in snapshots.folders() if name.startswith("step_") and is_complete(snapshots / name)]
    last = (model.steps, Location.of(model.path))
    chosen = [place for place in sorted(places, key=lambda place: place[0]) if place[0] < model.steps] + [last]
    found = [(float(step), power_average_width(name), folder, name) for step, folder in chosen for name in averages_in(folder)]
    return [(step, width, folder, name) for step, width, folder, name in found if width is not None]
