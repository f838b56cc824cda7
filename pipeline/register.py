"""A checkpoint and its evaluation in, a version in the model registry out; the champion falls only to a better number of the same unit."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, field_validator

from components.names import why_no_model_name
from pipeline.artifacts import ChampionTest, Evaluation, Metric, Registration, ShardSet, TrainedModel
from pipeline.context import StageContext
from pipeline.lease import alone
from pipeline.registry.decide import Ask, Decision, decide, why_not_compared
from pipeline.registry.gate import pass_gate
from pipeline.registry.ledger import Ledger
from pipeline.registry.move import Move
from pipeline.registry.package import log_model
from pipeline.registry.page import Address, Made, version_page
from pipeline.registry.versions import (
    CANDIDATE,
    DECISION_TAG,
    GAIN_TAG,
    INPUTS_TAG,
    SAMPLES_TAG,
    SETTINGS_TAG,
    alias_of,
    find_version,
    read_champion,
    set_alias,
)
from pipeline.tracking import Tracking, as_tags, git_commit, public_uri, translated, ui_fragment

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


class RegistryConfig(BaseModel):
    """The registered model, and when its champion falls."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model_name: str = "ddpm"
    """Name in the model registry, in which runs compete; by default `ddpm-` and the preset's name, or that of `data.source` where another one is given."""
    min_gain: float = Field(0.0, ge=0.0)
    """How much lower than the champion's a candidate's metric must be, in the metric's unit."""

    @field_validator("model_name")
    @classmethod
    def _holdable(cls, name: str) -> str:
        if wrong := why_no_model_name(name):
            raise ValueError(f"{name!r} {wrong} (where it is not set, it follows from the preset's file name)")
        return name


def register(
    config: RegistryConfig,
    shards: ShardSet,
    model: TrainedModel,
    evaluation: Evaluation,
    ask: Ask,
    *,
    context: StageContext,
    tracking: Tracking,
    run_id: str,
    equal_terms: bool = False,
) -> Registration:
    """Logs the model to its run, makes a version of it, decides about the champion, and returns the receipt.

    A version that an interrupted call already made for the same inputs is taken up again, and so is a decision.

    Args:
        ask: measures the candidate beside a champion. Where another process decides meanwhile, it is asked again about the champion that there is then.
        equal_terms: a champion that was measured in another unit is measured anew in the candidate's, instead of being incomparable.

    Raises:
        RegistryError: if the registry cannot be reached or refuses.
    """
    name, made = config.model_name, Made(shards, model, evaluation, context.run_name)
    with translated(tracking.uri), _one_at_a_time(context, name):
        version = find_version(tracking, name, context.inputs) or _make_version(config, made, context, tracking, run_id)
        number = int(version.version)
        _name_candidate(tracking, name, number)
        ledger = Ledger.of(tracking, name)
        move = pass_gate(ledger, number, lambda champion: _judge(config, evaluation, champion, ask, tracking, equal_terms), context.reporter)
        _report(made, move, _address(tracking, name, number, run_id), tracking)
        ledger.settle()
        ledger.show()
    promoted = move.kind == "promoted"
    return Registration(
        inputs=context.inputs,
        model_name=name,
        version=number,
        uri=f"models:/{name}/{number}",
        tracking_uri=public_uri(tracking.uri),
        mlflow_run_id=run_id,
        promoted=promoted,
        decision=move.why,
        previous_champion=move.previous if promoted else move.champion,
        metric=evaluation.metric,
        champion_test=move.champion_test,
    )


def _judge(
    config: RegistryConfig, evaluation: Evaluation, number: int | None, ask: Ask, tracking: Tracking, equal_terms: bool
) -> tuple[Decision, ChampionTest | None]:
    """Returns the decision about a candidate beside a champion, and the test that it was made by."""
    metric, champion_test = evaluation.metric, None
    champion = None if number is None else read_champion(tracking, config.model_name, number)
    if champion is not None and (equal_terms or not why_not_compared(metric, champion)):
        champion_test = ask(champion)
        if equal_terms and isinstance(champion_test, ChampionTest):
            champion = replace(champion, metric=Metric(value=champion_test.test.champion, unit=metric.unit))
    copies = evaluation.memorisation is not None and evaluation.memorisation.copies
    decision = decide(metric, champion, champion_test, config.min_gain, copies=copies)
    return decision, champion_test if isinstance(champion_test, ChampionTest) else None


