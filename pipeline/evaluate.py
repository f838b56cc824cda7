"""A checkpoint in, samples and what they score out: Ray actors draw and measure, each image from its own seed."""

import time

from components.storage import Location
from pipeline.artifacts import Evaluation, Metric, ShardSet, Standing, TrainedModel
from pipeline.bench import Bench, EvaluateConfig, open_bench
from pipeline.context import StageContext
from pipeline.draw import SEEDS_PER_PART, SampleSet, parts_of, pixels_file
from pipeline.keep import keep_samples
from pipeline.measure import Sampled, measure_distance
from pipeline.pictures import draw_pictures, write_page
from pipeline.tracking import Tracking

ELECTION_SEEDS = 2**62


def evaluate(config: EvaluateConfig, model: TrainedModel, shards: ShardSet, *, context: StageContext) -> Evaluation:
    """Draws samples of a checkpoint, measures them against the dataset, and returns the receipt.

    Raises:
        DataError: if the checkpoint, the dataset, or a file of weights or statistics is not whole.
    """
    with open_bench(config, shards, context) as bench:
        samples, election = _elect(bench, model)
        drawn = bench.draw(samples, config.seeds, "need" if config.keep_samples else "keep")
        with context.reporter.waiting("comparing samples with real images"):
            numbers = bench.measure(samples)
        pictures = draw_pictures(bench, samples, numbers, model)
    for warning in numbers.warnings:
        context.reporter.line(f"  [yellow]warning[/] {warning}")
    kept = _keep(bench, samples) if config.keep_samples else None
    for part in parts_of(config.seeds, SEEDS_PER_PART):
        pixels_file(samples.folder, part).remove()
    evaluation = Evaluation(
        inputs=context.inputs,
        folder=str(context.folder),
        settings=config.model_dump(mode="json"),
        checkpoint=samples.checkpoint,
        weights=samples.weights,
        election=election,
        metric=numbers.frechet[0],
        jackknifed=numbers.jackknifed,
        guards=numbers.frechet[1:],
        scores=numbers.scores,
        floor=numbers.floor,
        memorisation=None if numbers.copies is None else numbers.copies[0],
        warnings=numbers.warnings,
        samples=str(samples.folder),
        samples_sha256=drawn.sha256,
        images_per_second=drawn.images_per_second,
        kept_samples=kept,
        grid=pictures.address("grid"),
        animation=pictures.address("animation"),
        loss_curve=pictures.address("loss_curve"),
        report=str(context.folder / "report.html"),
    )
    write_page(evaluation, model, shards, pictures)
    return evaluation


def _step_of(checkpoint: Location) -> int:
    return int(checkpoint.name.removeprefix("step_").partition("-")[0])


def _keep(bench: Bench, samples: SampleSet) -> str:
    from components.model.checkpoint import read_spec

    names = read_spec(Location.of(samples.checkpoint)).label_names
    return str(keep_samples(bench.context.storage, samples, bench.config.seeds, bench.manifest.recipe, list(names)))


def _elect(bench: Bench, model: TrainedModel) -> tuple[SampleSet, tuple[Standing, ...]]:
    """Returns the samples of the average that is measured: the main one of the last checkpoint, or the best of all where there is an election.

    Candidates are compared on seeds of their own, so that the winner's number is not the luckiest of several.
    """
    from components.model.checkpoint import averages_in, checkpoints, is_complete

    last = Location.of(model.path)
    count = bench.config.election_samples
    folders = [folder for folder in checkpoints(Location.of(model.folder)) if is_complete(folder)] if count else []
    standing = [(folder, weights) for folder in folders for weights in averages_in(folder)]
    if len(standing) < 2:
        return bench.samples_of(last, "ema"), ()
    reference, unit = bench.reference()
    seeds = range(ELECTION_SEEDS, ELECTION_SEEDS + count)
    unit = unit.model_copy(update={"num_samples": count, "first_seed": ELECTION_SEEDS})
    found = []
    for folder, weights in standing:
        samples = bench.samples_of(folder, weights)
        bench.draw(samples, seeds)
        distance = measure_distance(Sampled(samples.folder, bench.team.identities[0], seeds), reference)
        metric = Metric(value=distance.value, unit=unit, standard_error=distance.standard_error)
        found.append(Standing(checkpoint=str(folder), weights=weights, step=_step_of(folder), metric=metric))
        bench.context.reporter.line(f"  election    {folder.name} {weights}: {metric.name} {metric.value:.4g}")
    found.sort(key=lambda standing: standing.metric.value)
    return bench.samples_of(Location.of(found[0].checkpoint), found[0].weights), tuple(found)


def publish(evaluation: Evaluation, model: TrainedModel, tracking: Tracking, run_id: str) -> None:
    """Logs an evaluation's numbers and pictures to the run of its model; once for each run, however often it is called."""
    folder = Location.of(evaluation.folder)
    marker = folder / f".published-{run_id}"
    if marker.is_file():
        return
    values = {f"eval/{metric.name}": metric.value for metric in (evaluation.metric, *evaluation.guards, *evaluation.scores)}
    values[f"eval/{evaluation.metric.name}_jackknifed"] = evaluation.jackknifed
    if evaluation.metric.standard_error is not None:
        values[f"eval/{evaluation.metric.name}_standard_error"] = evaluation.metric.standard_error
    if evaluation.floor is not None:
        values["eval/floor"] = evaluation.floor.value
    if evaluation.memorisation is not None:
        values["eval/copy_rate"] = evaluation.memorisation.copy_rate
    tracking.log_metrics(run_id, [(time.time_ns() // 1_000_000, model.steps, values)])
    tracking.log_files(run_id, folder, "evaluate")
    marker.write_text("")


def is_intact(receipt: Evaluation) -> bool:
    """Tells whether the pictures that a receipt describes are still there."""
    return all(Location.of(address).is_file() for address in (receipt.grid, receipt.animation, receipt.loss_curve, receipt.report))
