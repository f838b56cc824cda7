"""The stages in a row. A stage whose receipt already matches its inputs is not run again."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.markup import escape

from cluster.metrics import RunMetrics
from components.autoencoder.store import AutoencoderFiles
from components.errors import DataError
from components.spaces.latents import LatentSpace
from components.storage import Location
from pipeline import encode as encode_stage
from pipeline import evaluate as evaluate_stage
from pipeline import preprocess as preprocess_stage
from pipeline import register as register_stage
from pipeline import train as train_stage
from pipeline.artifacts import STAGES, AnyReceipt, ChampionTest, Evaluation, Receipt, Registration, ShardSet, StageName, TrainedModel
from pipeline.autoencoder import PRESET, check_network, check_start, resolve_autoencoder
from pipeline.config import RunConfig, config_digest, digest_of, flat, flat_result_fields, model_name_of, result_fields
from pipeline.context import Reporter, StageContext
from pipeline.errors import ConfigError, RegistryError
from pipeline.measurement.extractors import check_extractor
from pipeline.measurement.paired_test import Rival, compare_with_champion
from pipeline.planning.history import as_tags, speeds_of_run
from pipeline.planning.records import note_actual
from pipeline.preflight import LISTING, preflight
from pipeline.registry.decide import Champion
from pipeline.registry.versions import champion_of_other_images, fetch_checkpoint
from pipeline.registry.versions import is_intact as registered_intact
from pipeline.retraining.attempts import Start
from pipeline.tracked_run import TrackedRun
from pipeline.tracking import Tracking, public_uri, translated
from pipeline.training.config import TrainConfig
from pipeline.training.perceptual import PERCEPTUAL, perceptual_digest
from pipeline.training.progress import is_as_long, kept_at, settings_of
from pipeline.training.start import find_init


class StageReport(BaseModel):
    """What became of a stage in one call.

    Attributes:
        parts: seconds of each part of the work, in the order in which they began.
        planned_seconds: what the run's plan says, None without one.
    """

    model_config = ConfigDict(frozen=True)

    receipt: Receipt
    skipped: bool
    reason: str
    seconds: float
    parts: dict[str, float] = {}
    planned_seconds: float | None = None

    def to_json(self) -> dict[str, object]:
        """Returns the receipt's fields with `skipped`, `reason` and `seconds` among them, and where there is a plan `planned_seconds`."""
        planned = {} if self.planned_seconds is None else {"planned_seconds": round(self.planned_seconds, 3)}
        return self.receipt.model_dump(mode="json") | {"skipped": self.skipped, "reason": self.reason, "seconds": round(self.seconds, 3)} | planned


@dataclass(frozen=True)
class FixedInputs:
    """What is fixed before a run, such as by an attempt at retraining.

    Attributes:
        shards: the dataset, whatever the source holds by now.
        start: weights to start from; fresh ones where it is None.
        model: what is measured and registered, where nothing is to be trained.
    """

    shards: ShardSet
    start: Start | None
    model: TrainedModel | None = None


