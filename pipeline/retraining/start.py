"""Where a retraining starts: the champion's weights, checked before anything is trained."""

from components.data.shards import read_manifest
from components.diffusion.config import DiffusionConfig
from components.errors import DataError
from components.model.manifest import manifest_of
from components.model.spec import read_spec
from components.networks.config import NetworkConfig
from components.storage import Location
from pipeline.artifacts import ShardSet
from pipeline.errors import ConfigError, RegistryError
from pipeline.registry.versions import CHAMPION, alias_of, fetch_checkpoint, find_model
from pipeline.retraining.attempts import Start
from pipeline.retraining.config import Policy
from pipeline.tracking import Tracking, translated

CHECKPOINT_TAG = "weights.checkpoint"


def find_start(
    policy: Policy, model_name: str, model: NetworkConfig, diffusion: DiffusionConfig, shards: ShardSet, *, tracking: Tracking, storage: Location
) -> Start | None:
    """Returns the weights that the policy means, None for fresh ones: by policy, or because there is no champion.

    Raises:
        ConfigError: if they are gone, or belong to another network or process.
        DataError: if the champion's checkpoint is not whole.
    """
    with translated(tracking.uri):
        number = None if policy == "scratch" else alias_of(tracking, model_name, CHAMPION)
    if number is None:
        return None
    address = f"models:/{model_name}/{number}"
    checkpoint, weights = _weights(policy, address, tracking, storage)
    _check_same(checkpoint, address, model, diffusion, shards)
    sha256 = manifest_of(checkpoint)[f"{weights}.safetensors"][1]
    return Start(model=address, checkpoint=str(checkpoint), weights=weights, sha256=sha256)


def restored(start: Start, *, tracking: Tracking, storage: Location) -> bool:
    """Makes the weights of an open attempt be there again, where the registry still has them; tells whether they are."""
    try:
        manifest_of(Location.of(start.checkpoint))
    except DataError:
        if start.weights != "ema":
            return False
        try:
            return str(fetch_checkpoint(tracking, start.model, storage)) == start.checkpoint
        except RegistryError:
            return False
    return True


def _weights(policy: Policy, address: str, tracking: Tracking, storage: Location) -> tuple[Location, str]:
    """Returns the checkpoint folder and which of its weights: the registered average, or the last weights of the training."""
    if policy == "champion_ema":
        return fetch_checkpoint(tracking, address, storage), "ema"
    checkpoint = Location.of(str(find_model(tracking, address).tags.get(CHECKPOINT_TAG, "")))
    try:
        manifest_of(checkpoint)
    except DataError as error:
        raise ConfigError(
            f"retrain.start={policy} needs the training checkpoint of {address}, and {checkpoint} is gone; use retrain.start=champion_ema"
        ) from error
    return checkpoint, "weights"


def _check_same(checkpoint: Location, address: str, model: NetworkConfig, diffusion: DiffusionConfig, shards: ShardSet) -> None:
    spec = read_spec(checkpoint)
    unlike = [
        f"{section}.{key} {value} here, {theirs[key]} there"
        for section, ours, other in (("model", model, spec.model), ("diffusion", diffusion, spec.diffusion))
        for theirs in (other.model_dump(mode="json"),)
        for key, value in ours.model_dump(mode="json").items()
        if theirs[key] != value
    ]
    space = read_manifest(Location.of(shards.path)).space
    seen = spec.space.seen
    if (seen.kind, seen.shape) != (space.kind, space.shape):
        unlike.append(f"{space.description} here, {seen.description} there")
    labels = tuple(read_manifest(Location.of(shards.path)).label_names) if model.conditional else ()
    if model.conditional and labels != spec.label_names:
        unlike.append(f"labels {', '.join(sorted(set(labels) ^ set(spec.label_names)))} on one side only")
    if unlike:
        raise ConfigError(f"retrain.start cannot be the champion {address}: {'; '.join(unlike)}; use retrain.start=scratch once")
