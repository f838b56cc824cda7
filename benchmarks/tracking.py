"""Measures what tracking costs a training step: the same steps with and without it, interleaved, MLflow on the same machine.

    python benchmarks/tracking.py [--preset cifar10-small] [--log-every 1] [--steps 60] [--rounds 5] [--store server|sqlite]

A tracked round writes its metrics log and system metrics, and another process delivers them while it trains, as the driver does; a bare round
does none of that. Both run the loop of pipeline/training/loop.py with one worker, on noise for images. The time of a round is that from its
first step's start to its last one's end. MLflow's own server, or SQLite in the delivering process, takes its share of the same CPUs.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from servers import mlflow_server
from support import write_dataset

from cluster.config import ClusterConfig
from cluster.key_value_store import KeyValueStore
from components.data.batches import Batch
from components.data.reader import RowReader
from components.data.shards import read_manifest
from components.storage import Location
from pipeline.config import RunConfig, load_config
from pipeline.context import Reporter, StageContext
from pipeline.tracking import connect
from pipeline.training.heartbeat import Heartbeat
from pipeline.training.loop import MetricsWindow, Worker
from pipeline.training.metrics_log import Attempt, MetricsLogWriter, read_metrics
from pipeline.training.metrics_relay import MetricsRelay
from pipeline.training.plan import TrainPlan
from pipeline.training.system_watch import SystemMetricsMonitor
from pipeline.training.trainer import Trainer, make_batch_plan, make_trainer
from workflows.preset_files import find_preset


class Meter:
    """Adds up what functions take: calls, wall seconds, and CPU seconds of the thread that called them."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = defaultdict(int)
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)

    def wrap(self, owner: type, name: str) -> None:
        """Replaces a method by one that is metered."""
        method, label = getattr(owner, name), f"{owner.__name__}.{name}"

        def metered(*arguments: Any, **options: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return method(*arguments, **options)
            finally:
                self.calls[label] += 1
                self.wall[label] += time.perf_counter() - wall
                self.cpu[label] += time.thread_time() - cpu

        setattr(owner, name, metered)


def main() -> None:
    """Runs the rounds and prints the table."""
    if sys.argv[1:2] == ["--deliver"]:
        deliver(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--steps", 60), ("--rounds", 5), ("--threads", os.cpu_count() or 1), ("--log-every", 0)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--preset", default="cifar10-small")
    parser.add_argument("--store", choices=("server", "sqlite"), default="server")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = load_config(find_preset(options.preset), [f"train.steps={options.steps}"])
    every = {"log_every": options.log_every or config.train.log_every, "checkpoint_every": 10**9, "sample_every": 10**9}
    config = config.model_copy(update={"train": config.train.model_copy(update=every)})
    with tempfile.TemporaryDirectory(prefix="ddpm-tracking-") as folder:
        measure(config, Path(folder), options)


def measure(config: RunConfig, folder: Path, options: argparse.Namespace) -> None:
    """Measures all rounds below a folder."""
    shape = (512, *config.data.space.shape)
    dataset = Location.of(folder / "dataset" / "noise")
    write_dataset(dataset, [np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)], ["noise"])
    meter, processes = Meter(), 0.0
    for owner, name in (
        (MetricsWindow, "line"),
        (MetricsLogWriter, "append"),
        (MetricsLogWriter, "flush"),
        (SystemMetricsMonitor, "look"),
        (SystemMetricsMonitor, "_note"),
    ):
        meter.wrap(owner, name)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    lines = 0
    with ExitStack() as stack:
        server = stack.enter_context(mlflow_server(folder / "mlflow")) if options.store == "server" else None
        if server:
            os.environ["MLFLOW_TRACKING_URI"] = server
        others = psutil.Process().children(recursive=True)
        for number in range(options.rounds + 1):
            for tracked in (number % 2 == 0, number % 2 == 1):
                storage = folder / f"{number}-{tracked}"
                with delivering(storage, options.steps) if tracked else no_delivery() as driver:
                    before = sum(cpu_seconds(process) for process in others)
                    taken = train(config, dataset, Location.of(storage / "train"), options.threads, tracked)
                if number:
                    seconds[tracked].append(taken)
                if number and tracked:
                    processes += driver() + sum(cpu_seconds(process) for process in others) - before
                    lines += len(read_metrics(Location.of(storage / "train")))
                if not number:
                    meter.calls.clear(), meter.wall.clear(), meter.cpu.clear()
    report(config, options, meter, seconds, processes, lines)


