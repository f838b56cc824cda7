"""A denoiser's forward pass as one CUDA graph: a small network on a fast GPU otherwise waits for its own launches."""

from collections.abc import Callable

import torch

WARM_UP = 3


class GraphedNetwork:
    """Replays a network's forward pass; captured once for each shape of its inputs. The output is the same memory at every call.

    Args:
        network: (x_t, t) or (x_t, t, labels) -> output, in evaluation mode on a CUDA device, free of control flow that depends on values.
    """

    def __init__(self, network: Callable[..., torch.Tensor]) -> None:
        self._network = network
        self._captured: dict[tuple[torch.Size, int], tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...], torch.Tensor]] = {}

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        key = (inputs[0].shape, len(inputs))
        if key not in self._captured:
            self._captured[key] = self._capture(inputs)
        graph, held, output = self._captured[key]
        for mine, given in zip(held, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return output

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...], torch.Tensor]:
        held = tuple(given.clone() for given in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._network(*held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._network(*held)
        return graph, held, output
