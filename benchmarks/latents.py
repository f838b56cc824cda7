"""Times what latents cost and save: encoding beside a plain loop of diffusers, and training steps in latents beside steps in pixels.

    python benchmarks/latents.py encode [--images FOLDER] [--size 64] [--count 512] [--rounds 3] [--base 32]
    python benchmarks/latents.py steps [--size 256] [--batch 2] [--rounds 3] [--steps 1] [--only "NAME;..."]
    python benchmarks/latents.py dit [--model B] [--batch 256] [--rounds 3] [--steps 10]

`encode` runs the stage (read shards, encode, write shards and manifest; one thread for each CPU, or the GPU) and the loop (the same images in memory,
64 at a time by all threads, nothing written) by turns, with one autoencoder of random weights. `steps` takes whole training steps of one batch, each kind
in a process of its own whose memory is that of the step alone: the U-Net of `celeba64` at --size in pixels, the same network (four levels of it) and
DiT-S/2 in latents of an eighth of the sides. `dit` times DiT's steps at 32x32 latents of 4 channels, and their share of a bfloat16 matrix product.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent))

from training import matmul_flops, seconds  # pyrefly: ignore[missing-import]  (the file beside this one)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import a_manifest

from components.autoencoder.store import read_autoencoder
from components.data.batches import Batch, on_device
from components.data.reader import RowReader
from components.data.shards import read_manifest
from components.networks.config import NetworkConfig
from components.networks.dit.config import DiTConfig
from components.networks.unet.config import UNetConfig
from components.spaces.latents import LatentSpace
from components.spaces.pixels import PixelSpace
from components.spaces.space import Space
from components.storage import Location
from pipeline.config import load_config
from pipeline.context import Reporter, StageContext
from pipeline.encode import encode, space_of
from pipeline.run import run
from pipeline.training.arithmetic import prepare
from pipeline.training.plan import TrainPlan
from pipeline.training.trainer import make_trainer
from workflows.preset_files import PRESETS, find_preset

PIXELS, LATENT_UNET, LATENT_DIT = "U-Net, pixels", "U-Net, latents", "DiT-S/2, latents"


def main() -> None:
    """Runs the part that is asked for and prints its table."""
    options = _options()
    prepare(deterministic=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not options.child:
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPUs"
        print(f"{name}, torch {torch.__version__}\n", flush=True)
    {"encode": measure_encoding, "steps": measure_steps, "dit": measure_dit}[options.part](options, device)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["encode", "steps", "dit"])
    for name, default in (("--size", None), ("--count", 512), ("--rounds", 3), ("--batch", None), ("--steps", None), ("--base", 32)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--images", help="a folder of images; noise by default")
    parser.add_argument("--model", default="B", choices=["S", "B", "L", "XL"])
    parser.add_argument("--only", default=";".join([PIXELS, LATENT_UNET, LATENT_DIT]))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_encoding(options: argparse.Namespace, device: torch.device) -> None:
    """Times the stage and the loop by turns."""
    size, times = options.size or 64, {"stage": [], "loop": []}
    with tempfile.TemporaryDirectory() as work:
        network, shards = _autoencoder(Path(work) / "autoencoder", options.base), _dataset(Path(work), options, size)
        files = read_autoencoder(Location.of(Path(work) / "autoencoder"))
        reader = RowReader(Location.of(shards.path), read_manifest(Location.of(shards.path)))
        images = reader.rows(np.arange(len(reader)))
        for number in range(options.rounds):
            context = _context(Path(work) / f"storage-{number}", device)
            started = time.perf_counter()
            encode(shards, space_of(shards, files, mirrors=False), files, context=context, anew=False)
            times["stage"].append(time.perf_counter() - started)
            times["loop"].append(_loop(network.to(device), images, device))
    loop = statistics.median(times["loop"])
    print(f"{len(images)} images of {size}x{size}, autoencoder f8 of base {options.base}\n\n| | images/s | of the loop |\n|---|---|---|")
    for name, taken in times.items():
        print(f"| {name} | {len(images) / statistics.median(taken):.1f} | {loop / statistics.median(taken):.2f} |")


def _autoencoder(folder: Path, base: int) -> Any:
    from diffusers import AutoencoderKL

    levels = 4
    blocks: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    network: Any = AutoencoderKL(**blocks, block_out_channels=(base, 2 * base, 4 * base, 4 * base), layers_per_block=2, latent_channels=4, norm_num_groups=32)
    network.save_pretrained(folder)
    return network.eval()


def _dataset(work: Path, options: argparse.Namespace, size: int) -> Any:
    source = options.images
    if source is None:
        from PIL import Image

        source = str(work / "images")
        for number in range(options.count):
            file = work / "images" / f"{number:05d}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)
    # Shards as large as those of a dataset of some hundred thousand images would be too few here to be shared out.
    overrides = [f"data.source={source}", f"data.image_size={size}", f"cluster.storage={work / 'pixels'}", f"data.shard_bytes={size * size * 3 * 64}"]
    return run(load_config(find_preset("cifar10"), overrides), "benchmark", until="preprocess", reporter=Reporter())["preprocess"].receipt


def _context(folder: Path, device: torch.device) -> StageContext:
    cluster = load_config(PRESETS / "digits.yaml", [f"cluster.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}"]).cluster
    return StageContext(Location.of(folder), Location.of(folder / "stage"), "benchmark", "benchmark", cluster, Reporter())


@torch.inference_mode()
def _loop(network: Any, images: np.ndarray, device: torch.device) -> float:
    started = time.perf_counter()
    for first in range(0, len(images), 64):
        batch = torch.from_numpy(images[first : first + 64]).to(device).float() / 127.5 - 1
        posterior = network.encode(batch).latent_dist
        torch.cat([posterior.mean, posterior.std], dim=1).half().cpu()
    return time.perf_counter() - started


def measure_steps(options: argparse.Namespace, device: torch.device) -> None:
    """Times the steps, each kind in a process of its own, by turns, and prints their medians."""
    if options.child:
        print(json.dumps(_one_kind(options, device)))
        return
    names, found = options.only.split(";"), {}
    for number in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, "steps", "--child", name, *_passed(options)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}: {name} {found[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    print(f"{options.batch or 2} images of {options.size or 256}x{options.size or 256}\n")
    print("| step | parameters | GFLOP an image | s a step | of pixels | memory above idle | of pixels |\n|---|---|---|---|---|---|---|")
    base = {key: statistics.median(each[key] for each in found[names[0]]) for key in ("seconds", "bytes")}
    for name, each in found.items():
        median = {key: statistics.median(one[key] for one in each) for key in each[0]}
        took, held = median["seconds"], median["bytes"]
        size = f"{median['parameters'] / 1e6:.1f} M | {median['flops'] / 1e9:.1f}"
        print(f"| {name} | {size} | {took:.3f} | {took / base['seconds']:.3f} | {held / 2**30:.2f} GiB | {held / base['bytes']:.3f} |")


def _passed(options: argparse.Namespace) -> list[str]:
    given = {"--size": options.size, "--batch": options.batch, "--steps": options.steps}
    return [part for name, value in given.items() if value is not None for part in (name, str(value))]


def _one_kind(options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    size, batch, steps = options.size or 256, options.batch or 2, options.steps or 1
    pixels = PixelSpace(image_size=size)
    latents = LatentSpace(pixels=pixels, autoencoder="", latent=(4, size // 8, size // 8))
    unet = load_config(find_preset("celeba64")).model
    assert isinstance(unet, UNetConfig)
    small = unet.model_copy(update={"channel_mults": unet.channel_mults[:4]})
    network, space = {PIXELS: (unet, pixels), LATENT_UNET: (small, latents), LATENT_DIT: (DiTConfig(), latents)}[options.child]
    idle = _memory(device)
    found = _timed(network, space, batch, steps, 1, device)
    return {"seconds": found[0][0] / steps, "bytes": _memory(device) - idle, "parameters": found[1], "flops": found[2]}


def _memory(device: torch.device) -> float:
    """Returns the most memory so far, bytes: the GPU's, or this process's."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def measure_dit(options: argparse.Namespace, device: torch.device) -> None:
    """Times DiT's training steps on latents of 32x32x4."""
    batch, steps = options.batch or (256 if device.type == "cuda" else 2), options.steps or (10 if device.type == "cuda" else 1)
    ceiling = matmul_flops(device)
    space = LatentSpace(pixels=PixelSpace(image_size=256), autoencoder="", latent=(4, 32, 32))
    times, parameters, flops = _timed(DiTConfig(size=options.model), space, batch, steps, options.rounds, device)
    speed = batch * steps / statistics.median(times)
    print(f"DiT-{options.model}/2, {parameters / 1e6:.0f} M parameters, batch {batch}, {flops / 1e9:.0f} GFLOP an image\n")
    print(f"| images/s | TFLOP/s | of the bfloat16 matrix product ({ceiling / 1e12:.1f} TFLOP/s) |\n|---|---|---|")
    print(f"| {speed:.1f} | {speed * flops / 1e12:.2f} | {speed * flops / ceiling:.1%} |")


