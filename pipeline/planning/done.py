"""What there is of a run already, as its next call would find it."""

from dataclasses import dataclass

from components.model.manifest import is_complete
from components.model.retention import checkpoint_step, checkpoints
from components.storage import Location
from pipeline import encode as encode_stage
from pipeline import evaluate as evaluate_stage
from pipeline import preprocess as preprocess_stage
from pipeline import train as train_stage
from pipeline.artifacts import Evaluation, Receipt, Registration, ShardSet, StageName, TrainedModel
from pipeline.config import RunConfig, digest_of
from pipeline.context import Reporter
from pipeline.preprocess import ListedSource
from pipeline.registry.versions import is_intact as registered_intact
from pipeline.run import (
    Pipeline,
    autoencoder_of,
    encoded_space,
    evaluate_inputs,
    preprocess_inputs,
    register_inputs,
    start_of,
    train_inputs,
    why_other_steps,
)
from pipeline.tracking import Tracking
from pipeline.training.perceptual import perceptual_digest


@dataclass(frozen=True)
class Done:
    """What there is of a run already.

    Attributes:
        receipts: of the stages that would be skipped.
        steps: of training, by a checkpoint that it would go on from.
    """

    receipts: dict[StageName, Receipt]
    steps: int = 0


def done_so_far(config: RunConfig, name: str, listed: ListedSource, storage: Location, tracking: Tracking | None, autoencoder: str | None) -> Done:
    """Returns what a call of `run` would find done, without doing anything.

    Args:
        tracking: None where there is no store yet, which knows nothing then.
        autoencoder: where the one lies that the run encodes by; None where there is none, or none yet.
    """
    pipeline = Pipeline(config, name, None, Reporter(), storage, {}, listed, autoencoder_address=autoencoder)
    receipts: dict[StageName, Receipt] = {}
    shards = pipeline.stored("preprocess", ShardSet, preprocess_inputs(config, listed), preprocess_stage.is_intact)
    if shards is not None:
        receipts["preprocess"] = shards
    if shards is None or tracking is None or not _is_encoded(pipeline, shards, tracking, receipts):
        return Done(receipts)
    return Done(receipts, _trained(pipeline, shards, tracking, receipts))


def _is_encoded(pipeline: Pipeline, shards: ShardSet, tracking: Tracking, receipts: dict[StageName, Receipt]) -> bool:
    """Notes the latents, and tells whether nothing is left to encode."""
    if pipeline.config.data.autoencoder is None:
        return True
    if pipeline.autoencoder_address is None:
        return False
    pipeline.autoencoder = autoencoder_of(pipeline, tracking)
    inputs = digest_of(shards.digest, encoded_space(pipeline, shards).definition())
    pipeline.latents = pipeline.stored("encode", ShardSet, inputs, encode_stage.is_intact)
    if pipeline.latents is not None:
        receipts["encode"] = pipeline.latents
    return pipeline.latents is not None


def _trained(pipeline: Pipeline, shards: ShardSet, tracking: Tracking, receipts: dict[StageName, Receipt]) -> int:
    """Notes the training and what follows on it, and returns the steps that are done."""
    train = pipeline.config.train
    pipeline.start, pipeline.perceptual = start_of(pipeline, tracking), perceptual_digest(train)
    inputs = train_inputs(pipeline, shards)
    model = pipeline.stored("train", TrainedModel, inputs, train_stage.is_intact, why_other_steps(train.steps))
    if model is None:
        newest = next(filter(is_complete, checkpoints(pipeline.context("train", inputs).folder)), None)
        return 0 if newest is None else min(checkpoint_step(newest), train.steps)
    receipts["train"] = model
    evaluation = pipeline.stored("evaluate", Evaluation, evaluate_inputs(pipeline, model, shards), evaluate_stage.is_intact)
    if evaluation is not None:
        receipts["evaluate"] = evaluation
        inputs = register_inputs(pipeline, evaluation, tracking)
        registered = pipeline.stored("register", Registration, inputs, lambda found: registered_intact(found, tracking))
        if registered is not None:
            receipts["register"] = registered
    return train.steps
