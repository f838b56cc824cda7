"""A small performance of a run's stages, by their own code, on the machines that the run would have: what it takes tells what the whole will take.

A few hundred files are decoded, a few steps trained by as many workers with as many threads, a few batches drawn by as many actors. All of it lies in a
folder of its own below the storage root, which goes when it is over. What is first in a process, such as imports and first steps, is timed apart.
"""

import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from cluster.connect import connect
from cluster.placement import Placement, place
from components.autoencoder.store import AutoencoderFiles
from components.errors import DataError
from components.metrics.classifier import images_seen
from components.model.manifest import MAIN_AVERAGE, manifest_of
from components.model.spec import is_autoencoder
from components.networks.config import NetworkConfig
from components.storage import Location
from pipeline import encode as encode_stage
from pipeline import preprocess as preprocess_stage
from pipeline import train as train_stage
from pipeline.artifacts import ShardSet
from pipeline.config import RunConfig, digest_of
from pipeline.context import Reporter, StageContext
from pipeline.measurement.evaluator import Evaluator, open_evaluator
from pipeline.measurement.extractors import choose_extractors
from pipeline.measurement.sample_store import RealSet, SampleSet
from pipeline.planning.history import now, speed_digest
from pipeline.planning.records import EvaluateSpeed, Speeds, TrainSpeed
from pipeline.preprocess import ListedSource
from pipeline.training.arithmetic import PAYS
from pipeline.training.config import TrainConfig
from pipeline.training.metrics_log import MetricsLine, read_metrics
from pipeline.training.perceptual import perceptual_digest
from pipeline.training.plan import TrainOutcome

