"""Where a training starts that is told to by `train.init_from`: found, checked and pinned before anything is trained."""

from contextlib import suppress

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.markup import escape

from components.data.shards import read_manifest
from components.diffusion.config import DiffusionConfig
from components.model.manifest import averages_in, manifest_of
from components.model.spec import DenoiserSpec, read_spec
from components.networks.config import NetworkConfig
from components.storage import Location
from pipeline.artifacts import ShardSet
from pipeline.context import StageContext
from pipeline.errors import ConfigError
from pipeline.registry.versions import fetch_checkpoint, find_model
from pipeline.retraining.attempts import Start
from pipeline.tracking import Tracking, translated
from pipeline.training.config import TrainConfig

PIN_FILE = "init_from.json"


class _Pin(BaseModel):
    """What a run's `train.init_from` meant when it was called first: an alias may move, and must not make the run another one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    init_from: str
    weights: str
    start: Start


def find_init(config: TrainConfig, *, folder: Location, tracking: Tracking, storage: Location) -> Start | None:
    """Returns the weights that `train.init_from` means, None where it says nothing; the same at every call of a run.

    Args:
        folder: of the run, where they are noted.

    Raises:
        ConfigError, DataError: if there are none, or not those that are named.
        RegistryError: if the registry does not know the model.
    """
    if config.init_from is None:
        return None
    if (pinned := _pinned(config, folder)) is not None:
        return pinned
    start = _find(config.init_from, config.init_weights, tracking, storage)
    (folder / PIN_FILE).write_text(_Pin(init_from=config.init_from, weights=config.init_weights, start=start).model_dump_json(indent=2) + "\n")
    return start


def _pinned(config: TrainConfig, folder: Location) -> Start | None:
    with suppress(OSError, ValidationError):
        pin = _Pin.model_validate_json((folder / PIN_FILE).read_text())
        if (pin.init_from, pin.weights) == (config.init_from, config.init_weights):
            return pin.start
    return None


def check_init(config: TrainConfig, folder: Location) -> None:
    """Checks that a path in `train.init_from` is one of a model, before anything else is done.

    Args:
        folder: of the run, which may know already what it means.

    Raises:
        ConfigError: if it is not.
    """
    if config.init_from is not None and not config.init_from.startswith("models:/") and _pinned(config, folder) is None:
        _kind_of(config.init_from)


def _find(address: str, weights: str, tracking: Tracking, storage: Location) -> Start:
    if address.startswith("models:/"):
        with translated(tracking.uri):
            version = find_model(tracking, address)
        checkpoint, model = fetch_checkpoint(tracking, address, storage), f"models:/{version.name}/{version.version}"
    else:
        checkpoint, model = _folder(address, storage), address
    files = manifest_of(checkpoint)
    if f"{weights}.safetensors" not in files:
        known = [*averages_in(checkpoint), *(["weights"] if "weights.safetensors" in files else [])]
        raise ConfigError(f"train.init_weights={weights} is not in {address}; use {' or '.join(known)}")
    return Start(model=model, checkpoint=str(checkpoint), weights=weights, sha256=files[f"{weights}.safetensors"][1])


def _folder(address: str, storage: Location) -> Location:
    """Returns the checkpoint folder that a path names, made from a diffusers folder where it is one."""
    folder, is_ours = _kind_of(address)
    if is_ours:
        return folder
    from components.model.diffusers_import import import_diffusers

    return import_diffusers(folder, storage / "cache" / "imported")


def _kind_of(address: str) -> tuple[Location, bool]:
    """Returns the folder, and whether it is a checkpoint of ours; else it is one of diffusers."""
    folder = Location.of(address)
    found = [(folder / name).is_file() for name in ("manifest.json", "config.json", "model_index.json")]
    if any(found):
        return folder, found[0]
    raise ConfigError(
        f"train.init_from={address} is neither a checkpoint folder (manifest.json) nor one of diffusers (model_index.json or config.json); "
        "name one, or models:/NAME@champion"
    )


def check_start(start: Start, model: NetworkConfig, diffusion: DiffusionConfig, config: TrainConfig, shards: ShardSet, context: StageContext) -> None:
    """Checks that given weights fit the network, before any worker starts, and says what of them does not where they need not all.

    Raises:
        DataError: naming the tensors.
    """
    from components.model.checkpoint import read_weights
    from components.model.initialise import initialise

    manifest, name = read_manifest(Location.of(shards.path)), f"{start.weights}.safetensors"
    labels = tuple(manifest.label_names) if model.conditional else ()
    spec = DenoiserSpec(model=model, diffusion=diffusion, space=manifest.space, label_names=labels, num_conditions=config.num_conditions)
    try:
        with Location.of(start.checkpoint).local_copy([name]) as folder:
            fit = initialise(spec.build(), read_weights(folder / name), strict=config.init_strict, where=start.model)
    except FileNotFoundError as error:
        raise ConfigError(f"train.init_from={start.model} is gone from {start.checkpoint}; bring it back, or give the run another --name") from error
    if unlike := _unlike(spec, read_spec(Location.of(start.checkpoint))):
        context.reporter.line(f"  [yellow]note[/] {escape(start.model)} was trained with {escape(', '.join(unlike))}")
    if not fit.is_whole:
        context.reporter.line(f"  [yellow]note[/] {len(fit.fitting)} tensors of {escape(start.model)} are taken; {escape(str(fit))}")


def _unlike(here: DenoiserSpec, there: DenoiserSpec) -> list[str]:
    """Returns the settings of network and process in which two denoisers differ, with the value there and the one here."""
    pairs = (("model", here.model, there.model), ("diffusion", here.diffusion, there.diffusion))
    dumps = [(name, ours.model_dump(mode="json"), theirs.model_dump(mode="json")) for name, ours, theirs in pairs]
    return [
        f"{name}.{key}={theirs[key]} (here {ours.get(key, 'not set')})"
        for name, ours, theirs in dumps
        for key in theirs
        if key not in ("dropout", "checkpointing") and theirs[key] != ours.get(key)
    ]
