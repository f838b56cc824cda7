"""A checkpoint in, samples and what they score out: Ray actors draw and measure, each image from its own seed."""

import contextlib
import hashlib
from dataclasses import replace

from components.errors import DataError
from components.model.manifest import averages_in, is_complete
from components.model.retention import checkpoint_step, checkpoints
from components.model.spec import is_autoencoder, read_spec
from components.storage import Location
from pipeline.artifacts import ElectionEntry, Evaluation, ShardSet, TrainedModel
from pipeline.context import StageContext
from pipeline.errors import RegistryError
from pipeline.leaderboard import VIEW_TAG, view, view_key
from pipeline.measurement.config import EvaluateConfig
from pipeline.measurement.evaluator import Evaluator, as_metric, open_evaluator
from pipeline.measurement.likelihood import bits_per_dimension
from pipeline.measurement.measure import SampleFeatures, measure_distance
from pipeline.measurement.overfitting import overfitting
from pipeline.measurement.pictures import draw_pictures, write_page
from pipeline.measurement.post_hoc import rebuilt
from pipeline.measurement.sample_dataset import keep_samples
from pipeline.measurement.sample_store import SampleSet, checksum_of
from pipeline.tracking import Tracking
from pipeline.training.metrics_log import read_metrics

ELECTION_SEEDS = 2**62
PUBLISHED = ".published-"


def evaluate(config: EvaluateConfig, model: TrainedModel, shards: ShardSet, *, context: StageContext, latents: ShardSet | None = None) -> Evaluation:
    """Draws samples of a checkpoint, measures them against the dataset, and returns the receipt.

    Args:
        latents: what the images are encoded to, where the denoiser works on latents.

    Raises:
        DataError: if the checkpoint, the dataset, or a file of weights or statistics is not whole.
    """
    with open_evaluator(config, shards, context) as pixels_only:
        opened = replace(pixels_only, latents=latents, reconstructs=is_autoencoder(Location.of(model.path)))
        opened.reference()
        samples, election = _elect(opened, model)
        evaluator = replace(opened, policy="elected") if election else opened
        pixels = context.folder / "pixels"
        drawn = evaluator.draw(samples, config.seeds, pixels, need=config.keep_samples)
        numbers = evaluator.measure(samples)
        bits = bits_per_dimension(evaluator, samples) if config.nll_images else None
        pictures = draw_pictures(evaluator, samples, numbers, model, pixels)
    lines = [line for line in read_metrics(Location.of(model.folder)) if line.step <= (model.stopped_at or model.steps)]
    warnings = (*numbers.warnings, *filter(None, [overfitting(lines)]))
    for warning in warnings:
        context.reporter.line(f"  [yellow]warning[/] {warning}")
    with context.reporter.part("keeping the samples"):
        kept = _keep(evaluator, samples, pixels) if config.keep_samples else None
    pixels.remove_tree()
    evaluation = Evaluation(
        inputs=context.inputs,
        folder=str(context.folder),
        settings=evaluator.config.model_dump(mode="json"),
        checkpoint=samples.checkpoint,
        weights=samples.weights,
        weights_sha256=checksum_of(Location.of(samples.checkpoint), samples.weights),
        step=checkpoint_step(Location.of(samples.checkpoint)),
        election=election,
        metric=numbers.frechet[0],
        jackknifed=numbers.jackknifed,
        guards=numbers.frechet[1:],
        scores=numbers.scores,
        floor=numbers.floor,
        memorisation=None if numbers.copies is None else numbers.copies[0],
        warnings=warnings,
        bits_per_dimension=bits,
        samples=str(samples.folder),
        samples_sha256=drawn.sha256,
        images_per_second=drawn.images_per_second,
        kept_samples=kept,
        grid=pictures.address("grid"),
        animation=pictures.address("animation") if "animation" in pictures.contents else "",
        loss_curve=pictures.address("loss_curve") if "loss_curve" in pictures.contents else "",
        report=str(context.folder / "report.html"),
    )
    write_page(evaluation, model, shards, pictures)
    return evaluation


def _keep(evaluator: Evaluator, samples: SampleSet, pixels: Location) -> str:
    names = read_spec(Location.of(samples.checkpoint)).label_names
    return str(keep_samples(evaluator.context.storage, samples, pixels, evaluator.config.seeds, evaluator.manifest.space, list(names)))


def decided_by(config: EvaluateConfig, model: TrainedModel) -> list[str]:
    """Returns what decides an evaluation besides settings, main average and dataset: contents of files, and all that stands for election."""
    files = [Location.of(path) for path in (config.reference, config.inception_weights) if path]
    if config.dinov2_weights is not None:
        from components.metrics.dino import CONFIG, WEIGHTS

        files += [Location.of(config.dinov2_weights) / name for name in (CONFIG, WEIGHTS)]
    contents = [_sha256(file) for file in files]
    standing = _standing(config, model) if config.election_samples else []
    return contents + [checksum_of(checkpoint, weights) for checkpoint, weights in standing]