FEWER_FILES, MOST_FILES = 64, 256
"""Files that are decoded first, whose time is mostly that of starting, and in all."""
TRAIN_S, FEWEST_STEPS, MOST_STEPS = 8.0, 8, 240
CORE_FLOPS, GPU_FLOPS = 4e10, 4e13
"""Operations per second, roughly, by which the number of steps is chosen that takes some seconds."""
WINDOWS, WARM_WINDOWS = 8, 2
FEW_STEPS, MORE_STEPS, ROUNDS = 2, 6, 3
CPU_BATCH, GPU_BATCH, SMALL_BATCH = 64, 256, 4
COMPARED, SUBSETS, FEW_SUBSETS = 1000, 100, 4
Timed = Callable[[], object]


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal left.

    Attributes:
        checkpoint: of its training, by which another rehearsal may encode; there as long as the rehearsal's folder is.
    """

    speeds: Speeds
    checkpoint: str


@contextmanager
def rehearsal_folder(storage: Location, name: str) -> Iterator[Location]:
    """Gives a block a folder that all nodes see, and removes it."""
    folder = storage / "plans" / f"{name}-{uuid.uuid4().hex[:8]}"
    try:
        yield folder
    finally:
        folder.remove_tree()


def rehearse(
    config: RunConfig, name: str, listed: ListedSource, folder: Location, reporter: Reporter, *, autoencoder: AutoencoderFiles | None = None
) -> Rehearsed:
    """Performs the stages of a run at small size, and returns what they took; within a session of Ray.

    Args:
        folder: of `rehearsal_folder`.
        autoencoder: where the run works on latents.

    Raises:
        DataError, ConfigError, ClusterError: where the run would.
    """
    started = time.perf_counter()
    with reporter.part("starting Ray"):
        connect(config.cluster)
        placement = place(config.cluster, reporter.line)
    rehearsal = _Rehearsal(config, name, listed, folder, reporter, placement, time.perf_counter() - started)
    return rehearsal.run(autoencoder)


@dataclass
class _Rehearsal:
    config: RunConfig
    name: str
    listed: ListedSource
    folder: Location
    reporter: Reporter
    placement: Placement
    ray_s: float

    def run(self, autoencoder: AutoencoderFiles | None) -> Rehearsed:
        start_s, file_s, shards = self._decode()
        encode_s, latents = (0.0, None) if autoencoder is None else self._encode(shards, autoencoder)
        train, outcome = self._train(latents or shards)
        with self.reporter.part("rehearsing evaluate"):
            evaluate = self._evaluate(outcome, shards, latents)
        speeds = Speeds(
            digest=speed_digest(self.config, outcome.num_workers),
            device=outcome.device,
            use_gpu=self.placement.use_gpu,
            num_workers=outcome.num_workers,
            threads=self.placement.threads,
            num_samplers=self.placement.num_samplers,
            measured=now(),
            source="measured",
            ray_s=self.ray_s,
            preprocess_start_s=start_s,
            file_s=file_s,
            encode_s=encode_s,
            latent_row_bytes=0 if latents is None else latents.space.row_bytes,
            train=train,
            evaluate=evaluate,
        )
        return Rehearsed(speeds, f"{outcome.checkpoint}#{MAIN_AVERAGE}")

    def _context(self, stage: str) -> StageContext:
        return StageContext(self.folder, self.folder / stage, "rehearsal", self.name, self.config.cluster, self.reporter)

    def _decode(self) -> tuple[float, float, ShardSet]:
        """Returns the seconds before the first file, those of a file, and a dataset of some files, spread over the source."""
        data = self.config.data.model_copy(update={"max_bad_fraction": 1.0, "shard_bytes": max(1 << 10, 16 * self.config.data.space.row_bytes)})
        all_files, times, shards = min(len(self.listed.listing), MOST_FILES), [], None
        counts = [count for count in (FEWER_FILES, all_files) if count <= all_files]
        with self.reporter.part("rehearsing preprocess"):
            for count in counts:
                began = time.perf_counter()
                shards = preprocess_stage.preprocess(data, sample_of(self.listed, count, all_files), context=self._context("preprocess"))
                times.append(time.perf_counter() - began)
        assert shards is not None
        file_s = times[-1] / max(1, counts[-1] - (counts[0] if len(counts) > 1 else 0))
        return max(0.0, times[0] - counts[0] * file_s), file_s, shards

    def _encode(self, shards: ShardSet, autoencoder: AutoencoderFiles) -> tuple[float, ShardSet]:
        """Returns the seconds of encoding an image, and the latents."""
        train = self.config.train
        copies = (train.crop_copies, train.crop_jitter) if train.crop_jitter else (0, 0)
        space = encode_stage.space_of(shards, autoencoder, mirrors=train.flip, copies=copies)
        with self.reporter.part("rehearsing encode"):
            began = time.perf_counter()
            latents = encode_stage.encode(shards, space, autoencoder, context=self._context("encode"), anew=False)
            return (time.perf_counter() - began) / shards.num_rows, latents

    def _train(self, shards: ShardSet) -> tuple[TrainSpeed, TrainOutcome]:
        flops, parameters = cost_of(self.config.model, shards.space.shape)
        train = rehearsal_settings(self.config.train, self._steps(flops), compiled=_is_compiled(self.config.train, self.placement, parameters))
        context, began = self._context("train"), time.time()
        with self.reporter.part("rehearsing train"):
            perceptual = perceptual_digest(self.config.train)
            options = {"placement": self.placement, "context": context, "perceptual": perceptual}
            outcome = train_stage.rehearse(train, self.config.model, self.config.diffusion, shards, **options)
        lines, files = read_metrics(context.folder), manifest_of(Location.of(outcome.checkpoint))
        speed, draw_s = steady(lines, train)
        first = lines[0]
        start_s = first.timestamp_ms / 1000 - began - first.step * train.global_batch_size / speed - draw_s
        sizes = {"checkpoint_bytes": sum(size for size, _ in files.values()), "ema_bytes": files[f"{MAIN_AVERAGE}.safetensors"][0]}
        memory = {"host_bytes": outcome.host_bytes, "gpu_bytes": outcome.gpu_bytes}
        return TrainSpeed(start_s=max(0.0, start_s), images_per_second=speed, draw_s=draw_s, **memory, **sizes), outcome

    def _steps(self, flops: float) -> int:
        each = GPU_FLOPS if self.placement.use_gpu else CORE_FLOPS * self.placement.threads
        step_s = flops * self.config.train.global_batch_size / (each * self.placement.num_workers)
        return min(MOST_STEPS, max(FEWEST_STEPS, int(TRAIN_S / step_s)))

    def _evaluate(self, outcome: TrainOutcome, shards: ShardSet, latents: ShardSet | None) -> EvaluateSpeed:
        config, context = self.config.evaluate, self._context("evaluate")
        first_s, again_s = self._classifier(shards, context)
        began = time.perf_counter()
        with open_evaluator(config, shards, context) as opened:
            start_s = time.perf_counter() - began
            checkpoint = Location.of(outcome.checkpoint)
            evaluator = replace(opened, latents=latents, reconstructs=is_autoencoder(checkpoint))
            size = min(config.batch_size or (GPU_BATCH if self.placement.use_gpu else CPU_BATCH), config.num_samples)
            batch_s, call_s = _sampling(evaluator, checkpoint, size, self.placement.num_samplers)
            features_s, dimensions = _features(evaluator, shards)
            kernel_s, pairs_s = evaluator.actor_pool.compute(comparing, dimensions)
        seen = images_seen(shards.num_train)
        return EvaluateSpeed(
            start_s=start_s,
            batch_size=size,
            batch_s=batch_s,
            call_s=call_s,
            features_s=features_s,
            classifier_start_s=max(0.0, first_s - again_s),
            classifier_s=again_s / seen,
            kernel_s=kernel_s,
            pairs_s=pairs_s,
            features=dimensions,
        )

    def _classifier(self, shards: ShardSet, context: StageContext) -> tuple[float, float]:
        """Returns what the classifier takes the first time and when its process is there, 0 and 0 where none measures; it stays."""
        times = []
        for _ in range(2):
            began = time.perf_counter()
            kinds = choose_extractors(self.config.evaluate, shards, context, self.placement)
            times.append(time.perf_counter() - began)
            if kinds[0].kind != "classifier":
                return 0.0, 0.0
            if len(times) == 1:
                Location.of(kinds[0].address).remove_tree()
        return times[0], times[1]


def sample_of(listed: ListedSource, count: int, of: int) -> ListedSource:
    """Returns a source with the first `count` of `of` files that are spread over it."""
    listing = listed.listing
    spread = np.linspace(0, len(listing) - 1, of).round().astype(int)
    chosen = np.sort(np.random.default_rng(0).permutation(spread)[:count])
    held_out = None if listing.held_out is None else listing.held_out[chosen]
    fewer = replace(listing, table=listing.table.take(pa.array(chosen)).combine_chunks(), held_out=held_out)
    return replace(listed, listing=fewer, plan=digest_of(listed.plan, count, of))


def rehearsal_settings(train: TrainConfig, steps: int, *, compiled: bool) -> TrainConfig:
    """Returns the settings of so few steps, each of which does what it does in the whole training; one sample grid is drawn before the last window."""
    every = max(1, steps // WINDOWS)
    last = steps // every * every
    fewer = {"steps": last, "log_every": every, "checkpoint_every": last, "sample_every": last - every, "compile": compiled}
    left_out = {"validate_every": 0, "validate_samples": 0, "early_stop": 0, "ema_snapshot_every": None, "init_from": None, "keep_every": None}
    return train.model_copy(update=fewer | left_out)


def steady(lines: list[MetricsLine], train: TrainConfig) -> tuple[float, float]:
    """Returns images per second of all workers without the first windows, and the seconds of drawing a sample grid."""
    speeds = [line.metrics["perf/images_per_second"] for line in lines]
    speed = statistics.median(speeds[WARM_WINDOWS:] or speeds)
    window_s = train.log_every * train.global_batch_size / speeds[-1]
    return speed, max(0.0, (lines[-1].timestamp_ms - lines[-2].timestamp_ms) / 1000 - window_s)


def cost_of(model: NetworkConfig, shape: tuple[int, ...]) -> tuple[float, int]:
    """Returns the operations of a forward and backward pass of one row, and a network's parameters, without computing anything."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = model.build(shape)
        network(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64))
    return 3.0 * counter.get_total_flops(), sum(parameter.numel() for parameter in network.parameters())


