"""A checkpoint in, samples and a Frechet distance out: Ray actors draw and measure, each image from its own seed."""

import hashlib
import io
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cluster.connect import connect
from cluster.lookout import waiting_aloud
from cluster.placement import Placement, place
from components.data.copies import Copies
from components.data.reader import RowReader
from components.data.shards import Manifest, read_manifest
from components.errors import DataError
from components.storage import Location
from pipeline.artifacts import Evaluation, Metric, MetricUnit, ShardSet, TrainedModel
from pipeline.context import StageContext
from pipeline.draw import ExtractorChoice, Recipe, Team
from pipeline.lease import held
from pipeline.notebook import read_metrics
from pipeline.tracking import Tracking

if TYPE_CHECKING:
    from components.metrics.frechet import FeatureStats

GRID_IMAGES, GRID_COLUMNS = 60, 12
ANIMATION_IMAGES, ANIMATION_COLUMNS, ANIMATION_FRAMES = 16, 8, 40
PART_BATCHES = 4
MIN_CLASSES = 2
CLASSIFIER_ROWS = 100_000
REFERENCE_CACHE_BYTES = 128 << 20


class EvaluateConfig(BaseModel):
    """Samples and the numbers taken of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_samples: int = Field(10_000, ge=2)
    """Images that are drawn and measured."""
    sampler: Literal["ddim", "ancestral"] = "ddim"
    """`ddim` (DDIM, eta 0) or `ancestral` (DDPM, on respaced steps)."""
    steps: int = Field(50, ge=1)
    """Network evaluations per image."""
    first_seed: int = Field(0, ge=0, lt=2**62)
    """Seed of the first image; image i has seed first_seed + i."""
    batch_size: int = Field(64, ge=1)
    """Images drawn together."""
    extractor: Literal["auto", "inception", "classifier", "dct8"] = "auto"
    """Features that are compared; `auto` is Inception where `inception_weights` is set, else the classifier where there are labels, else dct8."""
    inception_weights: str | None = None
    """Path of the Inception-2015 weights file, which makes the number an FID."""


def check_weights(config: EvaluateConfig) -> None:
    """Checks the Inception weights that a config names, before anything expensive starts.

    Raises:
        DataError: if the file is missing or another one.
    """
    if config.inception_weights is not None:
        from components.metrics.features import check_inception_weights

        check_inception_weights(Path(config.inception_weights).expanduser())


def check_extractor(config: EvaluateConfig, shards: ShardSet, storage: Location) -> None:
    """Checks that the wanted features can be had for a dataset, before anything is trained; fetches Inception's weights where need be.

    Raises:
        DataError: if they cannot.
    """
    if config.extractor == "classifier" and shards.num_labels < MIN_CLASSES:
        raise DataError(f"evaluate.extractor=classifier needs labels, and {shards.source} has {shards.num_labels}; use dct8 or inception")
    if config.extractor == "inception":
        _inception(config, storage)


def evaluate(config: EvaluateConfig, model: TrainedModel, shards: ShardSet, *, context: StageContext) -> Evaluation:
    """Draws samples from a checkpoint's averaged weights, measures them against the dataset, and returns the receipt.

    Raises:
        DataError: if the checkpoint, the dataset or the Inception weights are not whole.
    """
    connect(context.cluster)
    placement = place(context.cluster, context.reporter.line)
    kinds = _choose_extractors(config, shards, context, placement)
    with waiting_aloud(context.cluster, context.reporter.line), Team(placement, model.path, kinds) as team:
        references = _references(team, shards, context)
        drawn = _draw(team, config, references, context)
        frames = team.first("animation", _recipe(config), config.first_seed, ANIMATION_IMAGES, ANIMATION_FRAMES)
    metrics = [_metric(config, shards, identity, reference, stats) for identity, reference, stats in zip(team.identities, references, drawn.stats, strict=True)]
    pictures = _pictures(context.folder, drawn.first, frames, Location.of(model.folder))
    return Evaluation(
        inputs=context.inputs,
        folder=str(context.folder),
        metric=metrics[0],
        guards=tuple(metrics[1:]),
        samples_sha256=drawn.sha256,
        images_per_second=drawn.images_per_second,
        **pictures,
    )


def publish(evaluation: Evaluation, model: TrainedModel, tracking: Tracking, run_id: str) -> None:
    """Logs an evaluation's numbers and pictures to the run of its model; once for each run, however often it is called."""
    folder = Location.of(evaluation.folder)
    marker = folder / f".published-{run_id}"
    if marker.is_file():
        return
    values = {f"eval/{metric.name}": metric.value for metric in (evaluation.metric, *evaluation.guards)}
    tracking.log_metrics(run_id, [(time.time_ns() // 1_000_000, model.steps, values)])
    tracking.log_files(run_id, folder, "evaluate")
    marker.write_text("")


def _choose_extractors(config: EvaluateConfig, shards: ShardSet, context: StageContext, placement: Placement) -> list[ExtractorChoice]:
    """Returns the deciding extractor, and dct8 as guard behind it."""
    kind = config.extractor
    if kind == "auto":
        kind = "inception" if config.inception_weights else "classifier" if shards.num_labels >= MIN_CLASSES else "dct8"
    guard = ExtractorChoice("dct8")
    if kind == "dct8":
        return [guard]
    if kind == "classifier":
        return [ExtractorChoice("classifier", str(_classifier(shards, context, placement))), guard]
    return [ExtractorChoice("inception", str(_inception(config, context.storage))), guard]


def _inception(config: EvaluateConfig, storage: Location) -> Location:
    """Returns where the Inception weights lie, for every node; fetches them where no path is given."""
    from components.metrics.features import fetch_inception_weights

    if config.inception_weights is not None:
        return Location.of(config.inception_weights)
    kept = storage / "cache" / "inception"
    if kept.is_local:
        return Location.of(fetch_inception_weights(kept.path))
    found = next(iter(kept.files()), None)
    if found is None:
        with tempfile.TemporaryDirectory(prefix="ddpm-inception-") as folder:
            found = fetch_inception_weights(Path(folder)).name
            kept.upload(Path(folder))
    return kept / found


def _classifier(shards: ShardSet, context: StageContext, placement: Placement) -> Location:
    """Returns the folder of the dataset's classifier, trained on the cluster the first time."""
    import ray

    from components.metrics.classifier import RECIPE, RECORD

    name = f"{shards.digest}-{RECIPE}"
    folder = context.storage / "cache" / "classifiers" / name
    if (folder / RECORD).is_file():
        return folder
    threads = placement.threads * placement.num_workers if context.cluster.address == "local" else placement.threads
    what = "training the classifier whose features measure the samples, once for this dataset"
    with context.reporter.waiting(what), held(context.storage / "locks" / f"classifier-{name}", wait=True):
        if not (folder / RECORD).is_file():
            ray.get(ray.remote(num_cpus=1)(make_classifier).remote(shards.path, str(folder), threads))
    return folder


def make_classifier(dataset: str, folder: str, threads: int) -> None:
    """Trains the classifier of a dataset, up to CLASSIFIER_ROWS of its labelled rows, and moves it into place."""
    import torch

    from components.data.shards import read_rows
    from components.metrics.classifier import RECORD, train_classifier

    torch.set_num_threads(threads)
    source = Location.of(dataset)
    manifest = read_manifest(source)
    numbers = {name: number for number, name in enumerate(manifest.label_names)}
    rows = read_rows(source, manifest, ["label", "split"])
    labels = [label for label, split in zip(rows["label"].to_pylist(), rows["split"].to_pylist(), strict=True) if split == "train"]
    labelled = np.flatnonzero([label is not None for label in labels])
    labelled = labelled[:: -(-len(labelled) // CLASSIFIER_ROWS)]  # spread over all labels, by which rows are sorted
    classes = np.asarray([numbers[labels[row]] for row in labelled], np.int64)
    with tempfile.TemporaryDirectory(prefix="ddpm-classifier-") as staging:
        train_classifier(RowReader(source, manifest).pixels(labelled), classes, Path(staging) / "made")
        Location.of(folder).upload(Path(staging) / "made", last=RECORD)


def _references(team: Team, shards: ShardSet, context: StageContext) -> "list[FeatureStats]":
    """Returns the dataset's statistics by every extractor, from the cache where they are known."""
    dataset = Location.of(shards.path)
    manifest = read_manifest(dataset)
    return [_reference(team, which, dataset, manifest, context) for which in range(len(team.identities))]


def _reference(team: Team, which: int, dataset: Location, manifest: Manifest, context: StageContext) -> "FeatureStats":
    from components.metrics.frechet import FeatureStats

    name, digest, _ = team.identities[which]
    cached = context.storage / "cache" / "references" / f"{manifest.digest}-{name}-{digest[:16]}.npz"
    if cached.is_file():
        with np.load(io.BytesIO(cached.read_bytes()), allow_pickle=False) as saved:
            return FeatureStats(saved["shift"], int(saved["count"]), saved["first"], saved["second"])
    reader = RowReader(dataset, manifest, cache_bytes=REFERENCE_CACHE_BYTES, copies=Copies.of(context.cluster.cache, context.cluster.cache_bytes))
    shift = team.first("mean_of_first", which, next(reader.batches(256)))
    work = ((which, pixels, shift) for pixels in reader.batches(512))
    stats = None
    with context.reporter.progress(f"reference {name}", len(reader), "images") as advance:
        for part in team.map("measure_one", work):
            stats = part if stats is None else stats.merge(part)
            advance(part.count)
    assert stats is not None
    _save_reference(cached, stats)
    return stats


def _save_reference(path: Location, stats: "FeatureStats") -> None:
    content = io.BytesIO()
    np.savez(content, shift=stats.shift, count=stats.count, first=stats.first, second=stats.second)
    path.write_bytes(content.getvalue())


@dataclass(frozen=True)
class Drawn:
    """What drawing all samples left behind.

    Attributes:
        stats: one per extractor, over all samples.
        first: (64, C, H, W) pixels of the first seeds.
    """

    stats: "list[FeatureStats]"
    sha256: str
    first: np.ndarray
    images_per_second: float


def _draw(team: Team, config: EvaluateConfig, references: "Sequence[FeatureStats]", context: StageContext) -> Drawn:
    part_size = PART_BATCHES * config.batch_size
    parts = [range(first, min(first + part_size, config.num_samples)) for first in range(0, config.num_samples, part_size)]
    seeds = [range(config.first_seed + part.start, config.first_seed + part.stop) for part in parts]
    shifts = [reference.shift for reference in references]
    work = ((_recipe(config), part_seeds, shifts, part.start < GRID_IMAGES) for part, part_seeds in zip(parts, seeds, strict=True))
    checksum, kept, totals, started = hashlib.sha256(), [], None, time.perf_counter()
    with context.reporter.progress("sample", config.num_samples, "images") as advance:
        for stats, part_checksum, pixels in team.map("part", work):
            totals = stats if totals is None else [total.merge(stat) for total, stat in zip(totals, stats, strict=True)]
            checksum.update(part_checksum)
            kept.extend([] if pixels is None else [pixels])
            advance(stats[0].count)
    assert totals is not None
    speed = config.num_samples / (time.perf_counter() - started)
    return Drawn(totals, checksum.hexdigest(), np.concatenate(kept)[:GRID_IMAGES], speed)


def _recipe(config: EvaluateConfig) -> Recipe:
    return Recipe(config.sampler, config.steps, config.batch_size)


def _metric(config: EvaluateConfig, shards: ShardSet, identity: tuple[str, str, str], reference: "FeatureStats", stats: "FeatureStats") -> Metric:
    from components.metrics.frechet import frechet_distance

    name, digest, preprocessing = identity
    unit = MetricUnit(
        extractor=name,
        extractor_digest=digest,
        preprocessing=preprocessing,
        reference_digest=shards.digest,
        reference_count=reference.count,
        num_samples=config.num_samples,
        first_seed=config.first_seed,
        sampler=config.sampler,
        steps=config.steps,
    )
    return Metric(value=frechet_distance(stats, reference), unit=unit)


def _pictures(folder: Location, first: np.ndarray, frames: Sequence[np.ndarray], training: Location) -> dict[str, str]:
    """Writes the sample grid, the denoising animation and the loss curve; returns their addresses by field of the receipt."""
    from components.charts import save_loss_curve
    from components.figures import grid, save_animation

    pictures = {"grid": folder / "grid.png", "animation": folder / "denoising.gif", "loss_curve": folder / "loss.png"}
    lines = [line for line in read_metrics(training) if "train/loss" in line.metrics]
    with tempfile.TemporaryDirectory(prefix="ddpm-pictures-") as staging:
        paths = {name: Path(staging) / picture.name for name, picture in pictures.items()}
        grid(first, GRID_COLUMNS).save(paths["grid"])
        save_animation(paths["animation"], [grid(frame, ANIMATION_COLUMNS) for frame in frames])
        save_loss_curve(paths["loss_curve"], [line.step for line in lines], [line.metrics["train/loss"] for line in lines])
        folder.upload(Path(staging))
    return {name: str(picture) for name, picture in pictures.items()}


def is_intact(receipt: Evaluation) -> bool:
    """Tells whether the pictures that a receipt describes are still there."""
    return all(Location.of(address).is_file() for address in (receipt.grid, receipt.animation, receipt.loss_curve))
