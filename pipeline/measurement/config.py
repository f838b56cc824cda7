"""Settings of the evaluate stage; reading them loads no torch."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from components.diffusion.recipe import Recipe

WIDEST = 0.28
"""Width that averages stay below; one to which all steps count alike has 1 / sqrt(12)."""
_NO_RESULT: dict[str, JsonValue] = {"result": False}
_CAME_LATER: dict[str, JsonValue] = {"result": "unless default"}


class EvaluateConfig(BaseModel):
    """Samples and the numbers taken of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_samples: int = Field(10_000, ge=2)
    """Images that are drawn and measured."""
    sampler: Literal["ddim", "ancestral", "dpmpp_2m", "unipc", "heun"] = "ddim"
    """`ddim` (for `flow` and `edm` it is Euler's method), `ancestral` (DDPM), `dpmpp_2m` (DPM-Solver++ 2M), `unipc`, or `heun` (EDM; second order, two
    evaluations a step)."""
    steps: int = Field(50, ge=1)
    """Network evaluations per image."""
    spacing: Literal["uniform", "quadratic"] = "uniform"
    """Which time steps `ddim` visits: evenly spaced, or closer to each other where there is little noise."""
    eta: float = Field(0.0, ge=0.0, le=1.0)
    """Fresh noise of `ddim`, from 0 (none) to 1 (as much as `ancestral`)."""
    variance: Literal["small", "large", "learned"] = "small"
    """Variance of the fresh noise of `ancestral`: of the posterior, beta, or what the network says (`diffusion.learned_variance`)."""
    guidance: float = Field(1.0, ge=0.0)
    """How far samples of a conditional model are pushed towards their class: 1 is not at all."""
    threshold: Literal["clip", "dynamic", "none"] = "clip"
    """What becomes of estimates outside -1..1: clipped, scaled by their 99.5 % quantile, or left."""
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", json_schema_extra=_CAME_LATER)
    """Arithmetic of the network while it samples, part of the unit of every number; `auto` is bfloat16 on GPUs that have it, and float32 on CPUs."""
    first_seed: int = Field(0, ge=0, lt=2**62)
    """Seed of the first image; image i has seed first_seed + i."""
    batch_size: int = Field(0, ge=0, json_schema_extra=_NO_RESULT)
    """Images drawn together; 0 draws 64 on a CPU, and as many as the free memory of a GPU holds, up to 256."""
    extractor: Literal["auto", "inception", "classifier", "dct8", "dinov2"] = "auto"
    """Features that decide; `auto` is Inception where `inception_weights` is set, else the classifier where there are labels, else dct8."""
    inception_weights: str | None = None
    """Path of the Inception-2015 weights file, which makes the number an FID."""
    dinov2_weights: str | None = None
    """Folder of DINOv2 (config.json and model.safetensors): distances over its features are taken, too."""
    reference: str | None = None
    """File of statistics (.npz with mu and sigma) to compare with in place of the dataset's; of the features that decide."""
    loss_images: int = Field(256, ge=1, json_schema_extra=_CAME_LATER)
    """Most images of each split whose loss is taken at 20 noise levels, for a picture; never more than `num_samples`."""
    keep_samples: bool = False
    """Keep all samples as a dataset of parquet shards."""
    election_samples: int = Field(0, ge=0)
    """Samples of each kept checkpoint and average, the best of which is measured and registered; 0 takes the last checkpoint's main average."""

    ema_widths: tuple[float, ...] = Field((), json_schema_extra=_CAME_LATER)
    """Widths of power-function averages that are made of the snapshots of `train.ema_snapshot_every` and stand for election, too; `ddpm ema` sets them."""
    nll_images: int = Field(0, ge=0, json_schema_extra=_CAME_LATER)
    """Held-out images whose negative log-likelihood is bounded, in bits per dimension: T evaluations of the network for each; 0 bounds none."""

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        if self.ema_widths and not self.election_samples:
            raise ValueError(f"ema_widths={list(self.ema_widths)} stand for election, and there is none; set election_samples, such as election_samples=1000")
        if wrong := [width for width in self.ema_widths if not 0 < width < WIDEST]:
            raise ValueError(f"ema_widths: {wrong[0]:g} is out of range; use more than 0 and less than {WIDEST}")
        return self

    @field_validator("election_samples")
    @classmethod
    def _enough_to_measure(cls, count: int) -> int:
        if count == 1:
            raise ValueError("one sample cannot be measured; use 0 for no election, or 2000")
        return count

    @property
    def recipe(self) -> Recipe:
        """How samples are drawn; in float32 as long as nobody asked the hardware what `auto` means, as `open_evaluator` does."""
        return Recipe(
            sampler=self.sampler,
            steps=self.steps,
            spacing=self.spacing,
            eta=self.eta,
            variance=self.variance,
            guidance=self.guidance,
            threshold=self.threshold,
            precision="float32" if self.precision == "auto" else self.precision,
        )

    @property
    def seeds(self) -> range:
        """The seeds that are measured."""
        return range(self.first_seed, self.first_seed + self.num_samples)