@dataclass
class Pipeline:
    """One run: its config, its name, and what has been reported so far."""

    config: RunConfig
    name: str
    start_from: StageName | None
    reporter: Reporter
    storage: Location
    reports: dict[StageName, StageReport]
    listed: preprocess_stage.ListedSource | None = None
    given: FixedInputs | None = None
    start: Start | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    perceptual: str | None = None
    autoencoder_address: str | None = None
    autoencoder: AutoencoderFiles | None = None
    latents: ShardSet | None = None

    def context(self, stage: StageName, inputs: str) -> StageContext:
        """Returns where a stage with these inputs writes and runs."""
        folder = self.storage / "runs" / self.name / stage / inputs
        return StageContext(self.storage, folder, inputs, self.name, self.config.cluster, self.reporter)

    def stage(
        self,
        stage: StageName,
        kind: type[AnyReceipt],
        inputs: str,
        intact: Callable[[AnyReceipt], bool],
        call: Callable[[StageContext], AnyReceipt],
        forget: Callable[[StageContext], None],
        why_not: Callable[[AnyReceipt], str] = lambda receipt: "",
    ) -> AnyReceipt:
        """Returns the stage's stored receipt where it matches, else runs the stage and stores its receipt.

        Args:
            why_not: says what else keeps a receipt from matching, nothing where nothing does.
        """
        started, context = time.perf_counter(), self.context(stage, inputs)
        with self.reporter.part(f"checking what there is of {stage}"):
            stored, reason = self._stored(context, stage, kind, intact, why_not)
        receipt = stored
        if receipt is None:
            self.reporter.line(f"[bold]{stage}[/] {reason}")
            if self.forced(stage):
                forget(context)
            receipt = call(context)
            (context.folder / "receipt.json").write_text(receipt.model_dump_json(indent=2) + "\n")
        else:
            self.reporter.line(f"[bold]{stage}[/] skipped: {reason}")
        seconds, parts = time.perf_counter() - started, self.reporter.times.take()
        seconds += parts.get(LISTING, 0.0)  # which comes before the first stage and belongs to it
        self.reports[stage] = StageReport(receipt=receipt, skipped=stored is not None, reason=reason, seconds=seconds, parts=parts)
        return receipt

    def stored(
        self,
        stage: StageName,
        kind: type[AnyReceipt],
        inputs: str,
        intact: Callable[[AnyReceipt], bool],
        why_not: Callable[[AnyReceipt], str] = lambda receipt: "",
    ) -> AnyReceipt | None:
        """Returns the receipt for which the stage would be skipped; None where it would be run."""
        return self._stored(self.context(stage, inputs), stage, kind, intact, why_not)[0]

    def forced(self, stage: StageName) -> bool:
        """Tells whether --from asks for the stage."""
        return self.start_from is not None and STAGES.index(stage) >= STAGES.index(self.start_from)

    def _stored(
        self, context: StageContext, stage: StageName, kind: type[AnyReceipt], intact: Callable[[AnyReceipt], bool], why_not: Callable[[AnyReceipt], str]
    ) -> tuple[AnyReceipt | None, str]:
        if self.forced(stage):
            return None, f"asked for by --from {self.start_from}"
        path = context.folder / "receipt.json"
        if not path.is_file():
            others = [other for other in context.folder.parent.folders() if (context.folder.parent / other / "receipt.json").is_file()]
            return None, "its inputs changed" if others else "for the first time"
        try:
            receipt = kind.model_validate_json(path.read_text())
        except (OSError, ValidationError):
            return None, "its receipt cannot be read"
        if other := why_not(receipt):
            return None, other
        if not intact(receipt):
            return None, "what its receipt describes is no longer whole"
        return receipt, f"the same inputs ({context.inputs}), and the result is whole"


