"""A checkpoint and its evaluation in, a version in the model registry out; the champion falls only to a better number of the same unit."""

import hashlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import components
from components.storage import Location
from pipeline.artifacts import Contest, Evaluation, Memorisation, Metric, MetricUnit, PairedTest, Registration, ShardSet, TrainedModel
from pipeline.context import StageContext
from pipeline.errors import RegistryError
from pipeline.lease import alone
from pipeline.tracking import Tracking, as_tags, git_commit, public_uri, translated

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
INPUTS_TAG = "ddpm.inputs"
SAMPLES_TAG, SETTINGS_TAG = "ddpm.samples", "ddpm.evaluate"
DESCRIPTION_LIMIT = 5000


class RegistryConfig(BaseModel):
    """The registered model, and when its champion falls."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model_name: str = Field("ddpm", pattern=r"^[A-Za-z0-9._ -]+$")
    """Name in the model registry; by default `ddpm-` and the preset's name."""
    min_gain: float = Field(0.0, ge=0.0)
    """How much lower than the champion's a candidate's metric must be, in the metric's unit."""


@dataclass(frozen=True)
class Decision:
    """Whether the champion falls, and why, in a sentence."""

    promote: bool
    reason: str


@dataclass(frozen=True)
class Champion:
    """The version that the alias points to.

    Attributes:
        metric: its number, if it carries one.
        samples: folder of its samples' features, if it says so.
    """

    version: int
    metric: Metric | None
    samples: str | None = None


Ask = Callable[[Champion], Contest | str]


def unlike_parts(one: MetricUnit, other: MetricUnit) -> list[str]:
    """Returns which parts of two units differ, with both values."""
    first, second = one.model_dump(), other.model_dump()
    return [f"{part} {first[part]} against {second[part]}" for part in first if first[part] != second[part]]


def decide(candidate: Metric, champion: Champion | None, contest: Contest | str | None, min_gain: float, *, copies: bool = False) -> Decision:
    """Promotes a first version, and one that is better by more than chance and `min_gain`, twice; numbers of unlike units are never compared.

    Better means: the difference to the champion on the same seeds plus 1.645 of its standard errors is below -min_gain (one-sided, 95 %),
    and so it is on fresh seeds. A candidate that copies training images takes no champion's place.

    Args:
        contest: the test, or why there is none.
    """
    if champion is None:
        return Decision(True, f"first version: {candidate.name} is {candidate.value:.4g}, and there was no champion")
    refused = why_not_compared(candidate, champion)
    if refused:
        return Decision(False, f"kept: {refused}")
    if copies:
        return Decision(False, f"kept: the candidate copies training images; champion v{champion.version} stays")
    if contest is None or isinstance(contest, str):
        return Decision(False, f"kept: champion v{champion.version} could not be measured beside it{f': {contest}' if contest else ''}")
    numbers = f"{candidate.name} is {contest.test.candidate:.4g}, champion v{champion.version} has {contest.test.champion:.4g} on the same seeds"
    wanted = f"below {-min_gain:g}" if min_gain else "below 0"
    first = f"difference {_interval(contest.test)}"
    if not contest.test.upper < -min_gain:
        return Decision(False, f"kept: {numbers}; {first}: its upper end must be {wanted}")
    if contest.confirmation is None or not contest.confirmation.upper < -min_gain:
        again = "was not confirmed" if contest.confirmation is None else f"on fresh seeds only {_interval(contest.confirmation)}"
        return Decision(False, f"kept: {numbers}; {first}, {again}: the upper end must be {wanted} both times")
    return Decision(True, f"better: {numbers}; {first}, on fresh seeds {_interval(contest.confirmation)}")


def why_not_compared(candidate: Metric, champion: Champion) -> str:
    """Returns why a candidate's number cannot be held against the champion's, nothing where it can."""
    if champion.metric is None:
        return f"champion v{champion.version} carries no metric to compare with; evaluate it, or move the alias by hand"
    unlike = unlike_parts(candidate.unit, champion.metric.unit)
    return f"not comparable with champion v{champion.version}, whose unit differs: {'; '.join(unlike)}" if unlike else ""


def _interval(test: PairedTest) -> str:
    return f"{test.difference:+.4g} ± {1.645 * test.standard_error:.2g} (90 %)"