def train(config: RunConfig, dataset: Location, folder: Location, threads: int, tracked: bool) -> float:
    """Trains from fresh weights and returns the seconds of a step."""
    manifest = read_manifest(dataset)
    plan = TrainPlan(
        train=config.train, model=config.model, diffusion=config.diffusion, dataset=str(dataset), folder=str(folder), inputs="", threads=threads,
        group_timeout_s=60,
    )  # fmt: skip
    trainer, stamps, update = make_trainer(plan, manifest, torch.device("cpu"), None), [], Trainer.update

    def stamped(self: Trainer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        stamps.append(time.perf_counter())
        done = update(self, batch)
        stamps.append(time.perf_counter())
        return done

    with (
        mock.patch.object(Trainer, "update", stamped),
        mock.patch("pipeline.training.checkpoint_writer.write_checkpoint"),
        mock.patch.object(Worker, "_draw", return_value=0.0),
    ):
        run(trainer, plan, dataset, Attempt(folder) if tracked else None)
    return (stamps[-1] - stamps[0]) / trainer.step


def run(trainer: Trainer, plan: TrainPlan, dataset: Location, attempt: Attempt | None) -> None:
    """Runs the loop of a worker."""
    manifest = read_manifest(dataset)
    watch = SystemMetricsMonitor(attempt, 0, alone=True) if attempt else None
    with ExitStack() as stack:
        if watch:
            stack.enter_context(watch)
        heartbeat = Heartbeat(KeyValueStore("benchmark"), 1, 0, 1, node_id="", node="", first=0)
        worker = Worker(trainer, make_batch_plan(plan, manifest), RowReader(dataset, manifest), heartbeat, watch, 0, 1)
        worker.lead(attempt) if attempt else worker.follow()


@contextmanager
def delivering(storage: Path, steps: int) -> Iterator[Callable[[], float]]:
    """Runs the driver's part in a process of its own; gives a function that tells, after the block, how many CPU seconds it took."""
    command = [sys.executable, __file__, "--deliver", str(storage), f"sqlite:///{storage.parent}/mlflow.db", str(steps)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "ready\n"
        answer: list[float] = []
        yield lambda: answer[0]
        child.stdin.close()
        answer.append(float(child.stdout.readline()))


@contextmanager
def no_delivery() -> Iterator[Callable[[], float]]:
    """Runs nothing beside a block."""
    yield lambda: 0.0


def deliver(storage: Path, uri: str, steps: int) -> None:
    """Follows a training folder until standard input ends, and says how many CPU seconds that took."""
    os.environ.setdefault("MLFLOW_TRACKING_URI", uri)
    root = Location.of(storage)
    tracking = connect(root)
    run_id = tracking.open_run("benchmark", storage.name, None)
    context = StageContext(root, root / "train", "", storage.name, ClusterConfig(storage=str(root)), Reporter())
    tracking.log_metrics(run_id, [(0, 0, {"first": 0.0})])  # what the first request of a process takes is no line's cost
    before = time.process_time()
    with MetricsRelay(context, tracking, run_id, steps):
        print("ready", flush=True)
        sys.stdin.read()
    print(time.process_time() - before, flush=True)


def cpu_seconds(process: psutil.Process) -> float:
    """Returns the CPU seconds that a process has taken."""
    times = process.cpu_times()
    return times.user + times.system


def report(config: RunConfig, options: argparse.Namespace, meter: Meter, seconds: dict[bool, list[float]], processes: float, lines: int) -> None:
    """Prints what was found."""
    step, bare = statistics.median(seconds[True]), statistics.median(seconds[False])
    print(
        f"{options.preset}, batch {config.train.global_batch_size}, a line every {config.train.log_every} steps, {options.steps} steps, {options.rounds} rounds"
    )
    print(f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} CPUs, {options.threads} threads, torch {torch.__version__}")
    print(f"bare {bare * 1e3:.1f} ms a step, tracked {step * 1e3:.1f} ms, tracked / bare {step / bare:.4f} (medians)")
    spread = [max(values) / min(values) for values in seconds.values()]
    print(f"slowest / fastest round: bare {spread[1]:.3f}, tracked {spread[0]:.3f}")
    per_line = bare * config.train.log_every
    on_its_way = ("MetricsWindow.line", "MetricsLogWriter.append", "SystemMetricsMonitor.look")
    beside = sum(meter.cpu[label] for label in ("MetricsLogWriter.flush", "SystemMetricsMonitor._note")) / lines
    for what, cost in (
        ("the training thread, time", sum(meter.wall[label] for label in on_its_way) / lines),
        ("the training thread, CPU", sum(meter.cpu[label] for label in on_its_way) / lines),
        ("other threads of the worker, CPU", beside),
        (f"driver and MLflow ({options.store}), CPU", processes / lines),
    ):
        print(f"{what:40} {cost * 1e6:9.0f} microseconds a line = {cost / per_line * 100:.3f} % of a step")
    print(f"driver and MLflow: {processes / lines * 1000:.2f} CPU seconds for 1,000 lines of six values")


if __name__ == "__main__":
    main()
