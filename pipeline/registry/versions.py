"""What the registry holds: versions by address, their tags, their checkpoints."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from components.storage import Location
from pipeline.artifacts import Metric, MetricUnit, Registration
from pipeline.errors import RegistryError
from pipeline.registry.decide import Champion
from pipeline.tracking import Tracking, translated

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
INPUTS_TAG = "ddpm.inputs"
SAMPLES_TAG, SETTINGS_TAG = "ddpm.samples", "ddpm.evaluate"


def find_version(tracking: Tracking, name: str, inputs: str) -> "ModelVersion | None":
    """Returns the version that was made for these inputs, if there is one."""
    found = [version for version in tracking.client.search_model_versions(f"name='{name}'") if version.tags.get(INPUTS_TAG) == inputs]
    return max(found, key=lambda version: int(version.version), default=None)


def find_champion(tracking: Tracking, name: str) -> Champion | None:
    """Returns the version that the alias `champion` points to."""
    from mlflow.exceptions import MlflowException

    try:
        version = tracking.client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            return None
        raise
    return Champion(int(version.version), read_metric(version.tags), version.tags.get(SAMPLES_TAG))


def read_metric(tags: dict[str, str]) -> Metric | None:
    """Returns the number that a version's tags carry, None where they carry none."""
    try:
        return Metric(value=float(tags["metric.value"]), unit=MetricUnit.model_validate_json(tags["metric.unit"]))
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
    with translated(tracking.uri):
        try:
            if at and alias_of and not (slash and number.isdigit()):
                return tracking.client.get_model_version_by_alias(alias_of, alias)
            return tracking.client.get_model_version(name, number)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise RegistryError(f"{model} is not in the registry ({error.message}); `ddpm models` lists what is") from error
            raise


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

        with translated(tracking.uri), tempfile.TemporaryDirectory(prefix="ddpm-model-") as folder:
            fetched = mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}/artifacts/checkpoint", dst_path=folder)
            kept.upload(Path(fetched), last="manifest.json")
    return kept


def is_intact(receipt: Registration, tracking: Tracking) -> bool:
    """Tells whether the version that a receipt describes is still in the registry."""
    from mlflow.exceptions import MlflowException

    try:
        version = tracking.client.get_model_version(receipt.model_name, str(receipt.version))
    except MlflowException:
        return False
    return version.tags.get(INPUTS_TAG) == receipt.inputs


def list_models(tracking: Tracking, name: str | None) -> list[dict[str, object]]:
    """Returns registered models with their aliases and versions, newest first.

    Raises:
        RegistryError: if a name is given that the registry does not know.
    """
    with translated(tracking.uri):
        models = [model for model in tracking.client.search_registered_models() if name in (None, model.name)]
        if name is not None and not models:
            known = ", ".join(model.name for model in tracking.client.search_registered_models()) or "none yet"
            raise RegistryError(f"model {name} is not in the registry; it has {known}")
        return [{"name": model.name, "aliases": dict(model.aliases), "versions": _list_versions(tracking, model.name, dict(model.aliases))} for model in models]


def _list_versions(tracking: Tracking, name: str, aliases: dict[str, str]) -> list[dict[str, object]]:
    versions = sorted(tracking.client.search_model_versions(f"name='{name}'"), key=lambda version: -int(version.version))
    return [
        {
            "version": int(version.version),
            "aliases": sorted(alias for alias, number in aliases.items() if str(number) == str(version.version)),
            "metric": version.tags.get("metric.name"),
            "value": float(version.tags["metric.value"]) if "metric.value" in version.tags else None,
            "unit": json.loads(version.tags["metric.unit"]) if "metric.unit" in version.tags else None,
            "decision": version.tags.get("ddpm.decision"),
            "dataset": version.tags.get("dataset.digest"),
            "run": version.tags.get("ddpm.run"),
            "run_id": version.run_id,
            "created_ms": version.creation_timestamp,
        }
        for version in versions
    ]
