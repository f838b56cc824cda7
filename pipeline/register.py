"""A checkpoint and its evaluation in, a version in the model registry out; the champion falls only to a better number of the same unit."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from pipeline.artifacts import Contest, Evaluation, Registration, ShardSet, TrainedModel
from pipeline.context import StageContext
from pipeline.lease import alone
from pipeline.registry.decide import Ask, Decision, decide, why_not_compared
from pipeline.registry.package import log_model
from pipeline.registry.page import describe
from pipeline.registry.versions import CHAMPION, INPUTS_TAG, SAMPLES_TAG, SETTINGS_TAG, find_champion, find_version
from pipeline.tracking import Tracking, as_tags, git_commit, public_uri, translated

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

DESCRIPTION_LIMIT = 5000


class RegistryConfig(BaseModel):
    """The registered model, and when its champion falls."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model_name: str = Field("ddpm", pattern=r"^[A-Za-z0-9._ -]+$")
    """Name in the model registry; by default `ddpm-` and the preset's name."""
    min_gain: float = Field(0.0, ge=0.0)
    """How much lower than the champion's a candidate's metric must be, in the metric's unit."""


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


def _make_version(
    config: RegistryConfig, shards: ShardSet, model: TrainedModel, evaluation: Evaluation, context: StageContext, tracking: Tracking, run_id: str
) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    client = tracking.client
    try:
        client.get_registered_model(config.model_name)
    except MlflowException:
        client.create_registered_model(config.model_name)
    logged = log_model(config.model_name, model, evaluation, run_id)
    tags = _version_tags(shards, model, evaluation, context)
    return client.create_model_version(config.model_name, source=f"models:/{logged}", run_id=run_id, tags=tags, model_id=logged)


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
