"""All that decides a sample beside the model and the seed."""

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from .config import DiffusionConfig

SamplerName = Literal["ddim", "ancestral", "dpmpp_2m", "unipc", "heun"]
Spacing = Literal["uniform", "quadratic"]
Variance = Literal["small", "large", "learned"]
Threshold = Literal["clip", "dynamic", "none"]
Precision = Literal["float32", "bfloat16"]

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)


@dataclass(frozen=True)
class Recipe:
    """How samples are drawn.

    Attributes:
        sampler: `ddim` (DDIM, which is Euler's method for flows and EDM), `ancestral` (DDPM), `dpmpp_2m` (DPM-Solver++, multistep, second order), `unipc`
            (UniPC, second order) or `heun` (EDM algorithm 1, second order, two evaluations a step).
        steps: network evaluations per image, 1 to T; `heun` takes one less where they are even.
        spacing: which time steps `ddim` visits, evenly spaced or denser near 0 (DDIM appendix D.2).
        eta: fresh noise of `ddim`, from 0 (none) to 1 (as much as `ancestral`) (DDIM Eq. 16).
        variance: of an `ancestral` step: `small` is the posterior's, `large` is beta (DDPM section 3.2), `learned` what the network says (Improved DDPM).
        guidance: weight of the label in classifier-free guidance; 1 is none.
        threshold: what keeps the estimate of x_0 in -1..1: `clip`, `dynamic` (Imagen section 2.3) or `none`.
        precision: arithmetic of the network; all else is float32.
    """

    sampler: SamplerName = "ddim"
    steps: int = 50
    spacing: Spacing = "uniform"
    eta: float = 0.0
    variance: Variance = "small"
    guidance: float = 1.0
    threshold: Threshold = "clip"
    precision: Precision = "float32"

    def check(self, num_steps: int) -> None:
        """Checks the recipe against a model of num_steps (T) noise levels.

        Raises:
            ValueError: if a value is unknown, out of range, or means nothing to this sampler.
        """
        self._check_names()
        if not 1 <= self.steps <= num_steps:
            raise ValueError(f"steps={self.steps} is out of range; use 1 to {num_steps}, the model's number of noise levels")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} is out of range; use 0 to 1")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance={self.guidance} is out of range; use 0 or more, 1 for none")
        if self.eta != 0 and self.sampler != "ddim":
            raise ValueError(f"eta={self.eta} means nothing to sampler={self.sampler}; use eta=0 or sampler=ddim")
        if self.spacing != "uniform" and self.sampler != "ddim":
            raise ValueError(f"spacing={self.spacing} means nothing to sampler={self.sampler}; use spacing=uniform or sampler=ddim")
        if self.variance != "small" and self.sampler != "ancestral":
            raise ValueError(f"variance={self.variance} means nothing to sampler={self.sampler}; use variance=small or sampler=ancestral")

    def check_process(self, diffusion: DiffusionConfig) -> None:
        """Checks the recipe against a diffusion process.

        Raises:
            ValueError: like `check`, or if the process has nothing of what it asks for.
        """
        self.check(diffusion.most_steps)
        if self.spacing != "uniform" and diffusion.process != "ddpm":
            raise ValueError(f"spacing={self.spacing} means nothing to a model of process={diffusion.process}; use spacing=uniform")
        if self.variance == "learned" and not diffusion.learned_variance:
            raise ValueError("variance=learned needs a model trained with diffusion.learned_variance=true; use variance=small or variance=large")

    def describe(self) -> str:
        """Returns the sampler in a few words: what differs from the defaults is said, as in `ddim eta 0.5, 50 quadratic steps`. The precision is not."""
        name = f"ddim eta {self.eta:g}" if self.eta else f"ancestral of {self.variance} variance" if self.variance != "small" else self.sampler
        steps = f"{self.steps}{' quadratic' if self.spacing == 'quadratic' else ''} step{'s' if self.steps != 1 else ''}"
        guidance = [f"guidance {self.guidance:g}"] if self.guidance != 1 else []
        threshold = {"clip": [], "dynamic": ["dynamic thresholding"], "none": ["no clipping"]}[self.threshold]
        return ", ".join([name, steps, *guidance, *threshold])

    def identity(self) -> dict[str, object]:
        """Returns what an address of samples is made of; the precision came later, and is left out where it is that of before."""
        return {name: value for name, value in asdict(self).items() if name != "precision" or value != "float32"}

    def _check_names(self) -> None:
        kinds = {"sampler": SamplerName, "spacing": Spacing, "variance": Variance, "threshold": Threshold, "precision": Precision}
        for field, known in ((field, get_args(kind)) for field, kind in kinds.items()):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)} is unknown; use {', '.join(known[:-1])} or {known[-1]}")


# Distance to the end of the probability-flow ODE from the same noise (RMSE over 48 seeds, exact denoiser of blurred 16x16 digits), after 16 steps of
# ddim, dpmpp_2m and unipc: 0.099, 0.074, 0.066 with linear betas, 0.067, 0.051, 0.034 with cosine betas. ddim is as near after 27 and 42.
MONITORING = Recipe(sampler="unipc", steps=16)
"""For pictures drawn while a training run goes on: as near the end of the ODE as ddim is after about twice as many steps."""
