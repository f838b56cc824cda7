"""Actors that draw samples and measure pixels, and the team that deals work to them."""

import hashlib
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cluster.config import ClusterError
from cluster.placement import Placement
from components.errors import DataError
from components.storage import Location

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
    """Which extractor an actor builds: its kind, and the address of the file or folder of its weights."""

    kind: Literal["inception", "classifier", "dct8"]
    address: str = ""

    def build(self, device: str) -> "Extractor":
        """Returns the extractor, its weights loaded and checked."""
        from components.metrics.classifier import ClassifierExtractor
        from components.metrics.features import DctExtractor, InceptionExtractor

        weights = Location.of(self.address)
        if self.kind == "dct8":
            return DctExtractor()
        if self.kind == "classifier":
            with weights.local_copy() as folder:
                return ClassifierExtractor(folder, device)
        with weights.parent.local_copy([weights.name]) as folder:
            return InceptionExtractor(folder / weights.name, device)


class Sampler:
    """An actor: one denoiser and the extractors, on one CPU thread or one GPU."""

    def __init__(self, checkpoint: str, kinds: Sequence[ExtractorChoice], use_gpu: bool) -> None:
        import torch

        from components.model.checkpoint import load_denoiser

        torch.set_num_threads(1)
        self._device = "cuda" if use_gpu else "cpu"
        self._denoiser = load_denoiser(Location.of(checkpoint), self._device)
        self._extractors = [kind.build(self._device) for kind in kinds]

    def identities(self) -> list[tuple[str, str, str]]:
        """Returns (name, digest, preprocessing) of every extractor."""
        return [(extractor.name, extractor.digest, extractor.preprocessing) for extractor in self._extractors]

    def draw(self, recipe: Recipe, seeds: range) -> np.ndarray:
        """Returns the pixels (len(seeds), C, H, W) of some seeds, drawn batch by batch."""
        from components.data.images import to_pixels
        from components.diffusion.recipe import Recipe as SampleRecipe
        from components.diffusion.sampling import sample

        spec, parts = self._denoiser.spec, []
        for first in range(0, len(seeds), recipe.batch_size):
            x_0 = sample(
                self._denoiser.network,
                self._denoiser.schedule,
                seeds[first : first + recipe.batch_size],
                spec.shape,
                SampleRecipe(recipe.sampler, recipe.steps),
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
        from components.diffusion.recipe import Recipe as SampleRecipe
        from components.diffusion.sampling import sample

        shown = set(np.linspace(0, recipe.steps - 1, min(frames, recipe.steps)).round().astype(int).tolist())
        pictures: list[np.ndarray] = []
        sample(
            self._denoiser.network,
            self._denoiser.schedule,
            range(first_seed, first_seed + count),
            self._denoiser.spec.shape,
            SampleRecipe(recipe.sampler, recipe.steps),
            device=self._device,
            on_step=lambda step, x_0: pictures.append(to_pixels(x_0).cpu().numpy()) if step in shown else None,
        )
        return pictures


@dataclass
class _Call:
    """One piece of work: which it is in the row of results, and how to do it."""

    number: int
    method: str
    arguments: tuple[Any, ...]


class Team:
    """The actors of an evaluation. Work is dealt to whoever is free; results come back in the order of the work.

    An actor that dies, with its node or alone, is replaced, and its work is dealt again; no actor is waited for while others are there.
    """

    def __init__(self, placement: Placement, checkpoint: str, kinds: Sequence[ExtractorChoice]) -> None:
        self._placement, self._arguments = placement, (checkpoint, list(kinds), placement.use_gpu)
        self._joining: dict[Any, Any] = {}
        self._free: deque[Any] = deque()
        self._running: dict[Any, tuple[_Call, Any]] = {}
        self._deaths = 0
        for _ in range(placement.num_samplers):
            self._hire()
        self.identities: list[tuple[str, str, str]] = self.first("identities")

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in {*self._free, *self._joining.values(), *(actor for _, actor in self._running.values())}:
            ray.kill(actor)

    def first(self, method: str, *arguments: Any) -> Any:
        """Returns the result of one call."""
        return next(self.map(method, iter([arguments])))

    def map(self, method: str, work: Iterator[tuple[Any, ...]]) -> Iterator[Any]:
        """Yields the results of `method(*arguments)` in order; as much work is ahead as four calls per actor, so memory stays bounded.

        Raises:
            ClusterError: if actors die again and again.
        """
        again: deque[_Call] = deque()
        ready: dict[int, Any] = {}
        started = expected = 0
        exhausted = False
        while not (exhausted and expected == started):
            while self._free and not again and not exhausted and started - expected < 4 * self._placement.num_samplers:
                arguments = next(work, None)
                exhausted = arguments is None
                if arguments is not None:
                    self._deal(_Call(started, method, arguments))
                    started += 1
            while self._free and again:
                self._deal(again.popleft())
            for call, result, died in self._settle():
                if died:
                    again.append(call)
                else:
                    ready[call.number] = result
            while expected in ready:
                yield ready.pop(expected)
                expected += 1

    def _hire(self) -> None:
        import ray

        actor: Any = ray.remote(max_restarts=0, **self._placement.per_sampler)(Sampler).remote(*self._arguments)
        self._joining[actor.identities.remote()] = actor

    def _deal(self, call: _Call) -> None:
        actor = self._free.popleft()
        self._running[getattr(actor, call.method).remote(*call.arguments)] = (call, actor)

    def _settle(self) -> list[tuple[_Call, Any, bool]]:
        """Waits for an actor to join or a call to end; returns ended calls with their results, or as died."""
        import ray

        if not self._running and not self._joining:
            return []
        done, _ = ray.wait([*self._running, *self._joining], num_returns=1)
        ended: list[tuple[_Call, Any, bool]] = []
        for reference in done:
            call, actor = self._running.pop(reference, (None, None))
            actor = actor or self._joining.pop(reference)
            try:
                result = ray.get(reference)
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                self._replace(actor, error)
                ended += [(call, None, True)] if call else []
                continue
            self._deaths = 0
            self._free.append(actor)
            ended += [(call, result, False)] if call else []
        return ended

    def _replace(self, actor: Any, error: Exception) -> None:
        import ray

        self._deaths += 1
        if (cause := re.search(r"DataError: (.*)", str(error))) is not None:
            raise DataError(cause.group(1)) from error
        if self._deaths > 3 * self._placement.num_samplers:
            raise ClusterError(f"sampling actors died {self._deaths} times, the last time: {' '.join(str(error).split())[:300]}") from error
        ray.kill(actor)
        self._hire()