def register(
    config: RegistryConfig, shards: ShardSet, model: TrainedModel, evaluation: Evaluation, ask: Ask, *, context: StageContext, tracking: Tracking, run_id: str
) -> Registration:
    """Logs the model to its run, makes a version of it, decides about the champion, and returns the receipt.

    A version that an interrupted call already made for the same inputs is taken up again.

    Args:
        ask: measures the candidate beside a champion; called while no other process decides, so that the champion is the one it is told from.

    Raises:
        RegistryError: if the registry cannot be reached or refuses.
    """
    with translated(tracking.uri), _one_at_a_time(context, config.model_name):
        made = find_version(tracking, config.model_name, context.inputs)
        if made is None:
            made = _make_version(config, shards, model, evaluation, context, tracking, run_id)
        number = int(made.version)
        champion = find_champion(tracking, config.model_name)
        if champion is not None and champion.version == number:
            decision, previous, contest = Decision(True, made.tags["ddpm.decision"]), None, None
        else:
            contest = ask(champion) if champion is not None and not why_not_compared(evaluation.metric, champion) else None
            decision = decide(
                evaluation.metric, champion, contest, config.min_gain, copies=evaluation.memorisation is not None and evaluation.memorisation.copies
            )
            previous = champion.version if champion else None
            _carry_out(decision, number, shards, model, evaluation, config.model_name, tracking, run_id)
    return Registration(
        inputs=context.inputs,
        model_name=config.model_name,
        version=number,
        uri=f"models:/{config.model_name}/{number}",
        tracking_uri=public_uri(tracking.uri),
        mlflow_run_id=run_id,
        promoted=decision.promote,
        decision=decision.reason,
        previous_champion=previous,
        metric=evaluation.metric,
        contest=contest if isinstance(contest, Contest) else None,
    )


@contextmanager
def _one_at_a_time(context: StageContext, name: str) -> Iterator[None]:
    """Lets the processes that share a storage root decide one after the other, never both against the same champion."""
    lock = context.storage / "locks" / f"model-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    with alone(lock, context.reporter, f"decides about the champion of {name}"):
        yield


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


def _make_version(
    config: RegistryConfig, shards: ShardSet, model: TrainedModel, evaluation: Evaluation, context: StageContext, tracking: Tracking, run_id: str
) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    client = tracking.client
    try:
        client.get_registered_model(config.model_name)
    except MlflowException:
        client.create_registered_model(config.model_name)
    logged = _log_model(config.model_name, model, evaluation, run_id)
    tags = _version_tags(shards, model, evaluation, context)
    return client.create_model_version(config.model_name, source=f"models:/{logged}", run_id=run_id, tags=tags, model_id=logged)


def _log_model(name: str, model: TrainedModel, evaluation: Evaluation, run_id: str) -> str:
    """Logs a model that carries its own code and weights, without pickle; returns the logged model's id."""
    import mlflow

    from components.model.checkpoint import DenoiserSpec, read_weights, write_checkpoint

    with tempfile.TemporaryDirectory(prefix="ddpm-register-") as staging:
        folder = Path(staging)
        weights = f"{evaluation.weights}.safetensors"
        with Location.of(evaluation.checkpoint).local_copy(["denoiser.json", weights]) as source:
            spec = DenoiserSpec.model_validate_json((source / "denoiser.json").read_text(encoding="utf-8"))
            write_checkpoint(Location.of(folder / "checkpoint"), spec, read_weights(source / weights))
        package = _copy_components(folder)
        code = folder / "sampler.py"
        template = Path(__file__).with_name("served_model.py").read_text(encoding="utf-8")
        code.write_text(template.replace('COMPONENTS = "components"', f'COMPONENTS = "{package.name}"'), encoding="utf-8")
        with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
            # MLflow advises an example of the input; the signature is written out in full instead.
            warnings.simplefilter("ignore", UserWarning)
            logged = mlflow.pyfunc.log_model(
                name=re.sub(r"[ .]", "-", name),
                python_model=str(code),
                artifacts={"checkpoint": str(folder / "checkpoint")},
                code_paths=[str(package)],
                pip_requirements=[
                    f"{package}=={installed_version(package).partition('+')[0]}" for package in ("mlflow", "torch", "numpy", "pillow", "pydantic")
                ],
                signature=_signature(),
                step=evaluation.step,
                model_type="image-generator",
            )
    return str(logged.model_id)