@contextmanager
def _one_at_a_time(context: StageContext, name: str) -> Iterator[None]:
    """Lets the processes that share a storage root decide one after the other, never both against the same champion."""
    lock = context.storage / "locks" / f"model-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    with alone(lock, context.reporter, f"decides about the champion of {name}"):
        yield


def _make_version(config: RegistryConfig, made: Made, context: StageContext, tracking: Tracking, run_id: str) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    client = tracking.client
    try:
        client.get_registered_model(config.model_name)
    except MlflowException:
        _create_model(config.model_name, tracking)
    with context.reporter.part("sending the model to MLflow"):
        logged = log_model(config.model_name, made.model, made.evaluation, run_id)
    numbers = {metric.name: metric.value for metric in (made.evaluation.metric, *made.evaluation.guards)}
    tracking.log_model_metrics(run_id, logged, made.evaluation.step, numbers, dataset=made.shards.name, digest=made.shards.digest)
    tags = _version_tags(made, context) | {GAIN_TAG: repr(config.min_gain)}
    version = client.create_model_version(config.model_name, source=f"models:/{logged}", run_id=run_id, tags=tags, model_id=logged)
    client.set_logged_model_tags(logged, {"mlflow.modelVersions": json.dumps([{"name": config.model_name, "version": int(version.version)}])})
    return version


def _create_model(name: str, tracking: Tracking) -> None:
    from mlflow.exceptions import MlflowException

    try:
        tracking.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # two first runs at once
            raise


def _name_candidate(tracking: Tracking, name: str, number: int) -> None:
    """Points the alias `candidate` to the newest version."""
    if number >= (alias_of(tracking, name, CANDIDATE) or 0):
        set_alias(tracking, name, CANDIDATE, number)


def _version_tags(made: Made, context: StageContext) -> dict[str, str]:
    shards, evaluation = made.shards, made.evaluation
    metric, copies = evaluation.metric, evaluation.memorisation
    return as_tags(
        {
            "ddpm.run": context.run_name,
            "metric.name": metric.name,
            "metric.value": repr(metric.value),
            "metric.standard_error": repr(metric.standard_error),
            "metric.unit": metric.unit.model_dump_json(),
            "metric.extractor": metric.unit.extractor,
            "metric.num_samples": metric.unit.num_samples,
            "dataset.digest": shards.digest,
            "dataset.source": shards.source,
            "dataset.rows": shards.num_rows,
            "dataset.quarantined": shards.num_quarantined,
            "config.digest": made.model.config_digest,
            "weights.sha256": evaluation.weights_sha256,
            "weights.average": evaluation.weights,
            "weights.start": made.model.start or "fresh",
            "weights.checkpoint": evaluation.checkpoint,
            "weights.election": "; ".join(f"{standing.step} {standing.weights} {standing.metric.value:.6g}" for standing in evaluation.election) or "none",
            "memorisation.copies": "unknown" if copies is None else copies.copies,
            "memorisation.verdict": "not measured" if copies is None else copies.verdict,
            "git.commit": git_commit(),
            INPUTS_TAG: context.inputs,
            SAMPLES_TAG: evaluation.samples,
            SETTINGS_TAG: json.dumps(evaluation.settings),
        }
    )


def _address(tracking: Tracking, name: str, number: int, run_id: str) -> Address:
    experiment = tracking.client.get_run(run_id).info.experiment_id
    return Address(public_uri(tracking.uri), name, number, experiment, run_id)


def _report(made: Made, move: Move, address: Address, tracking: Tracking) -> None:
    """Writes the reason and the description to the version, and where the version is to the run."""
    client, page = tracking.client, version_page(made, move, address)
    tags = {DECISION_TAG: move.why}
    if move.champion_test is not None:
        test = move.champion_test.test
        tags |= {"champion.version": str(move.champion_test.champion_version), "champion.value": repr(test.champion)}
        tags |= {"champion.difference": repr(test.difference), "champion.difference_standard_error": repr(test.standard_error)}
    for key, value in as_tags(tags).items():
        client.set_model_version_tag(address.name, str(address.version), key, value)
    client.update_model_version(address.name, str(address.version), page)
    link = ui_fragment(f"models/{quote(address.name)}/versions/{address.version}")
    tracking.note(address.run_id, f"[{address.name} version {address.version}]({link}): {page}")
    client.set_tag(address.run_id, "ddpm.version", f"models:/{address.name}/{address.version}")