def _is_compiled(train: TrainConfig, placement: Placement, parameters: int) -> bool:
    """Tells whether the whole training compiles its step: a short one might not."""
    return train.compile is True or (train.compile == "auto" and placement.use_gpu and parameters * train.steps * train.global_batch_size >= PAYS)


def _sampling(evaluator: Evaluator, checkpoint: Location, size: int, actors: int) -> tuple[float, float]:
    """Returns the seconds of one network evaluation, of a batch on every actor at once and of few images, first calls left out."""
    most = 1 if evaluator.reconstructs else evaluator.config.recipe.steps
    few, more = min(FEW_STEPS, most), min(MORE_STEPS, most)
    short, long = (evaluator.samples_of(checkpoint, MAIN_AVERAGE, replace(evaluator.config.recipe, steps=steps)) for steps in (few, more))
    for samples in (short, long):
        _draw(evaluator, samples, size, actors)
    rounds = [(_draw(evaluator, long, size, actors), _draw(evaluator, short, size, actors), _draw(evaluator, long, SMALL_BATCH, actors)) for _ in range(ROUNDS)]
    long_s, short_s, small_s = (statistics.median(times) for times in zip(*rounds, strict=True))
    batch_s = (long_s - short_s) / (more - few) if more > few and long_s > short_s else long_s / more
    return batch_s, small_s / more