def run(
    config: RunConfig,
    name: str,
    *,
    until: StageName = "register",
    start_from: StageName | None = None,
    reporter: Reporter | None = None,
    given: FixedInputs | None = None,
    autoencoder: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> dict[StageName, StageReport]:
    """Runs the stages up to `until`; those from `start_from` on are run even where their receipts match.

    Args:
        given: dataset and weights of an attempt at retraining, whose champion is measured anew beside the candidate, on equal terms.
        autoencoder: where that lies which `data.autoencoder` names by a preset.
        tags: further ones of the MLflow run.

    Raises:
        ConfigError, DataError, ClusterError, RegistryError: before anything expensive starts where possible.
    """
    reporter = reporter or Reporter()
    address = autoencoder or config.data.autoencoder
    if address is not None and address.startswith(PRESET) and until != "preprocess":
        raise ConfigError(f"data.autoencoder={address} is trained by `ddpm run` and `ddpm retrain` alone; name what they registered, models:/NAME@champion")
    begins_at_training = start_from is not None and STAGES.index(start_from) <= STAGES.index("train")
    with preflight(config, name, until, reporter, lists=given is None, trains_anew=begins_at_training) as ready:
        pipeline = Pipeline(ready.config, name, start_from, reporter, ready.storage, {}, ready.listed, given)
        pipeline.autoencoder_address, pipeline.tags = address, tags or {}
        ready.listed = None
        _run_stages(pipeline, ready.tracking, until)
    return pipeline.reports


def _run_stages(pipeline: Pipeline, tracking: Tracking | None, until: StageName) -> None:
    if tracking is not None:
        pipeline.autoencoder = autoencoder_of(pipeline, tracking)
    shards = _preprocess(pipeline)
    if until == "preprocess" or tracking is None:
        return
    pipeline.latents = _encode(pipeline, shards)
    if until == "encode":
        return
    train_stage.check_labels(pipeline.config.model, shards)
    if until in ("evaluate", "register"):
        check_extractor(pipeline.config.evaluate, shards, pipeline.storage)
    if until == "register":
        _warn_about_other_images(pipeline, tracking, shards)
    done = pipeline.given.model if pipeline.given else None
    if done is None:
        pipeline.start = start_of(pipeline, tracking)
        pipeline.perceptual = perceptual_digest(pipeline.config.train)
    if pipeline.start is not None:
        check_start(Location.of(pipeline.start.checkpoint), pipeline.start.model, _latent_space(pipeline))
    inputs = train_inputs(pipeline, shards) if done is None else done.inputs
    with TrackedRun(pipeline.config, pipeline.context("train", inputs), tracking, shards, pipeline.tags) as tracked:
        _from_training_on(pipeline, shards, tracked, inputs, until)
        _note_times(pipeline, tracked)


def _from_training_on(pipeline: Pipeline, shards: ShardSet, tracked: TrackedRun, inputs: str, until: StageName) -> None:
    model = _train(pipeline, shards, tracked, inputs)
    if until == "train":
        return
    evaluation, metrics = _evaluate(pipeline, model, shards, tracked), RunMetrics(pipeline.name, pipeline.config.registry.model_name)
    metrics.set("ddpm_candidate_distance", evaluation.metric.value, evaluation.metric.name)
    if until == "register":
        registration = _register(pipeline, shards, model, evaluation, tracked)
        metrics.set("ddpm_champion_distance", _champion_value(registration), registration.metric.name)


def _champion_value(registration: Registration) -> float | None:
    """Returns the number of the champion that stands behind a decision, None where it has none of the same unit."""
    if registration.promoted:
        return registration.metric.value
    return registration.champion_test.test.champion if registration.champion_test else None


def _note_times(pipeline: Pipeline, tracked: TrackedRun) -> None:
    """Puts what the stages took beside what was planned, and tells MLflow both, and the speed for plans to come."""
    seconds = {stage: report.seconds for stage, report in pipeline.reports.items() if not report.skipped}
    model = pipeline.reports["train"].receipt
    assert isinstance(model, TrainedModel)
    digest, folder = config_digest(pipeline.config), pipeline.storage / "runs" / pipeline.name
    plan = note_actual(folder, digest, seconds, model.images_per_second if "train" in seconds else None)
    planned = {} if plan is None else {stage.stage: stage.seconds.value for stage in plan.stages}
    for stage, report in pipeline.reports.items():
        pipeline.reports[stage] = report.model_copy(update={"planned_seconds": planned.get(stage)})
    if not tracked.is_open or not seconds:
        return
    values = {f"time/{stage}_seconds": taken for stage, taken in seconds.items()}
    values |= {f"time/{stage}_planned_seconds": planned[stage] for stage in seconds if stage in planned}
    receipts = {stage: report.receipt for stage, report in pipeline.reports.items()}
    speeds = speeds_of_run(pipeline.config, receipts, seconds, use_gpu=model.gpu_bytes is not None)
    with suppress(RegistryError):  # of numbers about the run, which are no part of its result
        tracked.tracking.log_metrics(tracked.open(), [(time.time_ns() // 1_000_000, model.steps, values)])
        if speeds is not None:
            tracked.tracking.tag_run(tracked.open(), as_tags(speeds))


def _warn_about_other_images(pipeline: Pipeline, tracking: Tracking, shards: ShardSet) -> None:
    """Says before the training where the run's model would enter a competition with models of other images, in which nobody can win."""
    name, own = pipeline.config.registry.model_name, model_name_of(pipeline.config.data.source)
    with translated(tracking.uri):
        rival = champion_of_other_images(tracking, name, shards.source, shards.digest)
    if rival is not None:
        advice, theirs = f"registry.model_name={own}" if own != name else "another registry.model_name", rival.tags["dataset.source"]
        pipeline.reporter.line(
            f"  [yellow]note[/] version {rival.version} of {name} was trained on {escape(theirs)}, this run trains on {escape(shards.source)}: numbers "
            f"of unlike images are not compared, and that version stays; {advice} makes a model of these images alone"
        )


def start_of(pipeline: Pipeline, tracking: Tracking) -> Start | None:
    """Returns the weights to start from: those of an attempt at retraining, or those that the settings name."""
    if pipeline.given is not None and pipeline.given.start is not None:
        return pipeline.given.start
    with pipeline.reporter.part("looking for the weights to start from"):
        return find_init(pipeline.config.train, folder=pipeline.storage / "runs" / pipeline.name, tracking=tracking, storage=pipeline.storage)


def train_inputs(pipeline: Pipeline, shards: ShardSet) -> str:
    """Returns the digest of all that decides what a step does; the folder of the training is called by it.

    At which step it ends is no part of it, so that a longer run goes on where a shorter one ended.
    """
    config, start = pipeline.config, pipeline.start
    trained_on = pipeline.latents or shards
    known = [start.sha256] if start else []
    known += [pipeline.perceptual] if pipeline.perceptual else []
    inputs = digest_of(trained_on.digest, config.model, config.diffusion, _of_steps(config.train), *known)
    trainings = pipeline.storage / "runs" / pipeline.name / "train"
    return inputs if inputs in trainings.folders() else _of_older_version(trainings, _train_settings(pipeline, shards)) or inputs


def _of_steps(train: TrainConfig) -> dict[str, Any]:
    """Returns the settings of training that decide what a step does."""
    fields = result_fields(train)
    if train.early_stop:
        fields |= train.model_dump(mode="json", include={"validate_every", "validate_images", "validate_samples"})
    # Weights of `train.init_from` and of the perceptual loss are known by their checksums.
    left_out = {"init_from", "init_weights", *PERCEPTUAL} | (set() if train.depends_on_steps else {"steps"})
    return {name: value for name, value in fields.items() if name not in left_out}


def _of_older_version(trainings: Location, settings: Mapping[str, str]) -> str | None:
    """Returns the folder of a training of these settings that an older version made, whose digest held its number of steps, too."""
    for name in trainings.folders():
        found = settings_of(trainings / name)
        if "train.steps" in found and "train.steps" not in settings and {key: value for key, value in found.items() if key != "train.steps"} == settings:
            return name
    return None


def _train_settings(pipeline: Pipeline, shards: ShardSet) -> dict[str, str]:
    """Returns what `train_inputs` is the digest of, for messages."""
    config, start = pipeline.config, pipeline.start
    settings = flat_result_fields(model=config.model, diffusion=config.diffusion) | flat("train", _of_steps(config.train))
    by_checksum = {"start": start.sha256 if start else None, "perceptual": pipeline.perceptual}
    return settings | {"dataset": (pipeline.latents or shards).digest} | {key: value for key, value in by_checksum.items() if value is not None}


def _preprocess(pipeline: Pipeline) -> ShardSet:
    if pipeline.given is not None:
        shards = pipeline.given.shards
        pipeline.reports["preprocess"] = StageReport(receipt=shards, skipped=True, reason="the attempt's dataset", seconds=0.0)
        return shards
    config, listed = pipeline.config.data, pipeline.listed
    assert listed is not None
    pipeline.listed = None  # with millions of files it is large, and only this stage needs it
    return pipeline.stage(
        "preprocess",
        ShardSet,
        preprocess_inputs(pipeline.config, listed),
        preprocess_stage.is_intact,
        lambda context: preprocess_stage.preprocess(config, listed, context=context, anew=pipeline.forced("preprocess")),
        lambda context: None,
    )


def preprocess_inputs(config: RunConfig, listed: preprocess_stage.ListedSource) -> str:
    """Returns the digest of all that decides a dataset."""
    return digest_of(listed.plan, config.data.max_bad_fraction)


def autoencoder_of(pipeline: Pipeline, tracking: Tracking) -> AutoencoderFiles | None:
    """Returns the autoencoder in whose latents the run works, which the network takes; None where it works on rows as they are."""
    data, storage, address = pipeline.config.data, pipeline.storage, pipeline.autoencoder_address
    if address is None:
        return None
    with pipeline.reporter.part("reading the autoencoder"):
        found = resolve_autoencoder(address, folder=storage / "runs" / pipeline.name, tracking=tracking, storage=storage)
    check_network(pipeline.config.model, found.latent_shape(data.space.shape))
    return found


def _latent_space(pipeline: Pipeline) -> LatentSpace | None:
    space = pipeline.latents.space if pipeline.latents is not None else None
    return space if isinstance(space, LatentSpace) else None


def _encode(pipeline: Pipeline, shards: ShardSet) -> ShardSet | None:
    """Returns the latents that the denoiser works on; None where it works on rows as they are."""
    if pipeline.autoencoder is None:
        return None
    found, space = pipeline.autoencoder, encoded_space(pipeline, shards)
    return pipeline.stage(
        "encode",
        ShardSet,
        digest_of(shards.digest, space.definition()),
        encode_stage.is_intact,
        lambda context: encode_stage.encode(shards, space, found, context=context, anew=pipeline.forced("encode")),
        lambda context: None,
    )


def encoded_space(pipeline: Pipeline, shards: ShardSet) -> LatentSpace:
    """Returns the space of the latents that the run works on."""
    assert pipeline.autoencoder is not None
    train = pipeline.config.train
    return encode_stage.space_of(shards, pipeline.autoencoder, mirrors=train.flip, copies=_copies(train))


def _copies(train: TrainConfig) -> tuple[int, int]:
    """Returns how many shifted copies of each image are encoded, and by how many pixels they are shifted at most."""
    return (train.crop_copies, train.crop_jitter) if train.crop_jitter else (0, 0)


def _train(pipeline: Pipeline, shards: ShardSet, tracked: TrackedRun, inputs: str) -> TrainedModel:
    config = pipeline.config
    if pipeline.given is not None and pipeline.given.model is not None:
        pipeline.reports["train"] = StageReport(receipt=pipeline.given.model, skipped=True, reason="what was trained before", seconds=0.0)
        return pipeline.given.model

    def call(context: StageContext) -> TrainedModel:
        kept_at(config.train.steps, context.folder)  # whose error must not leave its mark on a run that has ended well
        trained = train_stage.train(
            config.train,
            config.model,
            config.diffusion,
            pipeline.latents or shards,
            context=context,
            tracking=tracked.tracking,
            run_id=tracked.open(),
            config_digest=config_digest(config),
            settings=_train_settings(pipeline, shards),
            start=pipeline.start,
            perceptual=pipeline.perceptual,
        )
        return trained.model_copy(update={"dataset_digest": shards.digest})  # of the images, by which models are compared

    return pipeline.stage("train", TrainedModel, inputs, train_stage.is_intact, call, _set_finished_aside, why_other_steps(config.train.steps))


def why_other_steps(steps: int) -> Callable[[TrainedModel], str]:
    """Returns what says why a training is not what a number of steps means, nothing where it is."""
    return lambda receipt: "" if is_as_long(receipt, steps) else f"it has {receipt.steps} steps, and {steps} are asked for"


def _set_finished_aside(context: StageContext) -> None:
    """Makes room for a training asked for by --from; one that was interrupted goes on instead."""
    if (context.folder / "receipt.json").is_file():
        train_stage.set_aside(context.folder)


def evaluate_inputs(pipeline: Pipeline, model: TrainedModel, shards: ShardSet) -> str:
    """Returns the digest of all that decides an evaluation."""
    config = pipeline.config.evaluate
    return digest_of(model.weights_sha256, shards.digest, config, evaluate_stage.decided_by(config, model))


def _evaluate(pipeline: Pipeline, model: TrainedModel, shards: ShardSet, tracked: TrackedRun) -> Evaluation:
    config = pipeline.config.evaluate
    evaluation = pipeline.stage(
        "evaluate",
        Evaluation,
        evaluate_inputs(pipeline, model, shards),
        evaluate_stage.is_intact,
        lambda context: evaluate_stage.evaluate(config, model, shards, context=context, latents=pipeline.latents),
        lambda context: evaluate_stage.forget(context.folder),
    )
    if tracked.is_open or not pipeline.reports["evaluate"].skipped:
        _publish(pipeline, evaluation, model, tracked)
    return evaluation


def _publish(pipeline: Pipeline, evaluation: Evaluation, model: TrainedModel, tracked: TrackedRun) -> None:
    run_id = tracked.open()
    with pipeline.reporter.part("sending numbers and pictures to MLflow"):
        evaluate_stage.publish(evaluation, model, tracked.tracking, run_id)


def register_inputs(pipeline: Pipeline, evaluation: Evaluation, tracking: Tracking) -> str:
    """Returns the digest of all that decides a version."""
    metric, samples, uri = evaluation.metric.model_dump(mode="json"), evaluation.samples_sha256, public_uri(tracking.uri)
    return digest_of(evaluation.inputs, metric, samples, pipeline.config.registry, uri, pipeline.name)


def _register(pipeline: Pipeline, shards: ShardSet, model: TrainedModel, evaluation: Evaluation, tracked: TrackedRun) -> Registration:
    config, tracking = pipeline.config.registry, tracked.tracking
    inputs = register_inputs(pipeline, evaluation, tracking)

    def call(context: StageContext) -> Registration:
        _publish(pipeline, evaluation, model, tracked)
        run_id = tracked.open()
        measured = model.model_copy(update={"config_digest": config_digest(pipeline.config)})

        def ask(champion: Champion) -> ChampionTest | str:
            model_uri = f"models:/{config.model_name}/{champion.version}"
            candidate = Rival("candidate", evaluation.samples, lambda: (Location.of(evaluation.checkpoint), evaluation.weights))
            settings, unit = pipeline.config.evaluate, evaluation.metric.unit

            def fetch_champion() -> tuple[Location, str]:
                with pipeline.reporter.part("fetching the champion's weights"):
                    return fetch_checkpoint(tracking, model_uri, pipeline.storage), "ema"

            kept = champion.samples if champion.metric is not None and champion.metric.unit == unit else None
            rival = Rival(f"champion v{champion.version}", kept or "", fetch_champion)
            try:
                return compare_with_champion(settings, unit, candidate, rival, shards, min_gain=config.min_gain, version=champion.version, context=context)
            except DataError as error:  # a registry that is away says nothing about the champion: that ends the call, and the next one asks again
                return str(error)

        equal_terms = pipeline.given is not None
        return register_stage.register(config, shards, measured, evaluation, ask, context=context, tracking=tracking, run_id=run_id, equal_terms=equal_terms)

    return pipeline.stage(
        "register",
        Registration,
        inputs,
        lambda receipt: registered_intact(receipt, tracking),
        call,
        lambda context: None,
    )