def _sha256(file: Location) -> str:
    with file.open() as opened:
        state = hashlib.sha256()
        while block := opened.read(1 << 20):
            state.update(block)
        return state.hexdigest()


def _standing(config: EvaluateConfig, model: TrainedModel) -> list[tuple[Location, str]]:
    """Returns every average of every whole checkpoint that was kept, the newest first, and behind them those that are made of snapshots."""
    last = model.stopped_at or model.steps
    folders = [folder for folder in checkpoints(Location.of(model.folder)) if checkpoint_step(folder) <= last and is_complete(folder)]
    kept = [(folder, weights) for folder in folders for weights in averages_in(folder)]
    return [*kept, *((rebuilt(model, width), "ema") for width in config.ema_widths)]


def forget(folder: Location) -> None:
    """Makes the next `publish` log everything again, because it was asked for by --from."""
    for name in folder.files():
        if name.startswith(PUBLISHED):
            (folder / name).remove()


def _elect(evaluator: Evaluator, model: TrainedModel) -> tuple[SampleSet, tuple[ElectionEntry, ...]]:
    """Returns the samples of the average that is measured: the main one of the last checkpoint, or the best of all where there is an election.

    Candidates are compared on seeds of their own, so that the winner's number is not the luckiest of several.
    """
    last, count = Location.of(model.path), evaluator.config.election_samples
    standing = _standing(evaluator.config, model) if count else []
    if len(standing) < 2:
        return evaluator.samples_of(last, "ema"), ()
    reference, unit = evaluator.reference()
    seeds = range(ELECTION_SEEDS, ELECTION_SEEDS + count)
    unit = unit.model_copy(update={"num_samples": count, "first_seed": ELECTION_SEEDS, "weights": "elected"})
    found = []
    for folder, weights in standing:
        samples = evaluator.samples_of(folder, weights)
        evaluator.draw(samples, seeds)
        distance = measure_distance(SampleFeatures(samples.folder, evaluator.actor_pool.identities[0], seeds), reference)
        metric = as_metric(distance, unit)
        found.append(ElectionEntry(checkpoint=str(folder), weights=weights, step=checkpoint_step(folder), metric=metric))
        evaluator.context.reporter.line(f"  election    {folder.name} {weights}: {metric.name} {metric.value:.4g}")
    found.sort(key=lambda standing: standing.metric.value)
    return evaluator.samples_of(Location.of(found[0].checkpoint), found[0].weights), tuple(found)


def publish(evaluation: Evaluation, model: TrainedModel, tracking: Tracking, run_id: str) -> None:
    """Logs an evaluation's numbers and pictures to the run of its model; once for each run, however often it is called."""
    folder = Location.of(evaluation.folder)
    marker = folder / f"{PUBLISHED}{run_id}"
    if marker.is_file():
        return
    values = {f"eval/{metric.name}": metric.value for metric in (evaluation.metric, *evaluation.guards, *evaluation.scores)}
    values[f"eval/{evaluation.metric.name}_jackknifed"] = evaluation.jackknifed
    if evaluation.metric.standard_error is not None:
        values[f"eval/{evaluation.metric.name}_standard_error"] = evaluation.metric.standard_error
    if evaluation.floor is not None:
        values["eval/floor"] = evaluation.floor.value
    if evaluation.bits_per_dimension is not None:
        values["eval/bits_per_dimension"] = evaluation.bits_per_dimension
    if evaluation.memorisation is not None:
        values["eval/copy_rate"] = evaluation.memorisation.copy_rate
    measured_ms = int(Location.of(evaluation.report).modified() * 1000)  # not now: a call after one that failed halfway repeats the same points
    tracking.log_metrics(run_id, [(measured_ms, model.steps, values)])
    tracking.log_files(run_id, folder, "evaluate")
    if (ranking := view(evaluation, measured_ms)) is not None:
        with contextlib.suppress(RegistryError):
            tracking.tag_experiment(run_id, VIEW_TAG + view_key(evaluation), ranking)
    marker.write_text("")


def is_intact(receipt: Evaluation) -> bool:
    """Tells whether the checkpoint and the pictures that a receipt describes are still there."""
    try:
        checksum = checksum_of(Location.of(receipt.checkpoint), receipt.weights)
    except (DataError, OSError):
        return False
    return checksum == receipt.weights_sha256 and all(
        Location.of(address).is_file() for address in (receipt.grid, receipt.animation, receipt.loss_curve, receipt.report) if address
    )
