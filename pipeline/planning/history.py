"""What a run that was done says of the speed of the next: written to its MLflow run, and found there by what decides the speed."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime

from pydantic import ValidationError

from components.model.manifest import MAIN_AVERAGE, manifest_of
from components.storage import Location
from pipeline.artifacts import Evaluation, Receipt, ShardSet, StageName, TrainedModel
from pipeline.config import RunConfig, digest_of
from pipeline.planning.records import Speeds, TrainSpeed
from pipeline.tracking import Tracking, translated

DIGEST_TAG, RECORD_TAG = "speed.digest", "speed.record"
MOST_LOOKED_AT = 50
SPEED_SETTINGS = {
    "precision",
    "compile",
    "micro_batch_size",
    "optimizer",
    "deterministic",
    "more_ema_decays",
    "ema_widths",
    "rotation",
    "translation",
    "scaling",
    "crop_jitter",
    "perceptual_weights",
    "spike_deviations",
}
"""Settings of training that decide how long a step takes, beside the images of a worker."""


def speed_digest(config: RunConfig, num_workers: int) -> str:
    """Returns the digest of all that decides how many images a worker trains on in a second, but its device."""
    per_worker = config.train.global_batch_size // num_workers
    settings = config.train.model_dump(mode="json", include=SPEED_SETTINGS)
    return digest_of(config.data.space.definition(), config.data.autoencoder, config.model, config.diffusion, per_worker, settings)


def now() -> str:
    """Returns the time in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def age_s(when: str) -> float:
    """Returns the seconds since a time in ISO 8601."""
    return max(0.0, time.time() - datetime.fromisoformat(when).timestamp())


def speeds_of_run(config: RunConfig, receipts: Mapping[StageName, Receipt], seconds: Mapping[StageName, float], use_gpu: bool) -> Speeds | None:
    """Returns what a run says of the speed of its machine; None where it trained nothing.

    Args:
        seconds: of the stages that were run now.
    """
    shards, model, evaluation = receipts.get("preprocess"), receipts.get("train"), receipts.get("evaluate")
    if not isinstance(model, TrainedModel) or not model.images_per_second or "train" not in seconds:
        return None
    files = manifest_of(Location.of(model.path))
    train = TrainSpeed(
        start_s=max(0.0, seconds["train"] - model.seconds),
        images_per_second=model.images_per_second,
        draw_s=0.0,
        host_bytes=model.host_bytes,
        gpu_bytes=model.gpu_bytes,
        checkpoint_bytes=sum(size for size, _ in files.values()),
        ema_bytes=files[f"{MAIN_AVERAGE}.safetensors"][0],
    )
    return Speeds(
        digest=speed_digest(config, model.num_workers),
        device=model.device,
        use_gpu=use_gpu,
        num_workers=model.num_workers,
        threads=0,
        num_samplers=0,
        measured=now(),
        source="last measured",
        ray_s=0.0,
        preprocess_start_s=0.0,
        file_s=0.0,
        encode_s=0.0,
        train=train,
        evaluate=None,
        stage_s=dict(seconds),
        num_files=shards.num_decoded if isinstance(shards, ShardSet) and "preprocess" in seconds else 0,
        samples_drawn=evaluation.metric.unit.num_samples * evaluation.metric.unit.steps if isinstance(evaluation, Evaluation) else 0,
    )


def as_tags(speeds: Speeds) -> dict[str, str]:
    """Returns what an MLflow run says of speed."""
    return {DIGEST_TAG: speeds.digest, "speed.device": speeds.device, RECORD_TAG: speeds.model_dump_json()}


def last_measured(tracking: Tracking, digest: str, kind: str | None, *, use_gpu: bool) -> Speeds | None:
    """Returns what the last training of these settings on such a device took; None where there was none.

    Args:
        digest: of `speed_digest`.
        kind: the device as a cluster calls it, such as H100; None for any.
    """
    with translated(tracking.uri):
        experiments = [experiment.experiment_id for experiment in tracking.client.search_experiments()]
        condition, order = f"tags.`{DIGEST_TAG}` = '{digest}'", ["attributes.start_time DESC"]
        runs = tracking.client.search_runs(experiments, filter_string=condition, order_by=order, max_results=MOST_LOOKED_AT)
    for run in runs:
        try:
            found = Speeds.model_validate_json(run.data.tags.get(RECORD_TAG, ""))
        except ValidationError:  # of another version
            continue
        if found.use_gpu == use_gpu and is_kind(found.device, kind):
            return found
    return None


def is_kind(device: str, kind: str | None) -> bool:
    """Tells whether a device, as its driver calls it, is of a kind as Ray labels it: `NVIDIA H100 80GB HBM3` is an H100."""
    return kind is None or _plain(kind) in _plain(device)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