def _timed(model: NetworkConfig, space: Space, batch: int, steps: int, rounds: int, device: torch.device) -> tuple[list[float], int, float]:
    """Returns the seconds of some steps, round by round behind a first step, the network's parameters, and operations of an image there and back."""
    config = load_config(find_preset("cifar10"), [f"train.global_batch_size={batch}", "train.lanes=1", "cluster.num_workers=1"])
    plan = TrainPlan(train=config.train, model=model, diffusion=config.diffusion, dataset="", folder="", inputs="", threads=1, group_timeout_s=60)
    trainer = make_trainer(plan, a_manifest(space, 0, rows_file="", rows_sha256="", shards=()), device, None)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model.build(space.shape)(torch.zeros(1, *space.shape), torch.zeros(1, dtype=torch.int64))
    batches = on_device(_batches(space, model.num_dropouts, batch), device)
    seconds(lambda: trainer.update(next(batches)), 1, device)
    times = [seconds(lambda: trainer.update(next(batches)), steps, device) for _ in range(rounds)]
    return times, sum(parameter.numel() for parameter in trainer.network.parameters()), 3.0 * counter.get_total_flops()


def _batches(space: Space, dropouts: int, batch: int) -> Iterator[Batch]:
    draw, shape = np.random.default_rng(0), (batch, *space.shape)
    values = draw.standard_normal(shape, dtype=np.float32)
    data = draw.integers(0, 256, shape, dtype=np.uint8) if space.kind == "pixels" else values
    keys = torch.from_numpy(draw.integers(-(2**31), 2**31, (batch, dropouts, 2), dtype=np.int32)) if dropouts else None
    t = torch.from_numpy(draw.integers(0, 1000, batch))
    made = Batch(0, torch.arange(batch), torch.from_numpy(data), t, torch.from_numpy(draw.standard_normal(shape, dtype=np.float32)), keys=keys)
    while True:
        yield made


if __name__ == "__main__":
    main()
