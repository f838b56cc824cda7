"""Measures how long training stands still for a checkpoint: written by a thread from copies, and written in place, interleaved.

    python benchmarks/checkpoints.py [--preset cifar10] [--batch 8] [--steps 12] [--rounds 3] [--threads N] [section.key=value ...]

Trains on noise, one worker, a checkpoint in the middle of each round. Prints medians: the copy, the writing, what a checkpoint adds to a step, and the slowdown
of the steps beside the writing.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import a_manifest

from components.data.batches import Batch
from components.model.retention import checkpoints
from components.spaces.pixels import PixelSpace
from components.storage import Location
from pipeline.config import RunConfig, load_config
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.metrics_log import Attempt, MetricsLogWriter
from pipeline.training.plan import TrainPlan
from pipeline.training.trainer import Trainer, make_trainer
from workflows.preset_files import find_preset


@dataclass(frozen=True)
class Round:
    """One round, in seconds.

    Attributes:
        stall: time that training stood still for the checkpoint.
        before: steps before the checkpoint.
        after: steps begun before it was whole.
        whole: from the step before until the checkpoint was whole.
    """

    stall: float
    before: list[float]
    after: list[float]
    whole: float


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--batch", 8), ("--steps", 12), ("--rounds", 3), ("--threads", os.cpu_count() or 1)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    config = load_config(find_preset(options.preset), [f"train.global_batch_size={options.batch}", "train.lanes=1", *options.settings])
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as folder:
        report(options, *measure(config, Location.of(folder), options, device))


def measure(config: RunConfig, folder: Location, options: argparse.Namespace, device: torch.device) -> tuple[Trainer, list[Round], list[Round]]:
    """Returns the trainer, the rounds with a thread, and those without."""
    plan = TrainPlan(
        train=config.train, model=config.model, diffusion=config.diffusion, dataset="", folder=str(folder), inputs="", threads=options.threads,
        group_timeout_s=60,
    )  # fmt: skip
    recipe = PixelSpace(image_size=config.data.image_size, mode=config.data.mode)
    manifest = a_manifest(recipe, 0, rows_file="", rows_sha256="", shards=())
    trainer = make_trainer(plan, manifest, device, None)
    attempt = Attempt(folder)
    place, beside, in_place = folder / "step_000000000-0000", [], []
    with CheckpointWriter(attempt, MetricsLogWriter(attempt), trainer.spec, config.train, print) as writer:
        for _ in range(options.rounds + 1):
            beside.append(one_round(trainer, options, lambda: writer.save(trainer.everything()), lambda: bool(checkpoints(folder))))
            writer.finish()
            clear(folder)
            in_place.append(one_round(trainer, options, lambda: timed(lambda: trainer.save(place)), lambda: True))
            clear(folder)
    return trainer, beside[1:], in_place[1:]


def timed(call: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def clear(folder: Location) -> None:
    """Removes the checkpoints of a round."""
    for path in checkpoints(folder):
        path.remove_tree()


def one_round(trainer: Trainer, options: argparse.Namespace, save: Callable[[], float], is_whole: Callable[[], bool]) -> Round:
    """Takes steps, a checkpoint, and steps until it is whole."""
    before = [step(trainer, options.batch) for _ in range(options.steps)]
    started = time.perf_counter()
    stall, after = save(), []
    while not is_whole():
        after.append(step(trainer, options.batch))
    return Round(stall, before, after, time.perf_counter() - started)


def step(trainer: Trainer, count: int) -> float:
    """Takes one step on noise and returns its seconds."""
    draw = np.random.default_rng(trainer.step)
    shape = (count, *trainer.spec.shape)
    pixels = torch.from_numpy(draw.integers(0, 256, shape, dtype=np.uint8))
    t, eps = torch.from_numpy(draw.integers(0, 1000, count)), torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))
    started = time.perf_counter()
    loss, _ = trainer.update(Batch(trainer.step, torch.arange(count), pixels, t, eps))
    float(loss)
    return time.perf_counter() - started


def report(options: argparse.Namespace, trainer: Trainer, beside: list[Round], in_place: list[Round]) -> None:
    """Prints the medians."""
    where = torch.cuda.get_device_name() if trainer.device.type == "cuda" else f"{options.threads} threads of {platform.machine()}"
    everything = trainer.everything()
    groups = (everything.ema, everything.state.weights, everything.state.optimizer, *everything.more_averages.values())
    size = sum(value.nbytes for group in groups for value in group.values())
    usual = statistics.median(seconds for one in (*beside, *in_place) for seconds in one.before)
    slowed = [seconds for one in beside for seconds in one.after]
    stall, straight = (statistics.median(one.stall for one in rounds) for rounds in (beside, in_place))
    print(f"{options.preset}, batch {options.batch}, {where}, torch {torch.__version__}, checkpoint of {size / 1e6:.0f} MB, medians of {options.rounds} rounds")
    print(f"step                             {usual:.3f} s")
    print(f"written in place, stands still   {straight:.3f} s")
    print(
        f"written by a thread, stands still {stall:.3f} s, {stall / straight:.3f} of that; whole after {statistics.median(one.whole for one in beside):.2f} s"
    )
    if slowed:
        extra = statistics.median(sum(seconds - usual for seconds in one.after) for one in beside)
        print(
            f"steps beside the writing         {statistics.median(slowed):.3f} s, {statistics.median(slowed) / usual:.2f} of a step; {extra:.2f} s more in all"
        )


if __name__ == "__main__":
    main()
