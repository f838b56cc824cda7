"""`ddpm import`: a diffusers model becomes a version of the registry, measured against images and let to compete."""

from collections.abc import Mapping
from typing import Any

from components.model.diffusers_import import import_diffusers
from components.model.manifest import manifest_of
from components.model.spec import read_spec
from components.storage import Location
from pipeline.artifacts import ShardSet, StageName, TrainedModel
from pipeline.config import RunConfig, config_digest, digest_of, load_config
from pipeline.context import Reporter
from pipeline.errors import ConfigError
from pipeline.preflight import check_storage
from pipeline.run import FixedInputs, StageReport, run
from pipeline.train import is_intact
from pipeline.training.adopt import adopt
from workflows.preset_files import find_preset


def import_model(folder: str, name: str, overrides: list[str], preset: str | None) -> tuple[RunConfig, Mapping[StageName, StageReport]]:
    """Registers the model of a diffusers folder under a name, and returns the settings and the stages' reports.

    Args:
        overrides: settings of data and evaluation; `data.source` says which images it is measured against.
        preset: whose settings they are laid on.

    Raises:
        ConfigError, DataError, ClusterError, RegistryError: like `run`.
    """
    if preset is None and not any(override.startswith("data.source=") for override in overrides):
        raise ConfigError("data.source is not set, and a model is measured against images; add data.source=FOLDER, or --preset PRESET")
    path = None if preset is None else find_preset(preset)
    storage = check_storage(load_config(path, [*overrides, "train.flip=false"], {"data": {}}).cluster.storage)
    checkpoint = import_diffusers(Location.of(folder), storage / "cache" / "imported")
    config = load_config(path, overrides, _fixed(checkpoint, name))
    reporter = Reporter()
    reports = run(config, name, until="preprocess", reporter=reporter)
    shards = reports["preprocess"].receipt
    assert isinstance(shards, ShardSet)
    inputs = digest_of("imported", manifest_of(checkpoint)["ema.safetensors"][1], shards.digest)
    place = storage / "runs" / name / "train" / inputs
    model = _kept(place) or adopt(checkpoint, folder, shards, place, inputs, config_digest(config))
    return config, run(config, name, reporter=reporter, given=FixedInputs(shards, None, model))


def _kept(place: Location) -> TrainedModel | None:
    try:
        receipt = TrainedModel.model_validate_json((place / "receipt.json").read_text())
    except (OSError, ValueError):
        return None
    return receipt if is_intact(receipt) else None


def _fixed(checkpoint: Location, name: str) -> dict[str, dict[str, Any]]:
    """Returns the settings that the model itself decides."""
    spec = read_spec(checkpoint)
    data = spec.space.settings()
    return {
        "data": {key: data[key] for key in ("image_size", "mode")},
        "model": spec.model.model_dump(mode="json"),
        "diffusion": spec.diffusion.model_dump(mode="json"),
        "registry": {"model_name": name},
    }
