"""What the registry holds: versions by address, their tags, their checkpoints."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from components.names import is_plain
from components.scratch import scratch
from components.storage import Location
from pipeline.artifacts import Metric, MetricUnit, Registration
from pipeline.errors import RegistryError
from pipeline.registry.decide import Champion
from pipeline.tracking import NOT_THERE, Tracking, translated

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS, CANDIDATE = "champion", "previous", "candidate"
INPUTS_TAG = "ddpm.inputs"
MOST_DIGITS = 9
SAMPLES_TAG, SETTINGS_TAG, DECISION_TAG, GAIN_TAG = "ddpm.samples", "ddpm.evaluate", "ddpm.decision", "registry.min_gain"


def all_versions(tracking: Tracking, name: str) -> "list[ModelVersion]":
    """Returns a registered model's versions, in no order; of a name that holds quotes of both kinds or line breaks, which no search finds, none."""
    if ("'" in name and '"' in name) or not is_plain(name):
        return []
    quote = '"' if "'" in name else "'"
    return list(tracking.client.search_model_versions(f"name={quote}{name}{quote}"))


def newest_version(tracking: Tracking, name: str) -> int | None:
    """Returns the number of a registered model's newest version, None where it has none."""
    return max((int(version.version) for version in all_versions(tracking, name)), default=None)


def find_version(tracking: Tracking, name: str, inputs: str) -> "ModelVersion | None":
    """Returns the version that was made for these inputs, if there is one."""
    found = [version for version in all_versions(tracking, name) if version.tags.get(INPUTS_TAG) == inputs]
    return max(found, key=lambda version: int(version.version), default=None)


def alias_of(tracking: Tracking, name: str, alias: str) -> int | None:
    """Returns the version that an alias points to, None where there is no such alias."""
    from mlflow.exceptions import MlflowException

    try:
        return int(tracking.client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in NOT_THERE:
            return None
        raise


def set_alias(tracking: Tracking, name: str, alias: str, version: int) -> None:
    """Points an alias to a version."""
    tracking.client.set_registered_model_alias(name, alias, str(version))


def champion_of_other_images(tracking: Tracking, name: str, source: str, digest: str) -> "ModelVersion | None":
    """Returns the version that a candidate of a model would be measured against, if it was trained on images of another source; None otherwise.

    Args:
        source, digest: of the candidate's dataset.
    """
    number = alias_of(tracking, name, CHAMPION) or newest_version(tracking, name)
    if number is None or not has_version(tracking, name, number):
        return None
    rival = tracking.client.get_model_version(name, str(number))
    return rival if rival.tags.get("dataset.source", source) != source and rival.tags.get("dataset.digest") != digest else None


def has_version(tracking: Tracking, name: str, version: int) -> bool:
    """Tells whether a version is in the registry."""
    from mlflow.exceptions import MlflowException

    try:
        return tracking.client.get_model_version(name, str(version)).current_stage != "Deleted_Internal"
    except MlflowException as error:
        if error.error_code in NOT_THERE:
            return False
        raise


def read_champion(tracking: Tracking, name: str, version: int) -> Champion:
    """Returns what a champion's tags say of it."""
    tags = tracking.client.get_model_version(name, str(version)).tags
    return Champion(version, read_metric(tags), tags.get(SAMPLES_TAG))


def read_metric(tags: dict[str, str]) -> Metric | None:
    """Returns the number that a version's tags carry, None where they carry none."""
    try:
        error = tags.get("metric.standard_error", "None")
        unit = MetricUnit.model_validate_json(tags["metric.unit"])
        return Metric(value=float(tags["metric.value"]), unit=unit, standard_error=None if error == "None" else float(error))
    except (KeyError, ValueError, ValidationError):
        return None


def find_model(tracking: Tracking, model: str) -> "ModelVersion":
    """Returns the version that models:/NAME/VERSION or models:/NAME@ALIAS means.

    Raises:
        RegistryError: if there is none.
    """
    from mlflow.exceptions import MlflowException

    address = model.removeprefix("models:/").rstrip("/")
    name, slash, number = address.rpartition("/")
    alias_of, at, alias = address.rpartition("@")
    if not (model.startswith("models:/") and ((slash and number.isdigit()) or (at and alias_of and alias))):
        raise RegistryError(f"{model} names no version; write models:/NAME/VERSION or models:/NAME@ALIAS")
    if (slash and number.isdigit() and len(number) > MOST_DIGITS) or not is_plain(address):
        raise RegistryError(f"{model} is not in the registry; `ddpm models` lists what is")
    with translated(tracking.uri):
        try:
            if at and alias_of and not (slash and number.isdigit()):
                return tracking.client.get_model_version_by_alias(alias_of, alias)
            return tracking.client.get_model_version(name, number)
        except MlflowException as error:
            if error.error_code in NOT_THERE:
                reason = " ".join(str(error.message).split())
                raise RegistryError(f"{model} is not in the registry ({reason}); `ddpm models` lists what is") from error
            raise


def resolve(tracking: Tracking, model: str, alias: str) -> "ModelVersion":
    """Returns the version that NAME/VERSION, NAME@ALIAS, or a NAME alone means, with or without models:/ before it.

    Args:
        alias: what a name alone means.

    Raises:
        RegistryError: if there is none.
    """
    address = model.removeprefix("models:/").rstrip("/")
    is_complete = "@" in address or (address.rpartition("/")[2].isdigit() and "/" in address)
    if is_complete:
        return find_model(tracking, f"models:/{address}")
    if alias == CANDIDATE and alias_of(tracking, address, alias) is None and (newest := newest_version(tracking, address)) is not None:
        return find_model(tracking, f"models:/{address}/{newest}")  # a model whose versions are older than the alias
    return find_model(tracking, f"models:/{address}@{alias}")


def fetch_checkpoint(tracking: Tracking, model: str, storage: Location) -> Location:
    """Returns a registered model's checkpoint, copied below the storage root the first time, where every node can read it.

    Args:
        model: models:/NAME/VERSION or models:/NAME@ALIAS.

    Raises:
        RegistryError: if the registry does not know the model, or it is none of ours.
    """
    version = find_model(tracking, model)
    name = hashlib.sha256(str(version.name).encode()).hexdigest()[:12]
    kept = storage / "cache" / "models" / f"{name}-{version.version}-{str(version.tags.get('weights.sha256'))[:16]}"
    if not (kept / "manifest.json").is_file():
        import mlflow

        with translated(tracking.uri), scratch("model") as folder:
            fetched = mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}/artifacts/checkpoint", dst_path=str(folder))
            kept.upload(Path(fetched), last="manifest.json")
    return kept


def is_intact(receipt: Registration, tracking: Tracking) -> bool:
    """Tells whether the version that a receipt describes is still in the registry.

    Raises:
        RegistryError: if the registry does not say.
    """
    from mlflow.exceptions import MlflowException

    with translated(tracking.uri):
        try:
            version = tracking.client.get_model_version(receipt.model_name, str(receipt.version))
        except MlflowException as error:
            if error.error_code in NOT_THERE:
                return False
            raise
    return version.tags.get(INPUTS_TAG) == receipt.inputs
