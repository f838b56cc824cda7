"""What a person or a script asks the registry: lists, one version's facts, and what sets versions apart."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from pipeline.artifacts import Metric
from pipeline.errors import RegistryError
from pipeline.registry.decide import unlike_parts
from pipeline.registry.ledger import LEDGER_TAG, Ledger
from pipeline.registry.move import Move
from pipeline.registry.versions import DECISION_TAG, all_versions, read_metric
from pipeline.tracking import Tracking, translated

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel


class VersionFacts(BaseModel):
    """A version, as its tags and its run tell of it."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: int
    aliases: tuple[str, ...]
    metric: Metric | None
    decision: str | None
    tags: dict[str, str]
    run: str | None
    run_id: str | None
    created_ms: int
    settings: dict[str, str]
    """The run's parameters; empty where they were not asked for, or the run is gone."""

    @property
    def label(self) -> str:
        """How a person calls it."""
        return f"v{self.version}{f' ({chr(44).join(self.aliases)})' if self.aliases else ''}"

    def to_json(self) -> dict[str, object]:
        """Returns what a script needs; `metric`, `value`, `unit` and `standard_error` are those of the number that decides."""
        metric = self.metric
        return {
            "version": self.version,
            "aliases": list(self.aliases),
            "metric": metric.name if metric else self.tags.get("metric.name"),
            "value": metric.value if metric else None,
            "standard_error": metric.standard_error if metric else None,
            "unit": metric.unit.model_dump(mode="json") if metric else None,
            "decision": self.decision,
            "dataset": self.tags.get("dataset.digest"),
            "run": self.run,
            "run_id": self.run_id,
            "created_ms": self.created_ms,
        }


class VersionDiff(BaseModel):
    """What sets versions of one model apart.

    Attributes:
        unlike: parts of the unit in which each differs from the first; empty where the numbers may be compared.
        settings: values by setting, one for each version, of those that differ.
    """

    model_config = ConfigDict(frozen=True)

    versions: tuple[VersionFacts, ...]
    unlike: tuple[tuple[str, ...], ...]
    settings: dict[str, tuple[str, ...]]


def list_models(tracking: Tracking, name: str | None) -> dict[str, list[VersionFacts]]:
    """Returns the versions of registered models, newest first, by model.

    Raises:
        RegistryError: if a name is given that the registry does not know.
    """
    with translated(tracking.uri):
        models = {model.name: dict(model.aliases) for model in _all_models(tracking)}
        if name is not None and name not in models:
            raise RegistryError(f"model {name} is not in the registry; it has {', '.join(models) or 'none yet'}")
        return {model: _versions(tracking, model, models[model]) for model in models if name in (None, model)}


def _all_models(tracking: Tracking) -> Iterator["RegisteredModel"]:
    """Yields every registered model; MLflow answers a hundred at a time."""
    page = tracking.client.search_registered_models()
    yield from page
    while page.token:
        page = tracking.client.search_registered_models(page_token=page.token)
        yield from page


def _versions(tracking: Tracking, name: str, aliases: Mapping[str, object]) -> list[VersionFacts]:
    versions = sorted(all_versions(tracking, name), key=lambda version: -int(version.version))
    return [_facts(version, aliases, {}) for version in versions]


def facts_of(tracking: Tracking, version: "ModelVersion") -> VersionFacts:
    """Returns a version's facts, the settings of its run among them."""
    from mlflow.exceptions import MlflowException

    with translated(tracking.uri):
        aliases = dict(tracking.client.get_registered_model(version.name).aliases)
        try:
            settings = tracking.client.get_run(version.run_id).data.params if version.run_id else {}
        except MlflowException:
            settings = {}
        return _facts(version, aliases, {key: value for key, value in settings.items() if not key.startswith(LEDGER_TAG)})


def _facts(version: "ModelVersion", aliases: Mapping[str, object], settings: dict[str, str]) -> VersionFacts:
    return VersionFacts(
        name=str(version.name),
        version=int(version.version),
        aliases=tuple(sorted(alias for alias, number in aliases.items() if str(number) == str(version.version))),
        metric=read_metric(version.tags),
        decision=version.tags.get(DECISION_TAG),
        tags=dict(version.tags),
        run=version.tags.get("ddpm.run"),
        run_id=version.run_id,
        created_ms=int(version.creation_timestamp or 0),
        settings=settings,
    )


def contrast(versions: Sequence[VersionFacts]) -> VersionDiff:
    """Returns in what versions differ: unit and settings."""
    first = versions[0].metric
    unlike = tuple(tuple(unlike_parts(version.metric.unit, first.unit)) if version.metric and first else () for version in versions)
    keys = sorted({key for version in versions for key in version.settings})
    values = {key: tuple(version.settings.get(key, "") for version in versions) for key in keys}
    return VersionDiff(versions=tuple(versions), unlike=unlike, settings={key: each for key, each in values.items() if len(set(each)) > 1})


def log_of(tracking: Tracking, name: str) -> list[Move]:
    """Returns the log of a model's moves, oldest first; reading it changes nothing.

    Raises:
        RegistryError: if the registry does not know the model.
    """
    list_models(tracking, name)
    with translated(tracking.uri):
        ledger = Ledger.find(tracking, name)
        return ledger.moves() if ledger else []


def to_json(models: Mapping[str, Sequence[VersionFacts]]) -> str:
    """Returns lists of versions as JSON."""
    return json.dumps(
        [
            {
                "name": name,
                "aliases": {alias: str(version.version) for version in versions for alias in version.aliases},
                "versions": [version.to_json() for version in versions],
            }
            for name, versions in models.items()
        ],
        indent=2,
    )
