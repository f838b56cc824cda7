"""What is measured before a run, what is planned by it, and what came of that; frozen, stored as JSON."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from components.storage import Location
from pipeline.artifacts import StageName

PLAN_FILE = "plan.json"
HOUR_S = 3600.0
Basis = Literal["measured", "last measured", "computed", "assumed", "done"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Quantity(_Record):
    """A number, and how it is known."""

    value: float
    basis: Basis
    """`measured` by this plan's probe, `last measured` by an earlier training, `computed` from settings and files, `assumed`, or `done` already."""


class TrainSpeed(_Record):
    """What training takes."""

    start_s: float
    """Until the first step: workers, imports, data; compilation, where the step is compiled."""
    images_per_second: float
    """Of all workers together, the first steps left out."""
    draw_s: float
    """Of one sample grid."""
    host_bytes: int | None
    """Most memory of the first worker's process."""
    gpu_bytes: int | None
    """Most memory of its GPU; None on a CPU."""
    checkpoint_bytes: int
    """Of one checkpoint: weights, averages, optimiser."""
    ema_bytes: int
    """Of one average in it."""


class EvaluateSpeed(_Record):
    """What sampling and measuring take."""

    start_s: float
    """Until the actors are there."""
    batch_size: int
    """Images that an actor draws together."""
    batch_s: float
    """Of one network evaluation of such a batch on one actor, all actors at work; guidance is in it."""
    call_s: float
    """Of one network evaluation of four images."""
    features_s: float
    """Of one image by all extractors, on one actor."""
    classifier_start_s: float
    """Before the classifier is trained, whose features measure the samples; 0 where another one measures."""
    classifier_s: float
    """Of one image that it sees in training."""
    kernel_s: float
    """Of one kernel distance of a thousand samples and more."""
    pairs_s: float
    """Of comparing a million pairs of features: neighbours, copies."""
    features: int
    """Numbers of the deciding features."""


class Speeds(_Record):
    """What was measured of a machine for one run's settings."""

    digest: str
    """Of all that decides the speed of a training: network, process, batch, precision, image size."""
    device: str
    """What a training worker computes on, as its driver calls it."""
    use_gpu: bool
    num_workers: int
    threads: int
    num_samplers: int
    measured: str
    """When, in ISO 8601."""
    source: Basis
    ray_s: float
    """Of starting Ray, or of joining a cluster."""
    preprocess_start_s: float
    file_s: float
    """Of opening, decoding and packing one file, all of the machine's processes together."""
    encode_s: float
    """Of encoding one image to latents, all processes together; 0 without an autoencoder."""
    latent_row_bytes: int = 0
    train: TrainSpeed
    evaluate: EvaluateSpeed | None
    """None where only training was measured."""
    stage_s: dict[StageName, float] = {}
    """Seconds of whole stages, where an earlier run measured these."""
    num_files: int = 0
    """Files that were decoded in these seconds."""
    samples_drawn: int = 0
    """Samples that were drawn in these seconds, times network evaluations for each."""


class StagePlan(_Record):
    """What one stage takes."""

    stage: StageName
    seconds: Quantity
    device_hours: Quantity
    note: str = ""


class Plan(_Record):
    """What a run will take, in SI units: seconds, bytes, images per second. Devices are training workers, which a run holds from its beginning to its end."""

    run_name: str
    config_digest: str
    steps: int
    made: str
    """When, in ISO 8601."""
    speed_source: Literal["probe", "last measured", "none needed"]
    """Where the speed is from: measured for this plan, or by the last training of the same settings on such a device."""
    speed_measured: str
    """When, in ISO 8601."""
    device: str
    num_workers: int
    images: Quantity
    """Images that are trained on."""
    epochs: Quantity
    images_per_second_per_worker: Quantity
    images_per_second: Quantity
    stages: tuple[StagePlan, ...]
    seconds: Quantity
    device_hours: Quantity
    """Of all stages, those of an autoencoder that is trained first among them."""
    host_bytes: Quantity | None
    """Memory of one training worker."""
    gpu_bytes: Quantity | None
    """Memory of its GPU."""
    checkpoint_bytes: Quantity
    """Of one checkpoint: weights, averages, optimiser."""
    checkpoints_bytes: Quantity
    """Of all that are kept."""
    dataset_bytes: Quantity
    """Of shards: of pixels, and of latents where there are any."""
    run_bytes: Quantity
    """By which one run lets the storage grow, the dataset counted once and not here."""
    runs_per_month: Quantity
    """Of 30 days."""
    month_bytes: Quantity
    """By which a month of the schedule lets the storage grow, images unchanged."""
    cost: Quantity | None
    """In the currency of `cluster.price_per_hour`; None without that."""
    autoencoder: "Plan | None" = None
    """Plan of the autoencoder that is trained first."""
    actual_s: dict[StageName, float] = {}
    """Seconds that stages took, as far as they have been run since."""
    actual_images_per_second: float | None = None


def read_plan(folder: Location) -> Plan | None:
    """Returns the plan that a run's folder holds; None where it holds none that can be read."""
    with suppress(OSError, ValidationError):
        return Plan.model_validate_json((folder / PLAN_FILE).read_text())
    return None


def write_plan(folder: Location, plan: Plan) -> None:
    """Writes a plan to a run's folder."""
    (folder / PLAN_FILE).write_text(plan.model_dump_json(indent=2) + "\n")


def note_actual(folder: Location, digest: str, seconds: Mapping[StageName, float], images_per_second: float | None) -> Plan | None:
    """Adds to the plan of a run what its stages took, and returns it; None where there is no plan of these settings.

    Args:
        digest: of the settings of the run.
        seconds: of the stages that were run now.
    """
    plan = read_plan(folder)
    if plan is None or plan.config_digest != digest:
        return None
    update = {"actual_s": {**plan.actual_s, **seconds}, "actual_images_per_second": images_per_second or plan.actual_images_per_second}
    plan = plan.model_copy(update=update)
    if seconds:
        write_plan(folder, plan)
    return plan
