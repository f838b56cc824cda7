"""From what was measured, and how much there is to do, to a plan. Pure."""

import math
from dataclasses import dataclass

from pipeline.artifacts import STAGES, StageName
from pipeline.config import RunConfig, config_digest
from pipeline.measurement.measure import FEWEST_COMPARED, MOST_COMPARED
from pipeline.measurement.pictures import ANIMATION_SEEDS, LOSS_TIMESTEPS, PAIR_STEPS, PAIRS, ROWS_AT_ONCE, SEEDS_AT_ONCE
from pipeline.measurement.reference_statistics import MOST_KEPT
from pipeline.measurement.sample_store import ROWS_PER_PART, SEEDS_PER_PART
from pipeline.planning.history import now
from pipeline.planning.records import HOUR_S, Basis, EvaluateSpeed, Plan, Quantity, Speeds, StagePlan

MLFLOW_S, REGISTER_S, PAGE_S = 5.0, 5.0, 3.0
"""What describing a run to MLflow, registering a version and writing a page take, as far as nobody measured it."""
PICTURES_BYTES, MOST_SHARD_BYTES = 4 << 20, 64 << 20
"""Of the pictures of a run; pixels up to the latter are kept with its MLflow run, too."""
MODEL_COPIES = 2
"""Of the weights in a registered version: its own, and a diffusers pipeline's."""
SMALL_BATCH, KERNEL_ROWS = 4, 1000
VALIDATION_LEVELS, VALIDATION_STEPS = 8, 16


@dataclass(frozen=True)
class Work:
    """How much there is to do.

    Attributes:
        files: that the source lists, and that are to be opened.
        images, held_out: rows to train on, and held out.
        images_basis: how these are known.
        dataset_bytes: of a dataset that is there; None where it is to be made.
        done: stages that would be skipped.
        steps_done: of a training that goes on.
    """

    files: int
    todo: int
    images: int
    held_out: int
    images_basis: Basis
    dataset_bytes: int | None
    done: frozenset[StageName] = frozenset()
    steps_done: int = 0


def plan_of(config: RunConfig, name: str, speeds: Speeds, work: Work, runs_per_month: Quantity, autoencoder: Plan | None = None) -> Plan:
    """Returns the plan of a run.

    Args:
        autoencoder: plan of the autoencoder that is trained first.
    """
    stages = tuple(_stage(stage, config, speeds, work) for stage in STAGES if stage != "encode" or config.data.autoencoder is not None)
    first = 0.0 if autoencoder is None else autoencoder.seconds.value
    seconds, workers, basis = sum(stage.seconds.value for stage in stages) + first, speeds.num_workers, speeds.source
    hours = seconds * workers / HOUR_S
    price, rate = config.cluster.price_per_hour, speeds.train.images_per_second
    sizes = _sizes(config, speeds, work)
    return Plan(
        run_name=name,
        config_digest=config_digest(config),
        steps=config.train.steps,
        made=now(),
        speed_source="probe" if speeds.source == "measured" else "last measured" if speeds.source == "last measured" else "none needed",
        speed_measured=speeds.measured,
        device=speeds.device,
        num_workers=workers,
        images=Quantity(value=work.images, basis=work.images_basis),
        epochs=Quantity(value=config.train.steps * config.train.global_batch_size / max(1, work.images), basis="computed"),
        images_per_second_per_worker=Quantity(value=rate / workers, basis=basis),
        images_per_second=Quantity(value=rate, basis=basis),
        stages=stages,
        seconds=Quantity(value=seconds, basis="computed"),
        device_hours=Quantity(value=hours, basis="computed"),
        host_bytes=_known(speeds.train.host_bytes, basis),
        gpu_bytes=_known(speeds.train.gpu_bytes, basis),
        checkpoint_bytes=Quantity(value=speeds.train.checkpoint_bytes, basis=basis),
        checkpoints_bytes=Quantity(value=sizes.checkpoints, basis="computed"),
        dataset_bytes=Quantity(value=sizes.dataset, basis="computed" if work.dataset_bytes is None else "done"),
        run_bytes=Quantity(value=sizes.run, basis="computed"),
        runs_per_month=runs_per_month,
        month_bytes=Quantity(value=sizes.run * runs_per_month.value, basis=runs_per_month.basis),
        cost=None if price is None else Quantity(value=hours * price, basis="computed"),
        autoencoder=autoencoder,
    )


def _known(value: float | None, basis: Basis) -> Quantity | None:
    return None if value is None else Quantity(value=value, basis=basis)


