"""The guards, asked about real data and a real plan."""

from components.data.catalog import Dataset
from components.data.drift import Drift, measure_drift
from components.data.drift_picture import drift_picture
from components.data.shard_cache import ShardCache
from components.scratch import scratch
from components.storage import Location
from pipeline.artifacts import ShardSet
from pipeline.config import RunConfig
from pipeline.context import Reporter
from pipeline.retraining.guards import Finding, check_budget, check_data
from pipeline.retraining.latest import Latest

PICTURE = "drift.png"


def check_new_data(config: RunConfig, latest: Latest | None, shards: ShardSet, place: Location) -> tuple[Finding | None, Drift | None]:
    """Returns what the guards say of what is new since the last training, and what that is; nothing before the first.

    Args:
        place: folder of the attempt, where a picture of the drift goes when a guard stops it.

    Raises:
        DataError: if a dataset is not whole.
    """
    if latest is None or latest.dataset is None:
        return None, None
    limits, copies = config.retrain, ShardCache.of(config.cluster.cache, config.cluster.cache_bytes)
    after = Dataset.of(Location.of(shards.path))
    drift = measure_drift(latest.dataset, after, copies=copies)
    found = check_data(
        drift,
        min_new_images=limits.min_new_images,
        max_quarantined_fraction=limits.max_quarantined_fraction,
        max_label_drift=limits.max_label_drift,
        max_brightness_drift=limits.max_brightness_drift,
    )
    if found is not None and found.kind == "stop":
        picture = drift_picture(
            drift, latest.dataset, after, max_label_drift=limits.max_label_drift, max_brightness_drift=limits.max_brightness_drift, copies=copies
        )
        with scratch("drift") as folder:
            picture.save(folder / PICTURE)
            (place / PICTURE).write_bytes((folder / PICTURE).read_bytes())
    elif (place / PICTURE).is_file():  # of the same attempt, when a guard stopped it
        (place / PICTURE).remove()
    return found, drift


def check_planned_hours(config: RunConfig, latest: Latest | None, reporter: Reporter) -> Finding | None:
    """Returns why the planned training is over its budget, None where it is not; says where that cannot be told."""
    found = check_budget(
        steps=config.train.steps,
        global_batch_size=config.train.global_batch_size,
        images_per_second=latest.images_per_second if latest else None,
        num_workers=(latest.num_workers if latest else None) or config.cluster.max_workers,
        max_hours=config.retrain.max_hours,
    )
    if found is not None and found.kind == "note":
        reporter.line(f"  {found.reason}")
        return None
    return found
