"""Times this project's U-Net beside diffusers' UNet2DModel of the same weights, interleaved, and prints ratios of medians.

    python benchmarks/training.py [--batch 16] [--rounds 7] [--threads 2] [--preset cifar10]

Each round times one forward and backward pass of L_simple, and one forward pass without gradient, of either network in turn.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from components.diffusion.objective import simple_loss
from components.diffusion.schedule import Schedule
from components.model.diffusers_names import diffusers_config, to_diffusers
from components.model.unet import UNet
from pipeline.config import load_config
from workflows.cli import find_preset


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Returns how long a call takes, the device's queue included."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--batch", 16), ("--rounds", 7), ("--threads", os.cpu_count() or 1)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--preset", default="cifar10")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(find_preset(options.preset))
    size, channels = config.data.image_size, 1 if config.data.mode == "L" else 3
    ours = UNet(config.model, image_size=size, channels=channels).to(device)
    networks = {"ours": ours.to(memory_format=torch.channels_last), "diffusers": make_diffusers(ours, size, channels).to(device)}
    times = measure(networks, Schedule(config.diffusion).to(device), (options.batch, channels, size, size), options.rounds, device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    print(f"{options.preset}, batch {options.batch}, float32, {machine}, {options.threads} threads, torch {torch.__version__}, medians of {options.rounds}")
    for what in ("forward and backward", "forward"):
        medians = {name: statistics.median(times[name, what]) for name in networks}
        ratio = medians["diffusers"] / medians["ours"]
        print(f"{what:22} ours {medians['ours']:.3f} s   diffusers {medians['diffusers']:.3f} s   diffusers / ours {ratio:.2f}")


def make_diffusers(ours: UNet, size: int, channels: int) -> torch.nn.Module:
    """Returns the diffusers network that computes what ours does."""
    from diffusers import UNet2DModel

    class Plain(torch.nn.Module):
        """Gives the tensor instead of diffusers' record."""

        def __init__(self) -> None:
            super().__init__()
            self.network: Any = UNet2DModel(**diffusers_config(ours, image_size=size, channels=channels))

        def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.network(x_t, t, return_dict=False)[0]

    plain = Plain()
    plain.network.load_state_dict(to_diffusers(ours))
    return plain


def measure(
    networks: dict[str, torch.nn.Module], schedule: Schedule, shape: tuple[int, ...], rounds: int, device: torch.device
) -> dict[tuple[str, str], list[float]]:
    """Returns the times of every network and pass, one per round after a round of warming up."""
    x_0, eps = torch.rand(shape, device=device) * 2 - 1, torch.randn(shape, device=device)
    t = torch.randint(0, schedule.num_steps, (shape[0],), device=device)
    times: dict[tuple[str, str], list[float]] = {(name, what): [] for name in networks for what in ("forward and backward", "forward")}
    for number in range(rounds + 1):
        for name, network in networks.items():
            taken = seconds(lambda network=network: simple_loss(network, schedule, x_0, eps, t).backward(), device)
            with torch.inference_mode():
                forward = seconds(lambda network=network: network(x_0, t), device)
            if number:
                times[name, "forward and backward"].append(taken)
                times[name, "forward"].append(forward)
    return times


if __name__ == "__main__":
    main()
