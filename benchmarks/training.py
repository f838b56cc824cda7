"""Times whole training steps, as `Trainer` takes them, beside diffusers' training script on a network of the same weights.

    python benchmarks/training.py [--preset cifar10] [--batch 16] [--rounds 5] [--steps 2] [--threads 2] [--only NAME,...] [--profile]

A step is forward, backward, clipping, AdamW and running average of L_simple on a batch that lies in memory, copied to the device. Each round times
every one in turn, so that what a machine does besides hits all of them. It prints medians: images per second, the share of this device's own
matrix product in bfloat16 (8192 cubed, 2048 cubed on CPUs), and ratios. `--profile` prints the time of each kind of kernel instead.
"""

import argparse
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import mse_loss
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import a_manifest

from components.data.batches import Batch, on_device
from components.networks.unet.diffusers import diffusers_config, to_diffusers
from components.networks.unet.network import UNet
from components.spaces.pixels import PixelSpace
from pipeline.config import RunConfig, load_config
from pipeline.training.arithmetic import prepare
from pipeline.training.plan import TrainPlan
from pipeline.training.trainer import Trainer, make_trainer
from workflows.preset_files import find_preset

Step = Callable[[], object]
CHANGES: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours eager": {"compile": False},
    "ours compiled": {"compile": True},
    "ours float32": {"precision": "float32"},
}
THEIRS = ("diffusers float32", "diffusers bf16", "diffusers bf16 compiled")


def main() -> None:
    """Runs the rounds and prints a table for each preset and batch size."""
    options = _options()
    torch.set_num_threads(options.threads)
    prepare(deterministic=options.deterministic)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceiling = matmul_flops(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{options.threads} threads of {platform.machine()} ({_kind_of_cpu()})"
    print(f"{where}, torch {torch.__version__}, bfloat16 matrix product {ceiling / 1e12:.2f} TFLOP/s\n", flush=True)
    for preset, batch in itertools.product(options.preset, options.batch):
        config = load_config(find_preset(preset), [f"train.global_batch_size={batch}", "train.lanes=1", "cluster.num_workers=1"])
        table(f"{preset}, batch {batch}", config, options, device, ceiling)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--rounds", 5), ("--steps", 2), ("--threads", os.cpu_count() or 1)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--preset", nargs="+", default=["cifar10"])
    parser.add_argument("--batch", nargs="+", type=int, default=[16])
    parser.add_argument("--only", default="ours,ours eager,diffusers float32,diffusers bf16", help=", ".join([*CHANGES, *THEIRS]))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--deterministic", action="store_true", help="use only operations that give the same bits each time, as train.deterministic does")
    return parser.parse_args()


def table(title: str, config: RunConfig, options: argparse.Namespace, device: torch.device, ceiling: float) -> None:
    """Times each step by turns and prints its medians."""
    print(f"{title}\n\n| step | images/s | TFLOP/s | of the matrix product | over ours | first step |\n|---|---|---|---|---|---|", flush=True)
    steps, first = {}, {}
    for name in options.only.split(","):
        try:
            made = make_step(name, config, device)
            first[name] = seconds(made, 1, device)
            steps[name] = made
            if options.profile:
                profile(name, made)
        except torch.OutOfMemoryError:
            print(f"| {name} | no room | | | | |", flush=True)
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 1):
        for name, step in steps.items():
            taken = seconds(step, options.steps, device)
            times[name] += [taken] if number else []
    if not options.rounds:
        return
    flops, batch = flops_per_image(config), config.train.global_batch_size
    ours = statistics.median(times["ours"]) if "ours" in times else None
    for name, taken in times.items():
        median = statistics.median(taken)
        speed = batch * options.steps / median
        over = "" if ours is None else f"{ours / median:.2f}"
        print(f"| {name} | {speed:.1f} | {speed * flops / 1e12:.2f} | {speed * flops / ceiling:.1%} | {over} | {first[name]:.1f} s |", flush=True)
    print(f"\n{flops / 1e9:.1f} GFLOP an image\n", flush=True)


