"""Which features decide, and where their weights come from."""

from pathlib import Path
from typing import Any

import numpy as np

from cluster.placement import Placement
from components.data.reader import NO_LABEL, RowReader
from components.data.shards import read_manifest
from components.errors import DataError
from components.scratch import scratch
from components.storage import Location
from pipeline.artifacts import ShardSet
from pipeline.context import StageContext
from pipeline.lease import held
from pipeline.measurement.config import EvaluateConfig
from pipeline.measurement.reference_statistics import read_reference
from pipeline.measurement.remote_progress import RemoteProgress, collecting_progress
from pipeline.measurement.sampling_actor import ExtractorChoice, Kind

MIN_CLASSES = 2
CLASSIFIER_ROWS, CLASSIFIER_BYTES, PIXELS_PER_THREAD = 100_000, 2 << 30, 4096


def check_files(config: EvaluateConfig) -> None:
    """Checks the files of weights and statistics that a config names, before anything expensive starts.

    Raises:
        DataError: if one is missing, cannot be looked at, or is another one.
    """
    try:
        _check_files(config)
    except OSError as error:
        named = {key: value for key in ("inception_weights", "dinov2_weights", "reference") if (value := getattr(config, key)) is not None}
        reason = error.strerror or " ".join(str(error).split())
        raise DataError(f"{' or '.join(f'evaluate.{key}={value}' for key, value in named.items())} cannot be read ({reason}); name a readable one") from error


def _check_files(config: EvaluateConfig) -> None:
    if config.inception_weights is not None:
        from components.metrics.features import check_inception_weights

        weights = Location.of(config.inception_weights)
        if weights.is_local:
            check_inception_weights(Path(config.inception_weights).expanduser())
        elif not weights.is_file():
            raise DataError(f"evaluate.inception_weights={weights} does not exist; name torch-fidelity's weights file")
    if config.dinov2_weights is not None:
        from components.metrics.dino import check_dino

        check_dino(Location.of(config.dinov2_weights))
    if config.reference is not None:
        try:
            read_reference(Location.of(config.reference))
        except DataError as error:
            raise DataError(f"evaluate.reference={error}") from error


def check_extractor(config: EvaluateConfig, shards: ShardSet, storage: Location) -> None:
    """Checks that the wanted features can be had for a dataset, before anything is trained; fetches Inception's weights where need be.

    Raises:
        DataError: if they cannot.
    """
    if shards.space.kind == "points" and (config.extractor != "auto" or config.inception_weights or config.dinov2_weights):
        raise DataError("evaluate.extractor, inception_weights and dinov2_weights mean nothing to points, which are their own features; leave them out")
    if config.extractor == "classifier" and shards.num_labels < MIN_CLASSES:
        raise DataError(f"evaluate.extractor=classifier needs labels, and {shards.source} has {shards.num_labels}; use dct8 or inception")
    if config.extractor == "dinov2" and config.dinov2_weights is None:
        raise DataError("evaluate.extractor=dinov2 needs evaluate.dinov2_weights; name a folder with config.json and model.safetensors")
    if config.extractor == "inception":
        _inception(config, storage)
    if config.reference is not None:
        _check_reference(config, shards)


def _check_reference(config: EvaluateConfig, shards: ShardSet) -> None:
    """Checks that a file of statistics has as many features as those that decide."""
    from components.metrics import classifier, dino, features

    kind, space = deciding_kind(config, shards), shards.space
    if kind == "points":
        raise DataError("evaluate.reference means nothing to points, which are compared with the dataset's own; leave it out")
    shape = tuple(space.for_features(np.zeros((1, *space.shape), space.dtype)).shape[1:])
    numbers = {"inception": features.INCEPTION_FEATURES, "classifier": classifier.FEATURES, "dct8": features.dct_features(shape)}
    needed = dino.num_features(Location.of(str(config.dinov2_weights))) if kind == "dinov2" else numbers[kind]
    found = len(read_reference(Location.of(str(config.reference))).mean)
    if found != needed:
        raise DataError(f"evaluate.reference={config.reference} has {found} features, and {kind} has {needed}; name a file of {kind} features")


def deciding_kind(config: EvaluateConfig, shards: ShardSet) -> Kind:
    """Returns which features decide."""
    if shards.space.kind == "points":
        return "points"
    if config.extractor != "auto":
        return config.extractor
    return "inception" if config.inception_weights else "classifier" if shards.num_labels >= MIN_CLASSES else "dct8"


def choose_extractors(config: EvaluateConfig, shards: ShardSet, context: StageContext, placement: Placement) -> list[ExtractorChoice]:
    """Returns the deciding extractor, and behind it those that are guards: dct8 always, DINOv2 where its weights are named."""
    kind = deciding_kind(config, shards)
    if kind == "points":
        return [ExtractorChoice("points")]
    dino = [ExtractorChoice("dinov2", str(Location.of(config.dinov2_weights)))] if config.dinov2_weights else []
    dct8 = [ExtractorChoice("dct8")]
    if kind == "classifier":
        return [ExtractorChoice("classifier", str(_classifier(shards, context, placement))), *dct8, *dino]
    if kind == "inception":
        return [ExtractorChoice("inception", str(_inception(config, context.storage))), *dct8, *dino]
    return [*dino, *dct8] if kind == "dinov2" else [*dct8, *dino]


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
        with scratch("inception") as folder:
            found = fetch_inception_weights(folder).name
            kept.upload(folder)
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
    context.reporter.line(f"  {what}")
    progress = context.reporter.progress("training the classifier", 100, "%")
    with held(context.storage / "locks" / f"classifier-{name}", wait=True), progress as advance, collecting_progress(advance) as pieces:
        if not (folder / RECORD).is_file():
            try:
                options: dict[str, Any] = {"num_cpus": 1} | dict(placement.per_sampler)
                task = ray.remote(**options)(make_classifier)
                ray.get(task.remote(shards.path, str(folder), threads, pieces.progress(name), "cuda" if placement.use_gpu else "cpu"))
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, DataError):
                    raise error.cause from error
                raise
    return folder


def make_classifier(dataset: str, folder: str, threads: int, progress: RemoteProgress, device: str) -> None:
    """Trains the classifier of a dataset, up to CLASSIFIER_ROWS and CLASSIFIER_BYTES of its labelled rows, and moves it into place.

    Args:
        progress: where it says how much of it is done, in percent.
    """
    import torch

    from components.metrics.classifier import BATCH_SIZE, RECORD, train_classifier

    source = Location.of(dataset)
    manifest = read_manifest(source)
    # Many threads that have little to do slow one another down.
    torch.set_num_threads(max(1, min(threads, BATCH_SIZE * int(np.prod(manifest.space.shape[1:])) // PIXELS_PER_THREAD)))
    reader = RowReader(source, manifest)
    classes = reader.labels(np.arange(len(reader)))
    labelled = np.flatnonzero(classes != NO_LABEL)
    most = min(CLASSIFIER_ROWS, max(MIN_CLASSES, CLASSIFIER_BYTES // manifest.space.row_bytes))
    labelled = labelled[:: -(-len(labelled) // most)]  # spread over all labels, by which rows are sorted
    with scratch("classifier") as staging:
        report = progress.report()
        train_classifier(
            manifest.space.for_features(reader.rows(labelled)), classes[labelled].astype(np.int64), staging / "made", lambda share: report(100 * share), device
        )
        Location.of(folder).upload(staging / "made", last=RECORD)
