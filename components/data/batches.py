"""What one worker trains on at each step: data, time steps, noise and labels of its lanes, each a pure function of (seed, step, lane)."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..streams import Purpose, stream
from .augment import NUMBERS, Augmentation
from .order import RowOrder
from .reader import NO_LABEL, RowReader

WORDS = 2
"""Of 32 bits, that make the key of one image at one layer."""


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step, on the CPU.

    Attributes:
        rows: (B,) int64, row numbers in the dataset.
        data: (B, *shape) rows of the dataset's space, or what is drawn of them, mirrored where the draw says so.
        t: (B,), as the diffusion process counts times: int64 0..T-1, or float32.
        eps: (B, *shape) float32.
        labels: (B,) int64, what the network is told of each image's class; None where it is told no class.
        keys: (B, L, 2) int32, uniformly random, which decide each image's dropout masks at L layers; None for a network without dropout.
        augmentation: (B, A) float32, what is to be done to each image, and that it is mirrored already; None where nothing is.
    """

    step: int
    rows: torch.Tensor
    data: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    labels: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    augmentation: torch.Tensor | None = None

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Returns what a training step needs of it, in the order (data, eps, t, labels, keys, augmentation)."""
        return self.data, self.eps, self.t, self.labels, self.keys, self.augmentation

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Returns the batch with each of these tensors changed."""
        labels, keys, augmentation = (None if tensor is None else change(tensor) for tensor in (self.labels, self.keys, self.augmentation))
        return replace(self, data=change(self.data), eps=change(self.eps), t=change(self.t), labels=labels, keys=keys, augmentation=augmentation)

    def split(self, rows: int) -> "list[Batch]":
        """Returns the batch cut into parts of so many rows."""
        return [self.map(lambda tensor, first=first: tensor[first : first + rows]) for first in range(0, len(self.data), rows)]