def seconds(step: Step, count: int, device: torch.device) -> float:
    """Returns how long some steps take, the device's queue included."""
    started = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_flops(device: torch.device) -> float:
    """Returns operations per second of a large matrix product in bfloat16 on this device."""
    size = 8192 if device.type == "cuda" else 2048
    one, other = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    times = [seconds(lambda: one @ other, 5, device) for _ in range(4)]
    return 5 * 2 * size**3 / statistics.median(times[1:])


def flops_per_image(config: RunConfig) -> float:
    """Returns the operations of one forward and backward pass of one image."""
    unet, shape = _unet(config), config.data.space.shape
    with FlopCounterMode(display=False) as counter:
        unet(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64)).sum().backward()
    return float(counter.get_total_flops())


def _unet(config: RunConfig) -> UNet:
    unet = config.model.build(config.data.space.shape)
    assert isinstance(unet, UNet)
    return unet


def make_step(name: str, config: RunConfig, device: torch.device) -> Step:
    """Returns one step of ours or theirs."""
    if name in THEIRS:
        return theirs(config, device, bf16="bf16" in name, compiled="compiled" in name)
    config = config.model_copy(update={"train": config.train.model_copy(update=CHANGES[name])})
    trainer = _trainer(config, device)
    batches = on_device(batches_of(config), device)
    return lambda: trainer.update(next(batches))


def _trainer(config: RunConfig, device: torch.device) -> Trainer:
    plan = TrainPlan(train=config.train, model=config.model, diffusion=config.diffusion, dataset="", folder="", inputs="", threads=1, group_timeout_s=60)
    recipe = PixelSpace(image_size=config.data.image_size, mode=config.data.mode)
    return make_trainer(plan, a_manifest(recipe, 0, rows_file="", rows_sha256="", shards=()), device, None)


def batches_of(config: RunConfig) -> Iterator[Batch]:
    """Yields batches of noise without end, four different ones."""
    draw, count, shape = np.random.default_rng(0), config.train.global_batch_size, config.data.space.shape
    made: list[Batch] = []
    for step in range(4):
        pixels, eps = draw.integers(0, 256, (count, *shape), dtype=np.uint8), draw.standard_normal((count, *shape), dtype=np.float32)
        keys = draw.integers(-(2**31), 2**31, (count, config.model.num_dropouts, 2), dtype=np.int32) if config.model.num_dropouts else None
        t = torch.from_numpy(draw.integers(0, config.diffusion.num_steps, count))
        parts = (torch.arange(count), torch.from_numpy(pixels), t, torch.from_numpy(eps))
        made.append(Batch(step, *parts, keys=None if keys is None else torch.from_numpy(keys)))
    while True:
        yield from made


def theirs(config: RunConfig, device: torch.device, *, bf16: bool, compiled: bool) -> Step:
    """Returns a step as diffusers' train_unconditional.py takes it: DDPMScheduler, clipping, AdamW, EMAModel, autocast where it is asked for."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    ours, shape = _unet(config), config.data.space.shape
    made: Any = UNet2DModel(**diffusers_config(ours, shape))
    made.load_state_dict(to_diffusers(ours))
    made = made.to(device).train()
    network = torch.compile(made) if compiled else made
    scheduler: Any = DDPMScheduler(num_train_timesteps=config.diffusion.num_steps)
    optimizer = torch.optim.AdamW(made.parameters(), lr=config.train.lr)
    average = EMAModel(made.parameters(), decay=0.9999, use_ema_warmup=True, model_cls=UNet2DModel, model_config=made.config)
    average.to(device)
    batches = batches_of(config)

    def step() -> torch.Tensor:
        batch = next(batches)
        images, eps, t = batch.data.to(device).float() / 127.5 - 1, batch.eps.to(device), batch.t.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = network(scheduler.add_noise(images, eps, t), t).sample
        loss = mse_loss(output.float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(made.parameters())
        return loss

    return step


def profile(name: str, step: Step) -> None:
    """Prints the time of each kind of kernel in five steps."""
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(5):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(f"\n{name}\n{found.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90)}", flush=True)


def _kind_of_cpu() -> str:
    return "AMX" if torch.cpu._is_amx_tile_supported() else "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else torch.backends.cpu.get_cpu_capability()


if __name__ == "__main__":
    main()