def _copy_components(folder: Path) -> Path:
    """Copies the `components` package under a name made of its content, so that versions never share code by accident."""
    source = Path(components.__file__).parent
    files = sorted(source.rglob("*.py"))
    digest = hashlib.sha256(b"".join(file.relative_to(source).as_posix().encode() + file.read_bytes() for file in files)).hexdigest()[:8]
    target = folder / f"ddpm_components_{digest}"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def _signature() -> object:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    optional = {"steps": DataType.long, "seed": DataType.long, "sampler": DataType.string, "format": DataType.string}
    columns: list[ColSpec | TensorSpec] = [ColSpec(DataType.long, "num_images"), *(ColSpec(kind, name, required=False) for name, kind in optional.items())]
    return ModelSignature(inputs=Schema(columns))


def _version_tags(shards: ShardSet, model: TrainedModel, evaluation: Evaluation, context: StageContext) -> dict[str, str]:
    metric = evaluation.metric
    return as_tags(
        {
            INPUTS_TAG: context.inputs,
            SAMPLES_TAG: evaluation.samples,
            SETTINGS_TAG: json.dumps(evaluation.settings),
            "ddpm.run": context.run_name,
            "metric.name": metric.name,
            "metric.value": repr(metric.value),
            "metric.unit": metric.unit.model_dump_json(),
            "metric.extractor": metric.unit.extractor,
            "metric.num_samples": metric.unit.num_samples,
            "dataset.digest": shards.digest,
            "dataset.source": shards.source,
            "config.digest": model.config_digest,
            "weights.sha256": evaluation.weights_sha256,
            "weights.average": evaluation.weights,
            "weights.checkpoint": evaluation.checkpoint,
            "weights.election": "; ".join(f"{standing.step} {standing.weights} {standing.metric.value:.6g}" for standing in evaluation.election) or "none",
            "git.commit": git_commit(),
        }
    )


def _carry_out(
    decision: Decision, number: int, shards: ShardSet, model: TrainedModel, evaluation: Evaluation, name: str, tracking: Tracking, run_id: str
) -> None:
    """Writes the reason and the description, then moves the alias."""
    client = tracking.client
    client.set_model_version_tag(name, str(number), "ddpm.decision", decision.reason[:DESCRIPTION_LIMIT])
    description = describe(decision, number, shards, model, evaluation, name, tracking.uri, run_id)
    client.update_model_version(name, str(number), description[:DESCRIPTION_LIMIT])
    tracking.note(run_id, description)
    if decision.promote:
        client.set_registered_model_alias(name, CHAMPION, str(number))
        client.update_registered_model(name, description[:DESCRIPTION_LIMIT])


def describe(decision: Decision, number: int, shards: ShardSet, model: TrainedModel, evaluation: Evaluation, name: str, uri: str, run_id: str) -> str:
    """Returns a version's page in Markdown: number, picture, data, recipe, how to load it."""
    metric, unit = evaluation.metric, evaluation.metric.unit
    guards = "".join(f"| {guard.name} | {guard.value:.4g} |\n" for guard in evaluation.guards)
    error = "" if metric.standard_error is None else f" ± {1.96 * metric.standard_error:.2g}"
    floor, copies = evaluation.floor, evaluation.memorisation
    real = "" if floor is None else f"| real images | {floor.value:.4g}: {floor.count} {floor.measured} |\n"
    memory = "" if copies is None else f"| memorisation | {_memory(copies)} |\n"
    return f"""{metric.name} {metric.value:.4g} - {decision.reason}

![samples](get-artifact?run_id={run_id}&path=evaluate%2Fgrid.png)

| | |
|---|---|
| {metric.name} | {metric.value:.4g}{error} (Frechet distance, lower is better) |
{guards}{real}{memory}| samples | {unit.num_samples}, {unit.sampler}, seeds from {unit.first_seed} |
| reference | dataset {unit.reference_digest}, {unit.reference_count} images |
| data | {shards.source}: {shards.num_rows} images of {shards.image_size}x{shards.image_size}x{shards.channels}, {shards.num_quarantined} quarantined |
| training | {evaluation.step} steps, loss {model.loss:.4g}, {model.parameters / 1e6:.2f} M parameters, {model.precision} |
| hardware | {model.num_workers} x {model.device}, {model.images_per_second:.0f} images/s |
| config | {model.config_digest} |

```python
import mlflow
mlflow.set_tracking_uri("{public_uri(uri)}")
images = mlflow.pyfunc.load_model("models:/{name}/{number}").predict({{"num_images": 16, "steps": 50, "seed": 0}})
```
"""


def _memory(copies: Memorisation) -> str:
    return f"{copies.verdict}: copy rate {copies.copy_rate:.2%}, about {copies.expected:.0%} expected"


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