def _draw(evaluator: Evaluator, samples: SampleSet, size: int, actors: int) -> float:
    began = time.perf_counter()
    work = ((samples, range(actor * size, (actor + 1) * size), size) for actor in range(actors))
    for _ in evaluator.actor_pool.map("draw", work):
        pass
    return time.perf_counter() - began


def _features(evaluator: Evaluator, shards: ShardSet) -> tuple[float, int]:
    """Returns the seconds of one image by all extractors on one actor, and how many numbers the deciding features are."""
    rows, pool, total, dimensions = range(min(shards.num_train, MOST_FILES)), evaluator.actor_pool, 0.0, 1
    for which, identity in enumerate(pool.identities):
        times = []
        for again in range(2):  # the first call on an actor reads the dataset, and warms up
            real = RealSet(evaluator.context.storage / "features" / str(again), shards.path, "train")
            began = time.perf_counter()
            pool.first("real_part", which, real, rows)
            times.append(time.perf_counter() - began)
            if which == 0:
                dimensions = _dimensions(real.features_file(identity, rows))
        total += min(times) / len(rows)
    return total, dimensions


def _dimensions(file: Location) -> int:
    from pipeline.measurement.sample_store import read_array

    values = read_array(file)
    if values is None:
        raise DataError(f"{file} cannot be read; look at the storage")
    return int(values.shape[1])


def comparing(dimensions: int, device: str) -> tuple[float, float]:
    """Returns the seconds of a whole kernel distance, and of a million pairs of such features."""
    from components.metrics.kernel import kernel_distance
    from components.metrics.neighbours import neighbourhoods

    draw = np.random.default_rng(0)
    fake, real = (draw.standard_normal((COMPARED, dimensions)).astype(np.float32) for _ in range(2))
    kernel_distance(fake[:64], real[:64], subsets=1, device=device)
    began = time.perf_counter()
    kernel_distance(fake, real, subsets=FEW_SUBSETS, device=device)
    between = time.perf_counter()
    neighbourhoods(fake, real, device=device)
    return (between - began) * SUBSETS / FEW_SUBSETS, (time.perf_counter() - between) * 1e6 / (3 * COMPARED**2)
