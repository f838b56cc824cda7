"""One optimiser step of one worker: gradient, clipping, update, averages. Nothing in it waits for the device.

A GPU that trains alone replays it as two CUDA graphs, one of the gradient and one of all that follows.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal

import torch
from torch import nn

from components.data.augment import augmented
from components.data.batches import Batch
from components.diffusion.objective import training_loss
from components.diffusion.process import Process
from components.model.ema import Ema
from components.spaces.space import Space
from pipeline.training.arithmetic import Arithmetic
from pipeline.training.spikes import SpikeGuard

WARM_UP, MOST_MEMORY = 3, 0.85
BEHIND = 2
"""Steps after which the host looks whether a gradient on a GPU was finite."""


class Step:
    """What turns a batch into an update.

    Attributes:
        network: the denoiser, wrapped for DDP where there are several workers.
        share: this worker's part of the batch over an equal part.
        part: images of one forward and backward pass; 0 for all of the worker's.
        nonfinite: steps whose gradient was not finite, an int64 scalar on the device.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: Sequence[Ema],
        process: Process,
        arithmetic: Arithmetic,
        grad_clip: float,
        space: Space,
        *,
        guard: SpikeGuard | None = None,
        tells: bool = False,
        augments: bool = False,
    ) -> None:
        """Prepares it.

        Args:
            guard: counts spikes, and says which are left out.
            tells: whether the network is told what augmentation does.
            augments: whether augmentation does more than mirror.
        """
        self._module, self._optimizer, self._averages, self._process, self._grad_clip = network, optimizer, averages, process, grad_clip
        self._arithmetic, self._space, self._guard, self._tells, self._augments = arithmetic, space, guard, tells, augments
        self.network: nn.Module = network
        self.share, self.part = 1.0, 0
        self._device = next(network.parameters()).device
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=self._device)
        self._skip = torch.zeros((), device=self._device)
        self._weights = [torch.zeros((), device=self._device) for _ in averages]
        self._loss: Callable[..., torch.Tensor] | None = None
        self._graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None
        self._static: Batch | None = None
        self._results: tuple[torch.Tensor, torch.Tensor] = (self._skip, self._skip)
        self._flags: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def __call__(self, batch: Batch, lr: float, decays: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes a step and returns this worker's loss and the gradient's norm before clipping, float32 scalars on the device.

        Args:
            batch: on the device.
            lr: the learning rate.
            decays: of the averages.
        """
        self._set_rates(lr, decays)
        if self._device.type == "cuda" and self.network is self._module:
            return self._replay(batch)
        loss = self.gradient(batch)
        return loss, self._apply(self._over_all(loss))

    def _over_all(self, loss: torch.Tensor) -> torch.Tensor:
        """Returns the loss of all workers, where somebody looks at it."""
        if self._guard is None or self.network is self._module:
            return loss
        total = loss / torch.distributed.get_world_size()
        torch.distributed.all_reduce(total)
        return total

    def _set_rates(self, lr: float, decays: Sequence[float]) -> None:
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        for weight, decay in zip(self._weights, decays, strict=True):
            weight.fill_(1.0 - decay)

    def gradient(self, batch: Batch) -> torch.Tensor:
        """Computes the gradient, part by part, and returns this worker's loss, whose mean over the workers is the batch's."""
        self._optimizer.zero_grad(set_to_none=True)
        return self._accumulate(batch)

    def cut(self, wanted: int | Literal["auto"], batch: Batch, rows_per_lane: int) -> None:
        """Decides how many images a pass works on: those of `train.micro_batch_size`, or as many as the GPU has room for.

        Args:
            batch: one of the worker's batches, on the device.

        Raises:
            torch.OutOfMemoryError: if there is no room for one lane.
        """
        images = len(batch.data)
        if wanted != "auto" or self._device.type != "cuda":
            self.part = 0 if wanted == "auto" or wanted >= images else wanted
            return
        lanes = images // rows_per_lane
        for each in (lanes // parts for parts in range(1, lanes + 1) if lanes % parts == 0):
            self.part = 0 if each == lanes else each * rows_per_lane
            if self._has_room(batch.split(self.part or images)[0]):
                return
        raise torch.OutOfMemoryError(f"no room for the {rows_per_lane} images of one lane")

    def _has_room(self, part: Batch) -> bool:
        """Tells whether a pass leaves some memory of the GPU free; it is done eagerly, which takes more than it does compiled."""
        torch.cuda.reset_peak_memory_stats()
        try:
            self._loss_with(self._module)(*part.tensors()).backward()
            return torch.cuda.max_memory_allocated() < MOST_MEMORY * torch.cuda.get_device_properties(self._device).total_memory
        except torch.OutOfMemoryError:
            return False
        finally:
            self._optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    def _accumulate(self, batch: Batch) -> torch.Tensor:
        images = len(batch.data)
        parts = batch.split(self.part or images)
        total = torch.zeros((), device=self._device)
        for number, part in enumerate(parts):
            with self._no_sync(is_last=number == len(parts) - 1):
                loss = self._loss_of(part) * (self.share * len(part.data) / images)
                loss.backward()
            total = total + loss.detach()
        return total

    def _no_sync(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Keeps DDP from adding up gradients over the workers before the last part."""
        if is_last or not isinstance(self.network, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.network.no_sync()

    def _loss_of(self, part: Batch) -> torch.Tensor:
        if self._loss is None:
            alone = self.network is self._module
            network = torch.compile(self.network) if self._arithmetic.compiled and not alone else self.network
            loss = self._loss_with(network)
            self._loss = torch.compile(loss, fullgraph=True, dynamic=False) if self._arithmetic.compiled and alone else loss
        return self._loss(*part.tensors())

    def _loss_with(self, network: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return partial(_loss, network, self._process, self._arithmetic, self._space, self._tells, self._augments)

    def _apply(self, loss: torch.Tensor) -> torch.Tensor:
        """Clips the gradient and takes the step, unless the gradient is not finite, or a spike that is to be left out; returns its norm."""
        norm = nn.utils.clip_grad_norm_(self._module.parameters(), self._grad_clip)
        unusable = torch.maximum((~torch.isfinite(norm)).float(), self._skip)
        skipped = unusable if self._guard is None else torch.maximum(unusable, self._guard.judge(loss, norm, self._skip))
        # What a gradient scaler says to the fused kernels: with 1 they leave parameters, moments and their number of steps alone.
        self._optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self._optimizer.grad_scale = None  # type: ignore[attr-defined]
        self._optimizer.step()
        for average, weight in zip(self._averages, self._weights, strict=True):
            average.update(self._module, weight * (1.0 - skipped))
        self.nonfinite.add_(unusable.to(torch.int64))
        return norm

    def count_nonfinite(self, *, now: bool = False) -> int:
        """Returns how many steps had a gradient that was not finite; on a GPU without the last steps, unless it is to wait for them."""
        if now or self._device.type != "cuda":
            return int(self.nonfinite)
        flag = torch.empty((), dtype=torch.int64, pin_memory=True)
        flag.copy_(self.nonfinite, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._flags.append((flag, event))
        if len(self._flags) <= BEHIND:
            return 0
        flag, event = self._flags.popleft()
        event.synchronize()
        return int(flag)

    def _replay(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if self._graphs is None or self._static is None:
            self._static = batch.map(torch.clone)
            self._graphs = self._capture(self._static)
        else:
            for mine, given in zip(self._static.tensors(), batch.tensors(), strict=True):
                if mine is not None and given is not None:
                    mine.copy_(given, non_blocking=True)
        for graph in self._graphs:
            graph.replay()
        loss, norm = self._results
        return loss.clone(), norm.clone()

    def _capture(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]:
        """Returns the step as two graphs. What warms them up leaves weights, moments and averages alone, as a step that is skipped does."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._skip.fill_(1.0)
            for _ in range(WARM_UP):
                self._apply(self.gradient(batch))
            self._skip.fill_(0.0)
            self.nonfinite.sub_(WARM_UP)
        torch.cuda.current_stream().wait_stream(side)
        self._optimizer.zero_grad(set_to_none=True)
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(first):
            loss = self._accumulate(batch)
        with torch.cuda.graph(second, pool=first.pool()):
            norm = self._apply(loss)
        self._results = (loss, norm)
        return first, second


def _loss(
    network: Callable[..., torch.Tensor],
    process: Process,
    arithmetic: Arithmetic,
    space: Space,
    tells: bool,
    augments: bool,
    data: torch.Tensor,
    eps: torch.Tensor,
    t: torch.Tensor,
    labels: torch.Tensor | None,
    keys: torch.Tensor | None,
    augmentation: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the loss of a batch, in float32 but for the network's own arithmetic."""
    x_0 = space.to_x_0(data)
    x_0 = augmented(x_0, augmentation) if augments and augmentation is not None else x_0
    x_0 = x_0.contiguous(memory_format=arithmetic.memory_format) if x_0.ndim == 4 else x_0
    with torch.autocast(data.device.type, torch.bfloat16, enabled=arithmetic.precision == "bfloat16"):
        more = ({} if keys is None else {"keys": keys}) | ({} if augmentation is None or not tells else {"conditions": augmentation})
        return training_loss(process, space.bin_width)(partial(network, **more) if more else network, process, x_0, eps, t, labels)
