"""What one worker trains on at each step: pixels, time steps and noise of its lanes, each a pure function of (seed, step, lane)."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..streams import Purpose, stream
from .order import RowOrder
from .reader import RowReader


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step, on the CPU.

    Attributes:
        rows: (B,) int64, row numbers in the dataset.
        pixels: (B, C, H, W) uint8, flipped where the draw says so.
        t: (B,) int64, 0..T-1.
        eps: (B, C, H, W) float32.
    """

    step: int
    rows: torch.Tensor
    pixels: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor


@dataclass(frozen=True)
class BatchPlan:
    """All that decides a step's draws.

    Attributes:
        num_steps: T, noise levels.
        flip: mirror each image left to right with probability one half.
    """

    order: RowOrder
    num_steps: int
    flip: bool

    def lanes_of(self, rank: int, num_workers: int) -> range:
        """Returns the lanes that a worker carries: equal parts where the workers divide the lanes, else some carry one more.

        Raises:
            ValueError: if there are more workers than lanes.
        """
        if num_workers > self.order.lanes:
            raise ValueError(f"num_workers={num_workers} is above lanes={self.order.lanes}; use at most as many workers as lanes")
        return range(rank * self.order.lanes // num_workers, (rank + 1) * self.order.lanes // num_workers)

    def batch(self, reader: RowReader, step: int, lanes: range) -> Batch:
        """Returns the rows, pixels, time steps and noise of the given lanes at a step."""
        rows = np.concatenate([self.order.rows(step, lane) for lane in lanes])
        pixels = reader.pixels(rows)
        times, noises = [], []
        for index, lane in enumerate(lanes):
            draw = stream(Purpose.TRAINING, self.order.seed, step, lane)
            count = self.order.rows_per_lane
            times.append(draw.integers(0, self.num_steps, count))
            noises.append(draw.standard_normal((count, *pixels.shape[1:]), dtype=np.float32))
            if self.flip:
                mirrored = np.flatnonzero(draw.random(count) < 0.5) + index * count
                pixels[mirrored] = pixels[mirrored, :, :, ::-1]
        return Batch(step, *(torch.from_numpy(part) for part in (rows, pixels, np.concatenate(times), np.concatenate(noises))))

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