def _stage(stage: StageName, config: RunConfig, speeds: Speeds, work: Work) -> StagePlan:
    if stage in work.done:
        seconds, note = Quantity(value=0.0, basis="done"), "done already"
    else:
        ways = {"preprocess": _preprocess, "encode": _encode, "train": _train, "evaluate": _evaluate, "register": _register}
        seconds, note = ways[stage](config, speeds, work)
    hours = seconds.value * speeds.num_workers / HOUR_S
    return StagePlan(stage=stage, seconds=seconds, device_hours=Quantity(value=hours, basis="done" if stage in work.done else "computed"), note=note)


def _preprocess(config: RunConfig, speeds: Speeds, work: Work) -> tuple[Quantity, str]:
    file_s = speeds.file_s
    if speeds.num_files and "preprocess" in speeds.stage_s:
        file_s = speeds.stage_s["preprocess"] / speeds.num_files
    return Quantity(value=speeds.preprocess_start_s + work.todo * file_s, basis=speeds.source), f"{work.todo:,} of {work.files:,} files to open"


def _encode(config: RunConfig, speeds: Speeds, work: Work) -> tuple[Quantity, str]:
    rows = work.images + work.held_out
    seconds = speeds.stage_s.get("encode", rows * speeds.encode_s)
    return Quantity(value=seconds, basis=speeds.source), f"{rows:,} images to encode"


def _train(config: RunConfig, speeds: Speeds, work: Work) -> tuple[Quantity, str]:
    train, speed = config.train, speeds.train
    left = train.steps - work.steps_done
    grids = left // train.sample_every + (1 if work.steps_done == 0 else 0)
    seconds = speed.start_s + left * train.global_batch_size / speed.images_per_second + grids * speed.draw_s
    seconds += _validating(config, speeds, work, left)
    if speeds.source == "measured":
        seconds += speeds.ray_s + MLFLOW_S
    gone = f", {work.steps_done:,} done" if work.steps_done else ""
    return Quantity(value=seconds, basis=speeds.source), f"{left:,} steps{gone}, {grids:,} sample grids"


def _validating(config: RunConfig, speeds: Speeds, work: Work, steps: int) -> float:
    train, speed = config.train, speeds.evaluate
    if not train.validate_every or speed is None:
        return 0.0
    evaluations = min(train.validate_images, work.held_out) * VALIDATION_LEVELS + train.validate_samples * VALIDATION_STEPS
    return steps // train.validate_every * evaluations * speed.batch_s / speed.batch_size / speeds.num_samplers


def _evaluate(config: RunConfig, speeds: Speeds, work: Work) -> tuple[Quantity, str]:
    samples, steps = config.evaluate.num_samples, _steps(config)
    note = f"{samples:,} samples of {steps} network evaluations"
    if speeds.evaluate is not None:
        return Quantity(value=_Evaluating(config, speeds.evaluate, speeds.num_samplers, work).seconds(), basis=speeds.source), note
    if "evaluate" in speeds.stage_s and speeds.samples_drawn:
        return Quantity(value=speeds.stage_s["evaluate"] * samples * steps / speeds.samples_drawn, basis=speeds.source), note
    return Quantity(value=0.0, basis="assumed"), "not known: no run of these settings was evaluated"


def _steps(config: RunConfig) -> int:
    return 1 if config.diffusion.process == "reconstruction" else config.evaluate.steps


def _register(config: RunConfig, speeds: Speeds, work: Work) -> tuple[Quantity, str]:
    if "register" in speeds.stage_s:
        return Quantity(value=speeds.stage_s["register"], basis=speeds.source), ""
    return Quantity(value=REGISTER_S, basis="assumed"), "without a paired test with a champion"


