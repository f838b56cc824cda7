"""Actors that draw samples and measure pixels, and the team that deals work to them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cluster.placement import Placement

if TYPE_CHECKING:
    from components.metrics.features import Extractor
    from components.metrics.frechet import FeatureStats


@dataclass(frozen=True)
class Recipe:
    """How samples are drawn.

    Attributes:
        steps: network evaluations per image.
        batch_size: images drawn together.
    """

    sampler: Literal["ddim", "ancestral"]
    steps: int
    batch_size: int


@dataclass(frozen=True)
class ExtractorChoice:
    """Which extractor an actor builds: its kind, and the file or folder of its weights."""

    kind: Literal["inception", "classifier", "dct8"]
    path: str = ""

    def build(self, device: str) -> "Extractor":
        """Returns the extractor, its weights loaded and checked."""
        from components.metrics.classifier import ClassifierExtractor
        from components.metrics.features import DctExtractor, InceptionExtractor

        if self.kind == "inception":
            return InceptionExtractor(Path(self.path), device)
        return ClassifierExtractor(Path(self.path), device) if self.kind == "classifier" else DctExtractor()


class Sampler:
    """An actor: one denoiser and the extractors, on one CPU thread or one GPU."""

    def __init__(self, checkpoint: str, kinds: Sequence[ExtractorChoice], use_gpu: bool) -> None:
        import torch

        from components.model.checkpoint import load_denoiser

        torch.set_num_threads(1)
        self._device = "cuda" if use_gpu else "cpu"
        self._denoiser = load_denoiser(Path(checkpoint), self._device)
        self._extractors = [kind.build(self._device) for kind in kinds]

    def identities(self) -> list[tuple[str, str, str]]:
        """Returns (name, digest, preprocessing) of every extractor."""
        return [(extractor.name, extractor.digest, extractor.preprocessing) for extractor in self._extractors]

    def draw(self, recipe: Recipe, seeds: range) -> np.ndarray:
        """Returns the pixels (len(seeds), C, H, W) of some seeds, drawn batch by batch."""
        from components.data.images import to_pixels
        from components.diffusion.samplers import sample

        spec, parts = self._denoiser.spec, []
        for first in range(0, len(seeds), recipe.batch_size):
            x_0 = sample(
                self._denoiser.network,
                self._denoiser.schedule,
                seeds[first : first + recipe.batch_size],
                spec.shape,
                sampler=recipe.sampler,
                steps=recipe.steps,
                device=self._device,
            )
            parts.append(to_pixels(x_0).cpu().numpy())
        return np.concatenate(parts)

    def measure(self, pixels: np.ndarray, shifts: Sequence[np.ndarray]) -> "list[FeatureStats]":
        """Returns the feature statistics of pixels about the given shifts, one per extractor."""
        from components.metrics.features import features_in_batches
        from components.metrics.frechet import FeatureStats

        return [FeatureStats.of(features_in_batches(extractor, pixels, 64), shift) for extractor, shift in zip(self._extractors, shifts, strict=True)]

    def mean_of_first(self, which: int, pixels: np.ndarray) -> np.ndarray:
        """Returns the mean feature of some pixels by one extractor: a shift for the statistics of all."""
        from components.metrics.features import features_in_batches

        return features_in_batches(self._extractors[which], pixels, 64).astype(np.float64).mean(axis=0)

    def measure_one(self, which: int, pixels: np.ndarray, shift: np.ndarray) -> "FeatureStats":
        """Returns the feature statistics of pixels by one extractor."""
        from components.metrics.features import features_in_batches
        from components.metrics.frechet import FeatureStats

        return FeatureStats.of(features_in_batches(self._extractors[which], pixels, 64), shift)

    def part(self, recipe: Recipe, seeds: range, shifts: Sequence[np.ndarray], keep: bool) -> "tuple[list[FeatureStats], bytes, np.ndarray | None]":
        """Draws one part of the seeds; returns its statistics, the checksum of its pixels, and the pixels if they are to be kept."""
        pixels = self.draw(recipe, seeds)
        return self.measure(pixels, shifts), hashlib.sha256(pixels.tobytes()).digest(), pixels if keep else None

    def animation(self, recipe: Recipe, first_seed: int, count: int, frames: int) -> list[np.ndarray]:
        """Returns the estimates of x_0 while the first seeds are drawn: pixels (count, C, H, W) for each of some steps."""
        from components.data.images import to_pixels
        from components.diffusion.samplers import sample

        shown = set(np.linspace(0, recipe.steps - 1, min(frames, recipe.steps)).round().astype(int).tolist())
        pictures: list[np.ndarray] = []
        sample(
            self._denoiser.network,
            self._denoiser.schedule,
            range(first_seed, first_seed + count),
            self._denoiser.spec.shape,
            sampler=recipe.sampler,
            steps=recipe.steps,
            device=self._device,
            on_step=lambda step, x_0: pictures.append(to_pixels(x_0).cpu().numpy()) if step in shown else None,
        )
        return pictures


class Team:
    """The actors of an evaluation. Work is dealt to whoever is free; results come back in the order of the work."""

    def __init__(self, placement: Placement, checkpoint: Path, kinds: Sequence[ExtractorChoice]) -> None:
        import ray

        options: dict[str, Any] = {"num_gpus": 1} if placement.use_gpu else {"num_cpus": 1}
        actor = ray.remote(max_restarts=3, max_task_retries=3, **options)(Sampler)
        self._actors: list[Any] = [actor.remote(str(checkpoint), list(kinds), placement.use_gpu) for _ in range(placement.num_samplers)]
        self.identities: list[tuple[str, str, str]] = ray.get(self._actors[0].identities.remote())

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def map(self, method: str, work: Iterator[tuple[Any, ...]]) -> Iterator[Any]:
        """Yields the results of `method(*arguments)` in order; at most two calls per actor wait at a time, so memory stays bounded."""
        import ray

        free, running = list(self._actors) * 2, {}
        ready: dict[int, Any] = {}
        expected, started, exhausted = 0, 0, False
        while True:
            while free and not exhausted and started - expected < 4 * len(self._actors):
                arguments = next(work, None)
                if arguments is None:
                    exhausted = True
                    break
                actor = free.pop(0)
                running[getattr(actor, method).remote(*arguments)] = (started, actor)
                started += 1
            if not running and expected == started and exhausted:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            number, actor = running.pop(done[0])
            ready[number] = ray.get(done[0])
            free.append(actor)
            while expected in ready:
                yield ready.pop(expected)
                expected += 1

    def first(self, method: str, *arguments: Any) -> Any:
        """Returns the result of one call on the first actor."""
        import ray

        return ray.get(getattr(self._actors[0], method).remote(*arguments))
