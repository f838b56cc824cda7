"""One worker's network, optimiser and averages: a step, and the way into a checkpoint and back."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from components.data.augment import Augmentation
from components.data.batches import Batch, BatchPlan
from components.data.order import plan_order
from components.data.reader import RowReader
from components.data.shards import Manifest, read_manifest
from components.diffusion.process import Process, make_process
from components.diffusion.recipe import MONITORING
from components.diffusion.reconstruction import Reconstruction
from components.diffusion.sampling import sample
from components.errors import DataError
from components.model.checkpoint import Resumable, TrainingRecord, TrainingState, load_training_state, read_weights, write_checkpoint
from components.model.ema import Ema
from components.model.initialise import initialise
from components.model.manifest import verify
from components.model.spec import DenoiserSpec
from components.spaces.space import Space
from components.storage import Location
from components.streams import Purpose, stream
from pipeline.retraining.attempts import Start
from pipeline.training.arithmetic import Arithmetic, choose
from pipeline.training.config import TrainConfig
from pipeline.training.optimizer import freeze, learning_rate, make_averages, make_optimizer, parameters_of
from pipeline.training.perceptual import load_perceptual
from pipeline.training.plan import TrainPlan, differences
from pipeline.training.spikes import SpikeGuard
from pipeline.training.step import Step
from pipeline.training.validation import has_stopped

GRID_SEEDS = range(16)


@dataclass
class Trainer:
    """The moving parts of a training run on one worker.

    Attributes:
        network: the denoiser itself.
        more_averages: averages of further decays, by the name that checkpoints give them.
        stepper: what a step does.
        step: optimiser steps done.
        settings: all that `inputs` is the digest of, for messages.
        resumed: where the checkpoint stood that this training goes on from.
        guard: counts spikes; None where nobody asked for it.
        validations: step and deciding number of every measurement on held-out rows so far.
        dataset: folder of the dataset.
    """

    config: TrainConfig
    spec: DenoiserSpec
    inputs: str
    device: torch.device
    arithmetic: Arithmetic
    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    more_averages: dict[str, Ema]
    process: Process
    stepper: Step
    step: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)
    resumed: TrainingRecord | None = None
    guard: SpikeGuard | None = None
    validations: list[tuple[int, float]] = field(default_factory=list)
    dataset: str = ""

    @cached_property
    def space(self) -> Space:
        """The dataset's space, ready to decode."""
        return self.spec.space.opened(Location.of(self.dataset), self.device)

    def learning_rate(self) -> float:
        """Returns the learning rate of the next step."""
        return learning_rate(self.config, self.step)

    def update(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes one optimiser step and returns this worker's loss, whose mean over the workers is the batch's, and the gradient's norm before clipping.

        Args:
            batch: on the trainer's device.

        Raises:
            FloatingPointError: if too many gradients were not finite; on a GPU some steps later.
        """
        decays = [average.decay_at(self.step) for average in (self.ema, *self.more_averages.values())]
        loss, norm = self.stepper(batch, self.learning_rate(), decays)
        self._check(self.stepper.count_nonfinite())
        self.step += 1
        return loss, norm

    def warm_up(self, batch: Batch) -> None:
        """Computes a gradient and throws it away.

        DDP sorts its buckets anew after the first backward pass of a process, and the order of sums over three or more workers follows the
        buckets. So that a step after a restart sums as the same step does without one, the first pass is never a step.
        """
        self.stepper.gradient(batch)
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def nonfinite_steps(self) -> int:
        """Steps whose gradient was not finite, and which were left out; waits for the device.

        Raises:
            FloatingPointError: if they are too many.
        """
        return self._check(self.stepper.count_nonfinite(now=True))

    def _check(self, nonfinite_steps: int) -> int:
        if nonfinite_steps > self.config.max_nonfinite_steps:
            raise FloatingPointError(
                f"train.max_nonfinite_steps={self.config.max_nonfinite_steps} is exceeded at step {self.step}: gradients are not finite; "
                "lower train.lr or train.grad_clip, or use train.precision=float32"
            )
        return nonfinite_steps

    def pass_flops(self, images: int) -> float:
        """Returns the operations of a forward and a backward pass of so many images; the backward pass has twice those of the forward one."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.network(torch.zeros(1, *self.spec.shape, device=self.device), torch.zeros(1, dtype=torch.int64, device=self.device))
        return 3.0 * counter.get_total_flops() * images

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averaged weights into the network, ready to sample, during a block."""
        training = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.ema.weights)
        self.network.eval()
        try:
            yield
        finally:
            self.network.load_state_dict(training)
            self.network.train()

    def draw(self, seeds: Sequence[int]) -> np.ndarray:
        """Returns rows of what a person sees, drawn in few steps, of the classes by turns where there are any."""
        if self.spec.diffusion.process == "reconstruction":
            return self._reconstruct(seeds)
        space, labels = self.space, self.spec.labels_by_turns(seeds)
        recipe = replace(MONITORING, steps=min(MONITORING.steps, self.spec.diffusion.most_steps), precision=self.arithmetic.precision)
        x_0 = sample(self.network, self.process, seeds, space.shape, recipe, device=self.device, labels=labels, limit=space.limit)
        return space.to_rows(x_0).cpu().numpy()

    @torch.inference_mode()
    def _reconstruct(self, seeds: Sequence[int]) -> np.ndarray:
        """Returns what an autoencoder makes of rows, held-out ones where there are any."""
        folder = Location.of(self.dataset)
        manifest = read_manifest(folder)
        reader = RowReader(folder, manifest, "holdout" if manifest.splits.get("holdout") else "train")
        x_0 = self.space.to_x_0(torch.from_numpy(reader.rows(np.asarray(seeds) % len(reader))).to(self.device))
        return self.space.to_rows(self.network(x_0, torch.zeros(len(x_0), device=self.device))).cpu().numpy()

    @property
    def has_stopped(self) -> bool:
        """Whether held-out rows say that more training is of no use."""
        return has_stopped(self.config, self.validations)

    @property
    def spike_steps(self) -> int | None:
        """Steps that were spikes; None where nobody looks for them."""
        return None if self.guard is None else int(self.guard.spikes)

    def everything(self, open_losses: Sequence[float] = (), open_norms: Sequence[float] = ()) -> Resumable:
        """Returns all that a checkpoint holds: the living tensors, which the next step changes.

        Args:
            open_losses: losses of the steps since the last point of the curve.
            open_norms: norms of the gradients of these steps.
        """
        moments = self.optimizer.state_dict()["state"]
        flat = {f"{index}.{name}": value for index, entry in moments.items() for name, value in entry.items() if isinstance(value, torch.Tensor)}
        record = TrainingRecord(
            step=self.step,
            train_digest=self.inputs,
            precision=self.arithmetic.precision,
            layout=self.arithmetic.layout,
            compiled=self.arithmetic.compiled,
            nonfinite_steps=self.nonfinite_steps,
            settings=self.settings,
            open_losses=tuple(open_losses),
            open_norms=tuple(open_norms),
            validations=tuple(self.validations),
            **self._spikes(),
        )
        more = {name: average.weights for name, average in self.more_averages.items()}
        return Resumable(self.ema.weights, TrainingState(self.network.state_dict(), flat, record), more)

    def _spikes(self) -> dict[str, Any]:
        if self.guard is None:
            return {}
        losses, norms = self.guard.recent.tolist()
        return {"recent_losses": losses, "recent_norms": norms, "steps_seen": int(self.guard.seen), "spike_steps": int(self.guard.spikes)}

    def save(self, path: Location) -> None:
        """Writes everything as a checkpoint."""
        now = self.everything()
        write_checkpoint(path, self.spec, now.ema, now.state, more_averages=now.more_averages)

    def load_state(self, resumable: Resumable) -> None:
        """Takes over everything from a checkpoint."""
        state = resumable.state
        self.network.load_state_dict(dict(state.weights))
        self.ema.load(resumable.ema)
        for name, average in self.more_averages.items():
            average.load(resumable.more_averages[name])
        parameters = parameters_of(self.optimizer)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for address, value in state.optimizer.items():
            index, _, name = address.partition(".")
            # The fused kernel walks parameter and moments in step through memory, so that both need the same strides.
            like = parameters[int(index)]
            moments.setdefault(int(index), {})[name] = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step, self.resumed = state.record.step, state.record
        self.stepper.nonfinite.fill_(state.record.nonfinite_steps)
        self.validations = list(state.record.validations)
        if self.guard is not None:
            record = state.record
            self.guard.load(record.recent_losses, record.recent_norms, record.steps_seen, record.spike_steps)


def make_trainer(plan: TrainPlan, manifest: Manifest, device: torch.device, resume_from: Location | None) -> Trainer:
    """Builds the network, the optimiser and the averages: fresh from the seed, or from a checkpoint.

    Raises:
        DataError: if the checkpoint is not whole, or made of other inputs; names the settings that differ.
    """
    spec = DenoiserSpec(
        model=plan.model,
        diffusion=plan.diffusion,
        space=manifest.space,
        label_names=_label_names(plan, manifest),
        num_conditions=plan.train.num_conditions,
    )
    torch.manual_seed(int(stream(Purpose.WEIGHTS, plan.train.seed).integers(2**32)))
    network = spec.build()
    resumable = None if resume_from is None else _read(plan, resume_from)
    if plan.start is not None and resumable is None:
        initialise(network, _start_weights(plan.start), strict=plan.train.init_strict, where=plan.start.model)
    arithmetic = _choose(plan, network, device) if resumable is None else _kept(resumable.state.record)
    network = network.to(device).to(memory_format=arithmetic.memory_format).train()
    train = plan.train
    freeze(network, train.freeze)
    optimizer, (ema, more) = make_optimizer(network, train), make_averages(network, train)
    process, guard = _process(plan, device), None
    if train.spike_deviations:
        guard = SpikeGuard(train.spike_deviations, skips=train.skip_spikes, device=device)
    options: dict[str, Any] = {"guard": guard, "tells": train.augment_conditioning, "augments": train.augments and not manifest.space.is_drawn}
    stepper = Step(network, optimizer, [ema, *more.values()], process, arithmetic, train.grad_clip, manifest.space, **options)
    trainer = Trainer(train, spec, plan.inputs, device, arithmetic, network, optimizer, ema, more, process, stepper, settings=plan.settings, guard=guard)
    trainer.dataset = plan.dataset
    if resumable is not None:
        trainer.load_state(resumable)
    return trainer


def _process(plan: TrainPlan, device: torch.device) -> Process:
    process = make_process(plan.diffusion).to(device)
    if plan.perceptual is not None and isinstance(process, Reconstruction):
        process.perceptual, process.perceptual_scale = load_perceptual(plan.train, plan.perceptual).to(device), plan.train.perceptual_scale
    return process


def _choose(plan: TrainPlan, network: nn.Module, device: torch.device) -> Arithmetic:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    images = plan.train.steps * plan.train.global_batch_size
    return choose(plan.train.precision, plan.train.compile, device, parameters, images)


def _kept(record: TrainingRecord) -> Arithmetic:
    return Arithmetic(record.precision, record.layout, record.compiled)


def _read(plan: TrainPlan, path: Location) -> Resumable:
    resumable = load_training_state(path)
    record = resumable.state.record
    if record.train_digest != plan.inputs:
        detail = differences(record.settings, plan.settings) or f"digest {record.train_digest}, not {plan.inputs}"
        raise DataError(f"{path} was trained with other settings ({detail}); move it away, or train with those")
    return resumable


def _start_weights(start: Start) -> dict[str, torch.Tensor]:
    """Returns the weights to start from, their checksum verified.

    Raises:
        DataError: if they are not those that the attempt chose.
    """
    name = f"{start.weights}.safetensors"
    with Location.of(start.checkpoint).local_copy([name, "manifest.json"]) as folder:
        if verify(folder, [name])[name] != start.sha256:
            raise DataError(f"{start.checkpoint}/{name} is no longer what it was when the attempt began; start another attempt")
        return read_weights(folder / name)


def make_batch_plan(plan: TrainPlan, manifest: Manifest) -> BatchPlan:
    """Returns what decides the batches of a training run."""
    order = plan_order(
        num_rows=manifest.num_train,
        row_bytes=manifest.space.row_bytes,
        global_batch_size=plan.train.global_batch_size,
        lanes=plan.train.lanes,
        seed=plan.train.seed,
    )
    classes = len(_label_names(plan, manifest))
    mirrored = manifest.space.mirrored if plan.train.flip else None
    return BatchPlan(
        order,
        make_process(plan.diffusion).draw_times,
        mirrored,
        classes,
        plan.train.label_dropout,
        plan.model.num_dropouts,
        augmentation=_augmentation(plan, manifest),
        tells_mirrors=plan.train.augment_conditioning,
    )


def _augmentation(plan: TrainPlan, manifest: Manifest) -> Augmentation | None:
    train = plan.train
    if not train.augments or manifest.space.is_drawn:  # whose shifted images are encoded
        return None
    height, width = manifest.space.shape[-2:]
    return Augmentation(train.augment_probability, train.rotation, train.translation, train.scaling, train.crop_jitter, (height, width))


def _label_names(plan: TrainPlan, manifest: Manifest) -> tuple[str, ...]:
    """Returns the classes that the network is told."""
    return tuple(manifest.label_names) if plan.model.conditional else ()


def sample_tiles(trainer: Trainer) -> np.ndarray:
    """Returns pictures (N, C, H, W) uint8 of samples of the averaged weights: the same seeds each time, of the classes by turns where there are any."""
    space = trainer.spec.space
    seeds = GRID_SEEDS if space.one_tile_per_row else range(space.rows_in_a_picture)
    with trainer.averaged():
        return space.tiles(trainer.draw(seeds))
