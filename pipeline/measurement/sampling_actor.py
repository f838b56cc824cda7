"""The actor that draws samples and measures them, on one CPU thread or one GPU.

What it makes are files, each whole or not there, so that a killed evaluation goes on where it was and no seed is drawn twice.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from components.data.shard_cache import ShardCache
from components.data.shards import Split
from components.storage import Location
from pipeline.measurement.remote_progress import RemoteProgress
from pipeline.measurement.sample_store import (
    Identity,
    RealSet,
    SampleSet,
    checksum_file,
    features_file,
    is_kept,
    logits_file,
    pixels_file,
    read_array,
    read_checksum,
    write_array,
)

if TYPE_CHECKING:
    import torch

    from components.data.reader import RowReader
    from components.diffusion.recipe import Precision
    from components.diffusion.sampling import OnStep
    from components.metrics.features import Extractor
    from components.model.checkpoint import Denoiser
    from components.process import Moment

EXTRACT_BATCHES = {"cpu": 64, "cuda": 256}
"""Images that an extractor sees together, by kind of device."""
READER_CACHE_BYTES = 128 << 20
DENOISERS_HELD = 2


Kind = Literal["inception", "classifier", "dct8", "dinov2", "points"]


@dataclass(frozen=True)
class ExtractorChoice:
    """Which extractor an actor builds: its kind, and the address of the file or folder of its weights."""

    kind: Kind
    address: str = ""

    def build(self, device: str) -> "Extractor":
        """Returns the extractor, its weights loaded and checked."""
        from components.metrics.classifier import ClassifierExtractor
        from components.metrics.dino import DinoExtractor
        from components.metrics.features import DctExtractor, InceptionExtractor, PointExtractor

        weights = Location.of(self.address)
        if self.kind == "points":
            return PointExtractor()
        if self.kind == "dct8":
            return DctExtractor(device)
        if self.kind == "classifier":
            with weights.local_copy() as folder:
                return ClassifierExtractor(folder, device)
        if self.kind == "dinov2":
            with weights.local_copy() as folder:
                return DinoExtractor(folder, device)
        with weights.parent.local_copy([weights.name]) as folder:
            return InceptionExtractor(folder / weights.name, device)


class Sampler:
    """An actor: the extractors, and the denoisers that it was last asked for."""

    def __init__(self, kinds: Sequence[ExtractorChoice], use_gpu: bool, evaluations: int, cache: str | None = None, cache_bytes: int = 20 << 30) -> None:
        import torch

        from pipeline.training.arithmetic import prepare

        torch.set_num_threads(1)
        prepare(deterministic=False)
        self._evaluations = evaluations
        self._device = "cuda" if use_gpu else "cpu"
        self._extractors = [kind.build(self._device) for kind in kinds]
        self._denoisers: OrderedDict[tuple[str, str, Precision], tuple[Denoiser, Callable[..., torch.Tensor]]] = OrderedDict()
        self._batch_sizes: dict[Location, int] = {}
        self._readers: dict[tuple[str, Split], RowReader] = {}
        self._copies = ShardCache.of(cache, cache_bytes)

    def identities(self) -> list[Identity]:
        """Returns what every extractor is."""
        return [Identity(extractor.name, extractor.digest, extractor.preprocessing) for extractor in self._extractors]

    def precision(self, wanted: Literal["auto", "float32", "bfloat16"]) -> "Precision":
        """Returns the arithmetic that `evaluate.precision` means on this actor's hardware."""
        from components.diffusion.precision import resolve_precision

        return resolve_precision(wanted, self._device)

    def compute(self, function: Callable[..., object], arguments: Sequence[object]) -> object:
        """Returns function(*arguments, DEVICE) on this actor's device."""
        return function(*arguments, self._device)

    def part(
        self, samples: SampleSet, seeds: range, batch_size: int, progress: RemoteProgress | None = None, pixels: Location | None = None, need: bool = False
    ) -> tuple[str, int]:
        """Draws and measures one part of the seeds, as far as that is not done; returns the SHA-256 of its pixels, and how many images it drew.

        Args:
            batch_size: 0 for as many as the device takes.
            progress: where it says how many images are drawn.
            pixels: folder where those that are drawn stay, by default none do.
            need: all must be there, and are drawn again if they are gone.
        """
        missing = [which for which, identity in enumerate(self.identities()) if not is_kept(features_file(samples.folder, identity, seeds))]
        held = None if pixels is None else pixels_file(pixels, seeds)
        sha256 = read_checksum(checksum_file(samples.folder, seeds))
        if sha256 is not None and not missing and (held is None or not need or is_kept(held)):
            return sha256, 0
        images, drawn = None if held is None else read_array(held), 0
        if images is None:
            images, drawn = self.draw(samples, seeds, batch_size, progress), len(seeds)
            if held is not None:
                write_array(held, images)
        for which in missing:
            self._measure(which, images, samples, seeds)
        sha256 = hashlib.sha256(images.tobytes()).hexdigest()
        checksum_file(samples.folder, seeds).write_text(json.dumps({"sha256": sha256}) + "\n")
        return sha256, drawn

    def _measure(self, which: int, pixels: np.ndarray, samples: SampleSet, seeds: range) -> None:
        extractor, identity = self._extractors[which], self.identities()[which]
        shown = self._model(samples)[0].spec.space.for_features(pixels)
        features, logits = extracted(extractor, shown, EXTRACT_BATCHES[self._device])
        if logits is not None:
            write_array(logits_file(samples.folder, identity, seeds), logits)
        write_array(features_file(samples.folder, identity, seeds), features)

    def real_part(self, which: int, real: RealSet, rows: range, progress: RemoteProgress | None = None) -> int:
        """Measures some rows of a dataset by one extractor, unless that is done; returns their number.

        Args:
            progress: where it says how many rows are measured.
        """
        file = real.features_file(self.identities()[which], rows)
        if not is_kept(file):
            reader, extractor = self._reader(real), self._extractors[which]
            size = EXTRACT_BATCHES[self._device]
            batches = [np.arange(first, min(first + size, rows.stop)) for first in range(rows.start, rows.stop, size)]
            found, report = [], (lambda done: None) if progress is None else progress.report()
            for batch in batches:
                found.append(extracted(extractor, reader.space.for_features(reader.rows(batch)), size)[0])
                report(float(batch[-1] + 1 - rows.start))
            write_array(file, np.concatenate(found))
        return len(rows)

    def draw(self, samples: SampleSet, seeds: Sequence[int], batch_size: int, progress: RemoteProgress | None = None) -> np.ndarray:
        """Returns the rows (len(seeds), *shape) of some seeds, drawn batch by batch.

        Args:
            batch_size: 0 for as many as the device takes.
        """
        report = (lambda done: None) if progress is None else progress.report()
        batch_size = batch_size or self._batch_size(samples)

        def batch(first: int) -> np.ndarray:
            drawn = seeds[first : first + batch_size]
            return self._sample(samples, drawn, on_step=lambda level, x_t, x_0: report(first + len(drawn) * (level.index + 1) / samples.recipe.steps))

        return np.concatenate([batch(first) for first in range(0, len(seeds), batch_size)])

    def interpolate(self, samples: SampleSet, pairs: Sequence[tuple[int, int]], columns: int) -> np.ndarray:
        """Returns images between pairs of seeds: pixels (len(pairs), columns, C, H, W), both ends included. A row has its first seed's class."""
        from components.diffusion.noise import interpolated_noise

        shape, rows = self._model(samples)[0].spec.shape, []
        for first, second in pairs:
            noise = interpolated_noise(first, second, np.linspace(0.0, 1.0, columns).tolist(), shape)
            rows.append(self._sample(samples, [first] * columns, x_T=noise))
        return np.stack(rows)

    def animation(self, samples: SampleSet, seeds: Sequence[int], frames: int) -> "list[Moment]":
        """Returns what some steps see while seeds are drawn, and at the end what comes out."""
        from components.process import Watch

        watch = Watch(self._model(samples)[0].spec.space, samples.recipe.steps, frames)
        return watch.ended(self._sample(samples, seeds, on_step=watch))

    def loss_at(self, samples: SampleSet, real: RealSet, rows: Sequence[int], first: int, time: float) -> float:
        """Returns the loss at a time of the process, summed over some rows of a dataset.

        Args:
            first: place of the first row among all that are measured, which decides their noise.
        """
        import torch

        from components.diffusion.objective import loss_by_timestep

        denoiser, _ = self._model(samples)
        x_0 = denoiser.spec.space.to_x_0(torch.from_numpy(self._reader(real).rows(np.asarray(rows))).to(self._device))
        return loss_by_timestep(denoiser.network, denoiser.process, x_0, [time], first_row=first)[0] * len(rows)

    def bits_of(self, samples: SampleSet, real: RealSet, rows: Sequence[int], first: int) -> float:
        """Returns the bound of the negative log-likelihood, bits per dimension, summed over some rows of a dataset.

        Args:
            first: place of the first row among all that are measured, which decides their noise.
        """
        import torch

        from components.diffusion.bound import bits_per_dimension
        from components.diffusion.schedule import Schedule

        denoiser, _ = self._model(samples)
        assert isinstance(denoiser.process, Schedule)
        space = denoiser.spec.space
        x_0 = space.to_x_0(torch.from_numpy(self._reader(real).rows(np.asarray(rows))).to(self._device))
        variance = "learned" if denoiser.spec.diffusion.learned_variance else samples.recipe.variance
        places = range(first, first + len(rows))
        return float(bits_per_dimension(denoiser.network, denoiser.process, x_0, bin_width=space.bin_width, variance=variance, rows=places).sum())

    def _sample(self, samples: SampleSet, seeds: Sequence[int], x_T: "torch.Tensor | None" = None, on_step: "OnStep | None" = None) -> np.ndarray:
        import torch

        from components.diffusion.sampling import sample

        denoiser, network = self._model(samples)
        labels = samples.labels(seeds)
        if samples.originals is not None and x_T is None:
            reader = self._reader(samples.originals)
            x_T = denoiser.spec.space.to_x_0(torch.from_numpy(reader.rows(np.asarray(seeds) % len(reader))))
        x_0 = sample(
            network,
            denoiser.process,
            seeds,
            denoiser.spec.shape,
            samples.recipe,
            device=self._device,
            labels=None if labels is None else torch.from_numpy(labels),
            null_label=denoiser.spec.null_label,
            x_T=x_T,
            on_step=on_step,
            limit=denoiser.spec.space.limit,
        )
        return denoiser.spec.space.to_rows(x_0).cpu().numpy()

    def _batch_size(self, samples: SampleSet) -> int:
        """Returns how many images to draw together, measured once for each model and recipe."""
        import torch

        from components.diffusion.batch_size import choose_batch_size

        if samples.folder not in self._batch_sizes:
            denoiser, _ = self._model(samples)
            places = [torch.zeros(1, dtype=torch.int64, device=self._device)] * (2 if samples.label_counts else 1)
            inputs = (torch.zeros(1, *denoiser.spec.shape, device=self._device), *places)
            guided = samples.recipe.guidance != 1
            # The float32 network needs no less memory than one in bfloat16.
            self._batch_sizes[samples.folder] = choose_batch_size(denoiser.network, inputs, rows_per_image=2 if guided else 1)
        return self._batch_sizes[samples.folder]

    def _model(self, samples: SampleSet) -> "tuple[Denoiser, Callable[..., torch.Tensor]]":
        """Returns a denoiser, and its network as samplers call it."""
        from components.diffusion.precision import prepared
        from components.model.checkpoint import load_denoiser

        key = (samples.checkpoint, samples.weights, samples.recipe.precision)
        if key not in self._denoisers:
            denoiser = load_denoiser(Location.of(samples.checkpoint), self._device, samples.weights)
            network = prepared(denoiser.network, samples.recipe.precision, self._device, self._evaluations)
            self._denoisers[key] = (denoiser, network)
            if len(self._denoisers) > DENOISERS_HELD:
                self._denoisers.popitem(last=False)
        self._denoisers.move_to_end(key)
        return self._denoisers[key]

    def _reader(self, real: RealSet) -> "RowReader":
        from components.data.reader import RowReader
        from components.data.shards import read_manifest

        key = (real.dataset, real.split)
        if key not in self._readers:
            dataset = Location.of(real.dataset)
            self._readers[key] = RowReader(dataset, read_manifest(dataset), real.split, READER_CACHE_BYTES, self._copies)
        return self._readers[key]


def extracted(extractor: "Extractor", pixels: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the features (N, D) float32 of pixels (N, C, H, W), and the logits of an extractor that has any."""
    import torch

    from components.metrics.features import InceptionExtractor

    features, logits = [], []
    for first in range(0, len(pixels), batch_size):
        batch = torch.from_numpy(np.ascontiguousarray(pixels[first : first + batch_size]))
        if isinstance(extractor, InceptionExtractor):
            found, more = extractor.with_logits(batch)
            logits.append(more)
        else:
            found = extractor(batch)
        features.append(found.astype(np.float32))
    return np.concatenate(features), np.concatenate(logits) if logits else None
