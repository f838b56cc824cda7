"""Times sampling beside diffusers' pipeline, and the metric stage beside torch-fidelity, interleaved; prints Markdown tables of medians.

    python benchmarks/evaluate.py [--preset cifar10-small] [--images 64] [--steps 20] [--measured 256] [--rounds 5] [--threads CORES]

Sampling: our `sample` and diffusers' DDIMPipeline draw as many images, by the same network (ours carried over), DDIM with as many steps.
Metrics: the Inception network has random weights, which cost what the trained ones do. Our features, statistics, distance, Inception score,
kernel distance of two folders of images, beside one call of torch-fidelity's `calculate_metrics` for the same numbers.
Distance: the Frechet distance of 2048-dimensional statistics, beside torch-fidelity's and scipy's way.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from components.diffusion.batch_size import MOST_ON_GPU, ON_CPU
from components.diffusion.precision import prepared
from components.diffusion.recipe import Precision, Recipe
from components.diffusion.sampling import sample
from components.diffusion.schedule import Schedule
from components.metrics.features import InceptionExtractor
from components.metrics.frechet import frechet_distance
from components.metrics.inception_score import inception_score
from components.metrics.kernel import kernel_distance
from components.metrics.moments import FeatureStats
from components.metrics.reference import Reference
from components.model.manifest import sha256_of
from components.networks.unet.diffusers import diffusers_config, to_diffusers
from components.spaces.pixels import to_pixels
from pipeline.config import RunConfig, load_config
from workflows.preset_files import find_preset

BATCH = 64


def main() -> None:
    """Runs the rounds and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10-small")
    for name, default in (("--images", 64), ("--steps", 20), ("--measured", 256), ("--rounds", 5), ("--threads", os.cpu_count() or 1)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--only-sampling", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    print(f"{machine}, {options.threads} threads, torch {torch.__version__}, medians of {options.rounds} rounds\n")
    config = load_config(find_preset(options.preset))
    print(f"| {options.images} images, DDIM {options.steps} steps, {options.preset} | images/s | of diffusers |\n|---|---|---|")
    report(interleaved(samplers(config, options.images, options.steps, device), options.rounds), "diffusers", options.images)
    if options.only_sampling:
        return
    print(f"\n| {options.measured} against {options.measured} images of 32x32, Inception | images/s | of torch-fidelity |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        report(interleaved(metrics(Path(folder), options.measured, device), options.rounds), "torch-fidelity", 2 * options.measured)
    print("\n| Frechet distance of 2048 features | seconds | of torch-fidelity |\n|---|---|---|")
    times = interleaved(distances(), max(2, options.rounds // 2))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {median / medians['torch-fidelity']:.2f} |")


def report(times: dict[str, list[float]], baseline: str, images: int) -> None:
    """Prints rates, and the ratio of every contender's to the baseline's."""
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"| {name} | {images / median:.2f} | {medians[baseline] / median:.2f} |")


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of every contender in every round, after a round of warming up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, call in contenders.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - started)
    return times


def samplers(config: RunConfig, images: int, steps: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Returns our sampler and diffusers' pipeline over the same network."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    ours: Any = config.model.build(config.data.space.shape)
    theirs: Any = UNet2DModel(**diffusers_config(ours, config.data.space.shape))  # pyrefly: ignore[bad-argument-type]
    theirs.load_state_dict(to_diffusers(ours))
    prediction = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}[config.diffusion.prediction]
    scheduler = DDIMScheduler(trained_betas=Schedule(config.diffusion).betas.numpy(), prediction_type=prediction, timestep_spacing="linspace")
    pipeline: Any = DDIMPipeline(theirs.to(device).eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    ours, schedule = ours.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False), Schedule(config.diffusion).to(device)
    batch = MOST_ON_GPU if device.type == "cuda" else ON_CPU

    def ours_in(precision: Precision, evaluations: int = 0) -> Callable[[], None]:
        network, recipe = prepared(ours, precision, device, evaluations), Recipe(steps=steps, precision=precision)

        def draw() -> None:
            for first in range(0, images, batch):
                seeds = range(first, min(first + batch, images))
                to_pixels(sample(network, schedule, seeds, config.data.space.shape, recipe, device=device)).cpu()

        return draw

    def draw_theirs() -> None:
        for first in range(0, images, batch):
            generator = torch.Generator().manual_seed(first)
            pipeline(batch_size=min(batch, images - first), generator=generator, num_inference_steps=steps, output_type="np")

    found: dict[str, Callable[[], object]] = {"ours, float32": ours_in("float32"), "ours, bfloat16": ours_in("bfloat16"), "diffusers": draw_theirs}
    return found | ({"ours, bfloat16, compiled": ours_in("bfloat16", 10**12)} if device.type == "cuda" else {})


def metrics(folder: Path, count: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Returns our metrics and torch-fidelity's over the same images, each from two folders of PNG files on."""
    import torch_fidelity

    weights = random_inception(folder)
    rng = np.random.default_rng(0)
    folders = [folder / "one", folder / "other"]
    for number, target in enumerate(folders):
        target.mkdir()
        for index in range(count):
            Image.fromarray(rng.integers(0, 256 - 64 * number, (32, 32, 3), dtype=np.uint8)).save(target / f"{index:05d}.png")
    extractor = InceptionExtractor(weights, device, expected_sha256=sha256_of(weights))

    def ours() -> None:
        found = []
        for target in folders:
            pixels = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in sorted(target.iterdir())])
            parts = [extractor.with_logits(torch.from_numpy(pixels[first : first + BATCH])) for first in range(0, count, BATCH)]
            found.append([np.concatenate(arrays) for arrays in zip(*parts, strict=True)])
        (fake, logits), (real, _) = found
        reference = Reference.of(FeatureStats.of(real, real.astype(np.float64).mean(axis=0)))
        frechet_distance(FeatureStats.of(fake, reference.mean), reference)
        kernel_distance(fake, real)
        inception_score(logits)

    def theirs() -> None:
        torch_fidelity.calculate_metrics(
            input1=str(folders[0]),
            input2=str(folders[1]),
            cuda=device.type == "cuda",
            isc=True,
            fid=True,
            kid=True,
            kid_subset_size=min(1000, count),
            batch_size=BATCH,
            cache=False,
            verbose=False,
            feature_extractor_weights_path=str(weights),
        )

    return {"ours": ours, "torch-fidelity": theirs}


def random_inception(folder: Path) -> Path:
    """Returns a file of random weights in the form of torch-fidelity's."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with torch.random.fork_rng(devices=[]), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"), mock.patch("torch.load"):
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


def distances() -> dict[str, Callable[[], object]]:
    """Returns three ways to the Frechet distance of the same statistics."""
    import scipy.linalg
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    rng = np.random.default_rng(0)
    sets = [rng.standard_normal((4096, 2048)) @ np.diag(np.linspace(0.1, 1 + number, 2048)) for number in range(2)]
    stats = [FeatureStats.of(values, values.mean(axis=0)) for values in sets]
    reference = Reference.of(stats[1])
    plain = [{"mu": stat.mean, "sigma": stat.covariance} for stat in stats]
    return {
        "ours, reference kept": lambda: frechet_distance(stats[0], reference),
        "ours, reference and all": lambda: frechet_distance(stats[0], Reference.of(stats[1])),
        "torch-fidelity": lambda: fid_statistics_to_metric(plain[0], plain[1], verbose=False),
        "scipy.linalg.sqrtm": lambda: scipy.linalg.sqrtm(plain[0]["sigma"] @ plain[1]["sigma"]),
    }


if __name__ == "__main__":
    main()