@dataclass(frozen=True)
class _Evaluating:
    """The parts of an evaluation, each dealt to the actors in pieces."""

    config: RunConfig
    speed: EvaluateSpeed
    actors: int
    work: Work

    def seconds(self) -> float:
        """Returns what all parts take."""
        settings = self.config.evaluate
        drawing = self._drawing(settings.num_samples) + self._standing() * self._drawing(settings.election_samples)
        return self.speed.start_s + self._classifier() + self._real() + drawing + self._pictures() + self._likelihood() + self._comparing() + PAGE_S

    def _turns(self, pieces: float) -> int:
        """Returns how many pieces the actor with the most of them has."""
        return math.ceil(pieces / self.actors)

    def _call_s(self, images: int) -> float:
        """Returns the seconds of a network evaluation of some images, between those of few and of many."""
        speed = self.speed
        if images >= speed.batch_size or speed.batch_size <= SMALL_BATCH:
            return speed.batch_s * images / speed.batch_size
        share = max(0.0, (images - SMALL_BATCH) / (speed.batch_size - SMALL_BATCH))
        return speed.call_s + share * max(0.0, speed.batch_s - speed.call_s)

    def _drawing(self, samples: int) -> float:
        part = min(samples, SEEDS_PER_PART)
        if not part:
            return 0.0
        batches = math.ceil(part / self.speed.batch_size)
        return self._turns(math.ceil(samples / part)) * (batches * self.speed.batch_s * _steps(self.config) + part * self.speed.features_s)

    def _standing(self) -> int:
        """Returns how many averages stand for election."""
        train, settings = self.config.train, self.config.evaluate
        if not settings.election_samples:
            return 0
        return kept_checkpoints(self.config) * (1 + len(train.more_ema_decays) + len(train.ema_widths)) + len(settings.ema_widths)

    def _real(self) -> float:
        rows = [self.work.images, self.work.held_out]
        return sum(self._turns(math.ceil(count / ROWS_PER_PART)) * min(count, ROWS_PER_PART) * self.speed.features_s for count in rows if count)

    def _classifier(self) -> float:
        from components.metrics.classifier import images_seen
        from pipeline.measurement.extractors import CLASSIFIER_ROWS

        return self.speed.classifier_start_s + images_seen(min(self.work.images, CLASSIFIER_ROWS)) * self.speed.classifier_s

    def _pictures(self) -> float:
        if self.config.diffusion.process == "reconstruction":
            return 0.0
        settings, steps = self.config.evaluate, _steps(self.config)
        animation = self._turns(min(len(ANIMATION_SEEDS), settings.num_samples) / SEEDS_AT_ONCE) * steps * self._call_s(SEEDS_AT_ONCE)
        between = self._turns(len(PAIRS)) * steps * self._call_s(PAIR_STEPS)
        return animation + between + sum(self._losses(rows) for rows in (self.work.images, self.work.held_out))

    def _losses(self, rows: int) -> float:
        count = min(self.config.evaluate.loss_images, self.config.evaluate.num_samples, rows)
        return self._turns(LOSS_TIMESTEPS * math.ceil(count / ROWS_AT_ONCE)) * self._call_s(min(count, ROWS_AT_ONCE)) if count else 0.0

    def _likelihood(self) -> float:
        images = min(self.config.evaluate.nll_images, self.work.held_out)
        return self._turns(math.ceil(images / ROWS_AT_ONCE)) * self.config.diffusion.num_steps * self._call_s(min(images, ROWS_AT_ONCE)) if images else 0.0

    def _comparing(self) -> float:
        samples = min(self.config.evaluate.num_samples, MOST_COMPARED)
        splits = [min(rows, MOST_COMPARED) for rows in (self.work.images, self.work.held_out) if rows >= FEWEST_COMPARED]
        pairs = sum(samples**2 + rows**2 + samples * rows for rows in splits) + 2 * samples * min(self.work.images, MOST_KEPT)
        kernels = sum(min(1.0, min(samples, rows) / KERNEL_ROWS) ** 2 for rows in splits)
        return kernels * self.speed.kernel_s + pairs / 1e6 * self.speed.pairs_s


def kept_checkpoints(config: RunConfig) -> int:
    """Returns how many checkpoints a training leaves."""
    train = config.train
    written = max(1, math.ceil(train.steps / train.checkpoint_every))
    for_good = train.steps // train.keep_every if train.keep_every else 0
    return min(written, train.keep_last + for_good)


@dataclass(frozen=True)
class _Sizes:
    """Bytes in the storage."""

    checkpoints: int
    dataset: int
    run: int


def _sizes(config: RunConfig, speeds: Speeds, work: Work) -> _Sizes:
    rows = work.images + work.held_out
    pixels = rows * config.data.space.row_bytes if work.dataset_bytes is None else work.dataset_bytes
    kept = kept_checkpoints(config) * speeds.train.checkpoint_bytes + _snapshots(config, speeds)
    samples = config.evaluate.num_samples * (4 * speeds.evaluate.features if speeds.evaluate else 0)
    samples += config.evaluate.num_samples * config.data.space.row_bytes if config.evaluate.keep_samples else 0
    along = pixels if pixels <= MOST_SHARD_BYTES else 0
    grown = kept + MODEL_COPIES * speeds.train.ema_bytes + samples + along + PICTURES_BYTES
    return _Sizes(kept, pixels + rows * speeds.latent_row_bytes, grown)


def _snapshots(config: RunConfig, speeds: Speeds) -> int:
    every = config.train.ema_snapshot_every
    return 0 if every is None else config.train.steps // every * (1 + len(config.train.ema_widths)) * speeds.train.ema_bytes


def over_budget(plan: Plan, max_hours: float | None) -> str:
    """Returns why a plan is over its budget, nothing where it is not."""
    hours = plan.device_hours.value
    if max_hours is None or hours <= max_hours:
        return ""
    return (
        f"cluster.max_hours={max_hours:g} is less than the plan of {hours:.3g} device-hours ({plan.seconds.value / HOUR_S:.3g} h on {plan.num_workers} "
        f"{'worker' if plan.num_workers == 1 else 'workers'}); set train.steps lower than {plan.steps:,}, or raise it"
    )
