"""Settings of the diffusion process; reading them loads no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Prediction = Literal["eps", "x_0", "v", "posterior_mean"]


class DiffusionConfig(BaseModel):
    """The diffusion process and what the network predicts."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_steps: int = Field(1000, ge=2, le=10_000)
    """T, the number of noise levels (DDPM section 4)."""
    betas: Literal["linear", "cosine"] = "linear"
    """Noise schedule: `linear` 1e-4 to 0.02 at T=1000 (DDPM section 4) or `cosine` (Improved DDPM Eq. 17)."""
    prediction: Prediction = "eps"
    """What the network estimates: `eps` (DDPM Eq. 14), `x_0`, `v` (Progressive Distillation, appendix D), or `posterior_mean`, the mean of
    q(x_{t-1} | x_t, x_0) (DDPM Eq. 7-8)."""
