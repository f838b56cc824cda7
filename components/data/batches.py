"""What one worker trains on at each step: pixels, time steps, noise and labels of its lanes, each a pure function of (seed, step, lane)."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..streams import Purpose, stream
from .order import RowOrder
from .reader import NO_LABEL, RowReader


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step, on the CPU.

    Attributes:
        rows: (B,) int64, row numbers in the dataset.
        pixels: (B, C, H, W) uint8, flipped where the draw says so.
        t: (B,) int64, 0..T-1.
        eps: (B, C, H, W) float32.
        labels: (B,) int64, what the network is told of each image's class; None where it is told no class.
    """

    step: int
    rows: torch.Tensor
    pixels: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    labels: torch.Tensor | None = None


@dataclass(frozen=True)
class BatchPlan:
    """All that decides a step's draws.

    Attributes:
        num_steps: T, noise levels.
        flip: mirror each image left to right with probability one half.
        num_classes: K, the classes that the network is told; label K says that the class is not told. 0 for a network that is told no class.
        label_dropout: probability that an image's class is not told (p_uncond of Classifier-Free Guidance, algorithm 1).
    """

    order: RowOrder
    num_steps: int
    flip: bool
    num_classes: int = 0
    label_dropout: float = 0.0

    def lanes_of(self, rank: int, num_workers: int) -> range:
        """Returns the lanes that a worker carries: equal parts where the workers divide the lanes, else some carry one more.

        Raises:
            ValueError: if there are more workers than lanes.
        """
        if num_workers > self.order.lanes:
            raise ValueError(f"num_workers={num_workers} is above lanes={self.order.lanes}; use at most as many workers as lanes")
        return range(rank * self.order.lanes // num_workers, (rank + 1) * self.order.lanes // num_workers)

    def batch(self, reader: RowReader, step: int, lanes: range) -> Batch:
        """Returns the rows, pixels, time steps, noise and labels of the given lanes at a step."""
        rows = np.concatenate([self.order.rows(step, lane) for lane in lanes])
        pixels = reader.pixels(rows)
        times, noises, told = [], [], []
        for index, lane in enumerate(lanes):
            draw = stream(Purpose.TRAINING, self.order.seed, step, lane)
            count = self.order.rows_per_lane
            times.append(draw.integers(0, self.num_steps, count))
            noises.append(draw.standard_normal((count, *pixels.shape[1:]), dtype=np.float32))
            if self.flip:
                mirrored = np.flatnonzero(draw.random(count) < 0.5) + index * count
                pixels[mirrored] = pixels[mirrored, :, :, ::-1]
            if self.num_classes:
                told.append(draw.random(count) >= self.label_dropout)
        labels = self._labels(reader.labels(rows), np.concatenate(told)) if self.num_classes else None
        parts = (rows, pixels, np.concatenate(times), np.concatenate(noises))
        return Batch(step, *(torch.from_numpy(part) for part in parts), labels=labels)

    def _labels(self, classes: np.ndarray, told: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.where(told & (classes != NO_LABEL), classes, self.num_classes).astype(np.int64))

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
