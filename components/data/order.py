"""Which rows each training step reads: a pure function of (seed, step), the same for any number of workers.

The global batch of a step is cut into lanes. Training walks through a stream of epochs laid end to end; position p of the stream
belongs to step p // global_batch_size and to lane (p % global_batch_size) // rows_per_lane. Every epoch visits each row exactly once.

A small dataset is permuted as a whole each epoch. A large one is permuted so that a lane reads few places of the disk at a time:
blocks of consecutive rows are permuted, each lane takes its own range of them, and rows are permuted within windows of the range.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..streams import Purpose, stream

FULL_PERMUTATION_BYTES = 1 << 30
BLOCK_ROWS = 1024
_BLOCKS, _WINDOWS, _WHOLE = 0, 1, 2


@dataclass(frozen=True)
class RowOrder:
    """The order of rows over a training run.

    Attributes:
        num_rows: rows of the dataset, at least 1.
        global_batch_size: rows per step over all lanes; a multiple of `lanes`.
        window_rows: rows permuted together within a lane; 0 permutes each epoch as a whole.
    """

    num_rows: int
    global_batch_size: int
    lanes: int
    seed: int
    window_rows: int = 0
    block_rows: int = BLOCK_ROWS

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ValueError(f"num_rows={self.num_rows} leaves nothing to order; use a dataset with rows")
        if self.global_batch_size % self.lanes:
            raise ValueError(f"global_batch_size={self.global_batch_size} is not a multiple of lanes={self.lanes}; use a multiple")

    @property
    def rows_per_lane(self) -> int:
        """Rows that one lane contributes to each step."""
        return self.global_batch_size // self.lanes

    def rows(self, step: int, lane: int) -> np.ndarray:
        """Returns the row numbers (rows_per_lane,), int64, that a lane trains on at a step (0, 1, ...)."""
        first = step * self.global_batch_size + lane * self.rows_per_lane
        positions = np.arange(first, first + self.rows_per_lane, dtype=np.int64)
        epochs = positions // self.num_rows
        return np.concatenate([self._rows_of(int(e), lane, positions[epochs == e] - e * self.num_rows) for e in np.unique(epochs)])

    def _rows_of(self, epoch: int, lane: int, offsets: np.ndarray) -> np.ndarray:
        if not self.window_rows:
            return _permutation(self.seed, epoch, self.num_rows)[offsets]
        start, length = self._stretch(epoch, lane)
        ranks = self._rank_in_lane(epoch, lane, offsets)
        order = [self._row_at(epoch, lane, start, length, int(rank)) for rank in ranks]
        return np.asarray(order, dtype=np.int64)

    def _lane_count(self, epoch: int, lane: int, offset: int) -> int:
        """How many of the epoch's first `offset` positions belong to the lane."""
        phase = (epoch * self.num_rows) % self.global_batch_size
        return self._count_below(phase + offset, lane) - self._count_below(phase, lane)

    def _count_below(self, position: int, lane: int) -> int:
        whole, rest = divmod(position, self.global_batch_size)
        return whole * self.rows_per_lane + min(max(rest - lane * self.rows_per_lane, 0), self.rows_per_lane)

    def _stretch(self, epoch: int, lane: int) -> tuple[int, int]:
        """Start and length of the lane's share of the epoch's permuted blocks."""
        lengths = [self._lane_count(epoch, other, self.num_rows) for other in range(lane + 1)]
        return sum(lengths[:-1]), lengths[-1]

    def _rank_in_lane(self, epoch: int, lane: int, offsets: np.ndarray) -> np.ndarray:
        return np.asarray([self._lane_count(epoch, lane, int(offset)) for offset in offsets], dtype=np.int64)

    def _row_at(self, epoch: int, lane: int, start: int, length: int, rank: int) -> int:
        window = rank // self.window_rows
        first = window * self.window_rows
        size = min(self.window_rows, length - first)
        shuffled = _window(self.seed, epoch, lane, window, size)
        return self._unpermute_blocks(epoch, start + first + int(shuffled[rank - first]))

    def _unpermute_blocks(self, epoch: int, position: int) -> int:
        blocks, ends = _blocks(self.seed, epoch, self.num_rows, self.block_rows)
        index = int(np.searchsorted(ends, position, side="right"))
        begin = int(ends[index - 1]) if index else 0
        return int(blocks[index]) * self.block_rows + position - begin


def plan_order(*, num_rows: int, row_bytes: int, global_batch_size: int, lanes: int, seed: int) -> RowOrder:
    """Returns the order for a dataset: one full permutation up to 1 GiB of pixels, windows that hold 1 GiB over all lanes above."""
    small = num_rows * row_bytes <= FULL_PERMUTATION_BYTES
    window_rows = 0 if small else max(BLOCK_ROWS, FULL_PERMUTATION_BYTES // (lanes * row_bytes))
    return RowOrder(num_rows, global_batch_size, lanes, seed, window_rows)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return stream(Purpose.ROWS, seed, _WHOLE, epoch).permutation(num_rows)


@lru_cache(maxsize=2)
def _blocks(seed: int, epoch: int, num_rows: int, block_rows: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = stream(Purpose.ROWS, seed, _BLOCKS, epoch).permutation(-(-num_rows // block_rows))
    sizes = np.minimum(block_rows, num_rows - blocks * block_rows)
    return blocks, np.cumsum(sizes)


@lru_cache(maxsize=128)
def _window(seed: int, epoch: int, lane: int, window: int, size: int) -> np.ndarray:
    return stream(Purpose.ROWS, seed, _WINDOWS + 4 * lane, epoch, window).permutation(size)
