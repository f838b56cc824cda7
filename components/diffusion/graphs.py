"""A denoiser's forward pass as one CUDA graph: a small network on a fast GPU otherwise waits for its own launches."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP = 3
MOST_GRAPHS = 8
"""Graphs that are kept; the one used longest ago goes first."""
ROUND_TO = 32


@dataclass(frozen=True, eq=False)
class _Graph:
    """A captured pass, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor


class GraphedNetwork:
    """Replays a network's forward pass; captured once for each padded size of a batch. The output is the same memory at every call.

    Args:
        network: (x_t, t) or (x_t, t, labels) -> output, in evaluation mode on a CUDA device: each row's output follows from that row alone, and
            nothing on the CPU depends on values.
    """

    def __init__(self, network: Callable[..., torch.Tensor], round_to: int = 0) -> None:
        """Prepares it.

        Args:
            round_to: rows to whose multiples every batch is padded; by default few sizes are used.
        """
        self._network, self._round_to = network, round_to
        self._graphs: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()
        self._pool: Any = None

    @torch.inference_mode()
    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        rows = len(inputs[0])
        captured = self._captured(inputs, -(-rows // self._round_to) * self._round_to if self._round_to else padded(rows))
        for held, given in zip(captured.inputs, inputs, strict=True):
            held[:rows].copy_(given)
        captured.graph.replay()
        return captured.output[:rows]

    def _captured(self, inputs: tuple[torch.Tensor, ...], rows: int) -> _Graph:
        key = (rows, *((given.shape[1:], given.dtype) for given in inputs), torch.is_autocast_enabled("cuda"))
        if key not in self._graphs:
            if len(self._graphs) == MOST_GRAPHS:
                torch.cuda.synchronize()  # it may be running still
                self._graphs.popitem(last=False)
            self._graphs[key] = self._capture(inputs, rows)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _capture(self, inputs: tuple[torch.Tensor, ...], rows: int) -> _Graph:
        """Captures a pass. All graphs share one pool of memory, for one runs after the other, and its output is used before the next."""
        held = tuple(given.new_zeros((rows, *given.shape[1:])) for given in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._network(*held)
        torch.cuda.current_stream().wait_stream(side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._network(*held)
        return _Graph(graph, held, output)


def padded(rows: int) -> int:
    """Returns how many rows are computed for a batch: a power of two, or a multiple of ROUND_TO, so that few sizes are captured."""
    return 1 << (rows - 1).bit_length() if rows < ROUND_TO else -(-rows // ROUND_TO) * ROUND_TO
