"""Settings of training; reading them loads no torch."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from components.data.augment import NUMBERS

_NO_RESULT: dict[str, JsonValue] = {"result": False}
_CAME_LATER: dict[str, JsonValue] = {"result": "unless default"}
_Share = Annotated[float, Field(ge=0.0, lt=1.0)]
_Width = Annotated[float, Field(gt=0.0, le=0.25)]


class TrainConfig(BaseModel):
    """The optimisation; the defaults are the CIFAR-10 run of the DDPM paper."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = Field(800_000, ge=1)
    """Optimiser steps at which training ends; a run that has done fewer goes on from its last checkpoint."""
    global_batch_size: int = Field(128, ge=1)
    """Images per step over all workers; a multiple of `lanes`."""
    lanes: int = Field(8, ge=1)
    """Parts that every batch is cut into, each with its own rows and noise; any number of workers that divides it gives the same run."""
    init_from: str | None = Field(None, json_schema_extra=_CAME_LATER)
    """Weights to start from instead of fresh ones: `models:/NAME@champion`, a checkpoint folder, or a diffusers folder (UNet2DModel or DDPMPipeline).
    Optimiser, learning rate and averages start anew."""
    init_weights: str = Field("ema", json_schema_extra=_CAME_LATER)
    """Which weights of a checkpoint: `ema`, a further average such as `ema-0.999`, or `weights`, those that were trained themselves."""
    init_strict: bool = Field(True, json_schema_extra=_CAME_LATER)
    """Whether every tensor must fit; `false` takes those that do and says which did not."""
    freeze: tuple[str, ...] = Field((), json_schema_extra=_CAME_LATER)
    """Names of parameters that are not trained, with `*` for any letters, such as `["time.*", "conv_in.*"]`."""
    optimizer: Literal["adamw", "sgd", "muon"] = Field("adamw", json_schema_extra=_CAME_LATER)
    """`adamw` (Adam where `weight_decay` is 0), `sgd` with momentum, or `muon`: Muon for matrices and convolutions, scaled to the steps of AdamW, which takes
    the rest."""
    adam_betas: tuple[_Share, _Share] = Field((0.9, 0.999), json_schema_extra=_CAME_LATER)
    """Decays of AdamW's averages of gradients and of their squares."""
    momentum: float = Field(0.9, ge=0.0, lt=1.0, json_schema_extra=_CAME_LATER)
    """Of `sgd`."""
    lr: float = Field(2e-4, gt=0.0)
    """Learning rate after the warm-up."""
    warmup_steps: int = Field(5000, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    lr_schedule: Literal["constant", "cosine", "inverse_sqrt"] = Field("constant", json_schema_extra=_CAME_LATER)
    """The learning rate after the warm-up: `constant` (DDPM), `cosine` down to 0 at `decay_steps`, or `inverse_sqrt`, constant up to `decay_steps` and then
    falling as 1 / sqrt(step) (EDM2)."""
    decay_steps: int | None = Field(None, ge=1, json_schema_extra=_CAME_LATER)
    """Step at which `cosine` is 0, by default `steps`, so that a longer run is another run; step from which `inverse_sqrt` falls."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled weight decay (AdamW); 0 is Adam."""
    decay_all: bool = Field(True, json_schema_extra=_CAME_LATER)
    """Decay norms, biases and embeddings of labels, too; `false` decays matrices and convolutions alone."""
    grad_clip: float = Field(1.0, gt=0.0)
    """Largest norm of the gradient; a longer one is scaled down."""
    ema_decay: float = Field(0.9999, ge=0.0, lt=1.0)
    """Decay of the weights' running average, per step, after its warm-up."""
    ema_half_life: int | None = Field(None, ge=1, json_schema_extra=_CAME_LATER)
    """Images after which a step counts half in the running average (EDM); takes the place of `ema_decay`."""
    ema_ramp_up: float | None = Field(0.05, gt=0.0, json_schema_extra=_CAME_LATER)
    """Longest half-life as a share of the images so far, with `ema_half_life`; null for no ramp-up."""
    ema_widths: tuple[_Width, ...] = Field((), json_schema_extra=_CAME_LATER)
    """Widths of further averages whose weight grows as a power of the step, as shares of the training (sigma_rel of EDM2), such as `[0.05, 0.1]`: from two
    of them, kept at several steps, `ddpm ema` makes the average of any width afterwards."""
    ema_snapshot_every: int | None = Field(None, ge=1, json_schema_extra=_NO_RESULT)
    """Steps between two snapshots of the averages of `ema_widths`, which are kept for good."""
    more_ema_decays: tuple[_Share, ...] = ()
    """Decays of further averages, kept beside that of `ema_decay` in every checkpoint; each takes the memory of the weights once more."""
    flip: bool = True
    """Mirror images left to right with probability one half."""
    rotation: float = Field(0.0, ge=0.0, le=180.0, json_schema_extra=_CAME_LATER)
    """Turn images by up to so many degrees either way, with `augment_probability`."""
    translation: float = Field(0.0, ge=0.0, le=0.5, json_schema_extra=_CAME_LATER)
    """Shift images by up to this share of their sides, with `augment_probability`; what comes in is a reflection."""
    scaling: float = Field(0.0, ge=0.0, le=2.0, json_schema_extra=_CAME_LATER)
    """Enlarge or shrink images by up to this power of 2, with `augment_probability`."""
    crop_jitter: int = Field(0, ge=0, json_schema_extra=_CAME_LATER)
    """Shift every image by up to so many whole pixels each way."""
    augment_probability: float = Field(0.12, ge=0.0, le=1.0, json_schema_extra=_CAME_LATER)
    """Probability of each of rotation, translation and scaling (A_prob of EDM)."""
    augment_conditioning: bool = Field(False, json_schema_extra=_CAME_LATER)
    """Tell the network what was done to an image, mirroring included, so that samples, which are told nothing, do not show it (EDM appendix F.2)."""
    crop_copies: int = Field(4, ge=1, json_schema_extra=_CAME_LATER)
    """In latents, where `crop_jitter` must shift images before they are encoded: shifted copies of each image that are encoded beside it."""
    perceptual_weights: str | None = Field(None, json_schema_extra=_CAME_LATER)
    """For an autoencoder: a file with torchvision's VGG16 (`vgg16-397923af.pth`, or safetensors), by whose features it is told how unlike a reconstruction
    looks (LPIPS); null for no perceptual loss."""
    perceptual_layers: str | None = Field(None, json_schema_extra=_CAME_LATER)
    """A file with LPIPS' layer weights for VGG16 (`vgg.pth` of its version 0.1); null for channels that all count 1."""
    perceptual_scale: float = Field(1.0, gt=0.0, json_schema_extra=_CAME_LATER)
    """What the perceptual loss is multiplied with."""
    label_dropout: float = Field(0.1, ge=0.0, le=1.0)
    """Probability that an image's label is not told, so that a conditional model learns to draw without one too (Classifier-Free Guidance)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the network; `auto` is bfloat16 on GPUs and, for a million parameters and more, on CPUs with AMX or AVX512-BF16; float32 elsewhere.
    Noise, target and loss are float32."""
    compile: bool | Literal["auto"] = Field("auto", json_schema_extra=_NO_RESULT)
    """Compile the step with torch.compile; `auto` does on GPUs where the run is long enough to pay for it."""
    micro_batch_size: int | Literal["auto"] = Field(0, json_schema_extra=_NO_RESULT)
    """Images of one forward and backward pass of a worker, whole lanes; 0 for all of its images, `auto` for as many as the GPU has memory for."""
    deterministic: bool = Field(False, json_schema_extra=_NO_RESULT)
    """Use only operations that give the same bits each time, so that on one kind of GPU, too, an interrupted run ends bit for bit like an undisturbed one."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides weights, rows, flips, time steps, noise and dropout."""
    log_every: int = Field(50, ge=1, json_schema_extra=_NO_RESULT)
    """Steps between two points of the loss curve."""
    checkpoint_every: int = Field(5000, ge=1, json_schema_extra=_NO_RESULT)
    """Steps between two checkpoints."""
    keep_last: int = Field(2, ge=1, json_schema_extra=_NO_RESULT)
    """Last checkpoints that are kept."""
    keep_every: int | None = Field(None, ge=1, json_schema_extra=_NO_RESULT)
    """Checkpoints at multiples of this step are kept for good; a multiple of `checkpoint_every`."""
    sample_every: int = Field(10_000, ge=1, json_schema_extra=_NO_RESULT)
    """Steps between two sample grids."""
    hang_timeout_s: float = Field(240.0, gt=0.0, json_schema_extra=_NO_RESULT)
    """Seconds without a step, or five times the longest step where that is more, after which the worker that is waited for is killed and all start again."""
    max_nonfinite_steps: int = Field(10, ge=0, json_schema_extra=_NO_RESULT)
    """Steps with a gradient that is not finite, left out and counted, before training stops."""
    spike_deviations: float = Field(0.0, ge=0.0, json_schema_extra=_CAME_LATER)
    """Standard deviations above the mean of the last 100 steps from which on a step's loss or gradient norm is a spike, which is counted; 0 counts none."""
    skip_spikes: bool = Field(False, json_schema_extra=_CAME_LATER)
    """Leave steps out that are spikes."""
    compare_ranks_every: int = Field(500, ge=0, json_schema_extra=_NO_RESULT)
    """Steps between two comparisons of the workers' weights, which must be the same bits; 0 compares none."""
    validate_every: int = Field(0, ge=0, json_schema_extra=_NO_RESULT)
    """Steps between two measurements of the averaged weights on held-out images; 0 measures none."""
    validate_images: int = Field(256, ge=1, json_schema_extra=_NO_RESULT)
    """Most held-out images whose loss is taken at 8 noise levels, the same noise each time."""
    validate_samples: int = Field(0, ge=0, json_schema_extra=_NO_RESULT)
    """Samples, drawn in 16 steps, whose distance from the held-out images is taken, too; 0 draws none."""
    early_stop: int = Field(0, ge=0, json_schema_extra=_CAME_LATER)
    """Measurements in a row without a gain after which training ends, with the checkpoint of the best; 0 goes on to the end."""
    early_stop_gain: float = Field(0.0, ge=0.0, lt=1.0, json_schema_extra=_CAME_LATER)
    """Share by which a number must be below the best so far to be a gain."""
    early_stop_on: Literal["loss", "distance"] = Field("loss", json_schema_extra=_CAME_LATER)
    """Number that decides: the mean held-out loss, or the distance of `validate_samples`."""

    @model_validator(mode="after")
    def _check_rates(self) -> Self:
        if self.decay_steps is not None and self.lr_schedule == "constant":
            raise ValueError(f"decay_steps={self.decay_steps} means nothing to lr_schedule=constant; leave it out, or use lr_schedule=cosine")
        if self.perceptual_layers is not None and self.perceptual_weights is None:
            raise ValueError("perceptual_layers needs perceptual_weights, a file with torchvision's VGG16")
        if self.decay_steps is None and self.lr_schedule == "inverse_sqrt":
            raise ValueError("lr_schedule=inverse_sqrt needs decay_steps, the step from which the rate falls; 70000 in EDM2 at 512 pixels")
        if self.lr_schedule == "cosine" and (self.decay_steps or self.steps) <= self.warmup_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} leaves lr_schedule=cosine no step to fall in; use fewer, or a longer decay_steps")
        return self

    @model_validator(mode="after")
    def _check_validation(self) -> Self:
        if (self.early_stop or self.validate_samples) and not self.validate_every:
            name = "early_stop" if self.early_stop else "validate_samples"
            raise ValueError(f"{name}={getattr(self, name)} needs measurements; set validate_every, such as validate_every={self.checkpoint_every}")
        if self.validate_samples == 1:
            raise ValueError("validate_samples=1 is no distribution; use 0 for no samples, or 256")
        if self.early_stop and self.early_stop_on == "distance" and not self.validate_samples:
            raise ValueError("early_stop_on=distance needs samples; set validate_samples, such as validate_samples=512")
        if self.skip_spikes and not self.spike_deviations:
            raise ValueError("skip_spikes=true needs spike_deviations, such as spike_deviations=8")
        return self

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        if len(set(self.ema_widths)) < len(self.ema_widths):
            raise ValueError(f"ema_widths={list(self.ema_widths)} holds a width twice; state each once")
        if self.ema_snapshot_every is not None and not self.ema_widths:
            raise ValueError(f"ema_snapshot_every={self.ema_snapshot_every} has nothing to keep; set ema_widths, such as ema_widths=[0.05,0.1]")
        return self

    @property
    def depends_on_steps(self) -> bool:
        """Whether what a step does depends on the step at which training ends."""
        return self.lr_schedule == "cosine" and self.decay_steps is None

    @property
    def num_conditions(self) -> int:
        """Numbers that the network is told of what augmentation did."""
        return NUMBERS if self.augment_conditioning else 0

    @property
    def augments(self) -> bool:
        """Whether images are changed by more than a mirror."""
        return bool(self.rotation or self.translation or self.scaling or self.crop_jitter)

    @model_validator(mode="after")
    def _check_decays(self) -> Self:
        decays = (self.ema_decay, *self.more_ema_decays)
        if (repeated := next((decay for decay in self.more_ema_decays if decays.count(decay) > 1), None)) is not None:
            raise ValueError(f"more_ema_decays={list(self.more_ema_decays)} holds {repeated} twice, ema_decay={self.ema_decay} counted; state each decay once")
        return self

    @model_validator(mode="after")
    def _check_micro_batches(self) -> Self:
        rows = self.global_batch_size // self.lanes
        if self.micro_batch_size != "auto" and (self.micro_batch_size < 0 or self.micro_batch_size % max(1, rows)):
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} is no whole number of lanes, and a lane has {rows} images (global_batch_size / lanes); "
                f"use a multiple of {rows}, auto, or 0 for no micro-batches"
            )
        return self

    @model_validator(mode="after")
    def _check_keeping(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(f"keep_every={self.keep_every} is not a multiple of checkpoint_every={self.checkpoint_every}; use a multiple")
        return self
