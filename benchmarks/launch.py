"""Times the same training steps under Ray Train and under torchrun, by turns, and prints what Ray Train costs a step.

    python benchmarks/launch.py [--preset cifar10-small] [--workers 1 2] [--steps 60] [--rounds 3] [section.key=value ...]

Both run the Trainer, its batches from shards on disk, and DDP over gloo or NCCL; torchrun without curve, checkpoints, heartbeats or watchdog. The data
are the built-in digits, at the size and in the colours of the preset. The rate is the median over windows of ten steps, the first one left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from components.data.batches import on_device
from components.data.reader import RowReader
from components.data.shards import read_manifest
from components.storage import Location
from pipeline.config import load_config
from pipeline.training.arithmetic import prepare, threads_that_pay
from pipeline.training.plan import TrainPlan
from pipeline.training.trainer import make_batch_plan, make_trainer
from workflows.preset_files import find_preset

WINDOW = 10


def main() -> None:
    """Runs the rounds, or one worker of torchrun."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10-small")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    for name, default in (("--steps", 60), ("--rounds", 3)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--dataset", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    if options.dataset:
        work(options)
        return
    print(f"{options.preset} {' '.join(options.overrides)}, torch {torch.__version__}, {os.cpu_count()} CPUs, medians of {options.rounds} rounds\n")
    print("| workers | Ray Train, images/s | torchrun, images/s | Ray Train's step over torchrun's |\n|---|---|---|---|", flush=True)
    for workers in options.workers:
        with tempfile.TemporaryDirectory() as folder:
            rounds = [(under_ray(options, workers, Path(folder), number), under_torchrun(options, workers, Path(folder))) for number in range(options.rounds)]
        rays, plain = (statistics.median(rates) for rates in zip(*rounds, strict=True))
        ratio = statistics.median(theirs / ours for ours, theirs in rounds)
        print(f"| {workers} | {rays:.1f} | {plain:.1f} | {ratio:.3f} |", flush=True)


def settings(options: argparse.Namespace, workers: int) -> list[str]:
    """Returns the settings of both."""
    steps = [f"train.steps={options.steps}", f"train.log_every={WINDOW}", f"train.checkpoint_every={options.steps}", f"train.sample_every={options.steps * 2}"]
    return ["data.source=digits", f"cluster.num_workers={workers}", *steps, *options.overrides]


def under_ray(options: argparse.Namespace, workers: int, folder: Path, number: int) -> float:
    """Returns the rate of `ddpm train`."""
    command = [sys.executable, "-m", "workflows", "train", options.preset, *settings(options, workers), f"cluster.storage={folder}", f"train.seed={number}"]
    receipts = json.loads(_output([*command, "--name", f"round-{number}", "--json"]))
    (folder / "dataset").write_text(receipts["preprocess"]["path"])
    curve = [json.loads(line) for file in Path(receipts["train"]["folder"]).rglob("*.jsonl") for line in file.read_text().splitlines()]
    points = sorted((line["step"], line["metrics"]["perf/images_per_second"]) for line in curve if "perf/images_per_second" in line.get("metrics", {}))
    return statistics.median(rate for _, rate in points[1:])


def under_torchrun(options: argparse.Namespace, workers: int, folder: Path) -> float:
    """Returns the rate of this file's `work` under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers), __file__]
    command += ["--preset", options.preset, "--workers", str(workers), "--steps", str(options.steps), "--dataset", (folder / "dataset").read_text()]
    return float(_output([*command, *options.overrides]).splitlines()[-1])


def _output(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def work(options: argparse.Namespace) -> None:
    """Trains as one worker of torchrun, and prints the rate where it is the first."""
    rank, world, on_gpu = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.cuda.is_available()
    config = load_config(find_preset(options.preset), settings(options, options.workers[0]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    prepare(deterministic=False)
    device, dataset = torch.device("cuda", rank) if on_gpu else torch.device("cpu"), Location.of(options.dataset)
    manifest = read_manifest(dataset)
    plan = TrainPlan(train=config.train, model=config.model, diffusion=config.diffusion, dataset="", folder="", inputs="", threads=1, group_timeout_s=60)
    trainer, batches = make_trainer(plan, manifest, device, None), make_batch_plan(plan, manifest)
    lanes = batches.lanes_of(rank, world)
    if world > 1:
        trainer.stepper.network = DistributedDataParallel(trainer.network, broadcast_buffers=False, gradient_as_bucket_view=True)
    if not on_gpu:
        torch.set_num_threads(threads_that_pay(torch.get_num_threads(), trainer.pass_flops(len(lanes) * batches.order.rows_per_lane)))
    rates, started = [], time.perf_counter()
    for batch in on_device(batches.batches(RowReader(dataset, manifest), range(options.steps), lanes), device):
        loss, _ = trainer.update(batch)
        if trainer.step % WINDOW == 0:
            float(loss)
            rates.append(WINDOW * config.train.global_batch_size / (time.perf_counter() - started))
            started = time.perf_counter()
    torch.distributed.destroy_process_group()
    if rank == 0:
        print(statistics.median(rates[1:]))


if __name__ == "__main__":
    main()