@dataclass(frozen=True)
class BatchPlan:
    """All that decides a step's draws.

    Attributes:
        draw_times: draws the times of a number of rows, such as `Process.draw_times`.
        mirrored: mirrors rows left to right; each is with probability one half. None where none is.
        num_classes: K, the classes that the network is told; label K says that the class is not told. 0 for a network that is told no class.
        label_dropout: probability that a row's class is not told (p_uncond of Classifier-Free Guidance, algorithm 1).
        num_dropouts: L, dropout layers of the network.
        augmentation: what else is done to images; None for nothing.
        tells_mirrors: whether the network is told that an image is mirrored.
    """

    order: RowOrder
    draw_times: Callable[[np.random.Generator, int], np.ndarray]
    mirrored: Callable[[np.ndarray], np.ndarray] | None
    num_classes: int = 0
    label_dropout: float = 0.0
    num_dropouts: int = 0
    augmentation: Augmentation | None = None
    tells_mirrors: bool = False

    def lanes_of(self, rank: int, num_workers: int) -> range:
        """Returns the lanes that a worker carries: equal parts where the workers divide the lanes, else some carry one more.

        Raises:
            ValueError: if there are more workers than lanes.
        """
        if num_workers > self.order.lanes:
            raise ValueError(f"num_workers={num_workers} is above lanes={self.order.lanes}; use at most as many workers as lanes")
        return range(rank * self.order.lanes // num_workers, (rank + 1) * self.order.lanes // num_workers)

    def batch(self, reader: RowReader, step: int, lanes: range) -> Batch:
        """Returns the row numbers, data, time steps, noise and labels of the given lanes at a step."""
        rows = np.concatenate([self.order.rows(step, lane) for lane in lanes])
        data = reader.rows(rows)
        times, noises, shown, space = [], [], [], reader.space
        mirrors = np.zeros(len(rows), bool)
        for index, lane in enumerate(lanes):
            draw = stream(Purpose.TRAINING, self.order.seed, step, lane)
            count = self.order.rows_per_lane
            times.append(self.draw_times(draw, count))
            noises.append(draw.standard_normal((count, *space.shape), dtype=np.float32))
            if self.mirrored is not None:
                chosen = np.flatnonzero(draw.random(count) < 0.5) + index * count
                data[chosen] = self.mirrored(data[chosen])
                mirrors[chosen] = True
            if self.num_classes:
                shown.append(draw.random(count) >= self.label_dropout)
        if space.is_drawn:
            parts_of_lanes = np.split(data, len(lanes))
            draws = (stream(Purpose.POSTERIOR, self.order.seed, step, lane) for lane in lanes)
            data = np.concatenate([space.drawn(part, draw) for part, draw in zip(parts_of_lanes, draws, strict=True)])
        labels = self._labels(reader.labels(rows), np.concatenate(shown)) if self.num_classes else None
        parts = (rows, data, np.concatenate(times), np.concatenate(noises))
        augmentation = self._augmentation(step, lanes, mirrors)
        return Batch(step, *(torch.from_numpy(part) for part in parts), labels=labels, keys=self.keys(step, lanes), augmentation=augmentation)

    def _augmentation(self, step: int, lanes: range, mirrors: np.ndarray) -> torch.Tensor | None:
        """Returns what is done to each row of the given lanes at a step; None where nothing is, or nothing but mirrors that nobody is told of."""
        if self.augmentation is None and not self.tells_mirrors:
            return None
        if self.augmentation is None:
            numbers = np.zeros((len(mirrors), NUMBERS), np.float32)
        else:
            draws = [stream(Purpose.AUGMENTATION, self.order.seed, step, lane) for lane in lanes]
            numbers = np.concatenate([self.augmentation.draw(draw, self.order.rows_per_lane) for draw in draws])
        numbers[:, 0] = mirrors
        return torch.from_numpy(numbers)

    def keys(self, step: int, lanes: range) -> torch.Tensor | None:
        """Returns the keys of the dropout masks of the given lanes at a step."""
        if not self.num_dropouts:
            return None
        draws = [stream(Purpose.DROPOUT, self.order.seed, step, lane) for lane in lanes]
        shape = (self.order.rows_per_lane, self.num_dropouts, WORDS)
        return torch.from_numpy(np.concatenate([draw.integers(-(2**31), 2**31, shape, dtype=np.int32) for draw in draws]))

    def _labels(self, classes: np.ndarray, shown: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.where(shown & (classes != NO_LABEL), classes, self.num_classes).astype(np.int64))

    def batches(self, reader: RowReader, steps: range, lanes: range, ahead: int = 2) -> Iterator[Batch]:
        """Yields the batches of consecutive steps, made by a thread that keeps `ahead` of them ready."""
        ready: queue.Queue[Batch | Exception] = queue.Queue(maxsize=ahead)
        stop = threading.Event()

        def produce() -> None:
            try:
                for step in steps:
                    if not _put(ready, self.batch(reader, step, lanes), stop):
                        return
            except Exception as error:
                _put(ready, error, stop)

        thread = threading.Thread(target=produce, name="batches", daemon=True)
        thread.start()
        try:
            for _ in steps:
                item = ready.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()


def _put(ready: "queue.Queue[Batch | Exception]", item: Batch | Exception, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yields batches on a device. To a GPU each is copied from pinned memory while the one before it is worked on."""
    with closing(batches):  # type: ignore[type-var]
        if device.type != "cuda":
            yield from batches
            return
        side, last = torch.cuda.Stream(device), None
        for batch in batches:
            with torch.cuda.stream(side):
                following = batch.map(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
            if last is not None:
                yield _taken_over(last, side)
            last = following
        if last is not None:
            yield _taken_over(last, side)


def _taken_over(batch: Batch, side: torch.cuda.Stream) -> Batch:
    """Makes the present stream wait for a batch that another one copies, and its memory outlive its use here."""
    now = torch.cuda.current_stream()
    now.wait_stream(side)
    for tensor in batch.tensors():
        if tensor is not None:
            tensor.record_stream(now)
    return batch
