"""Settings of the diffusion process; reading them loads no torch."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

ProcessName = Literal["ddpm", "flow", "edm", "reconstruction"]
Betas = Literal["linear", "cosine", "sigmoid", "quadratic"]
Prediction = Literal["eps", "x_0", "v", "posterior_mean"]
LossWeight = Literal["simple", "min_snr", "p2"]

_CAME_LATER: dict[str, JsonValue] = {"result": "unless default"}
MOST_STEPS = 10_000
"""Network evaluations of one sample, of a process whose time is a real number."""


class DiffusionConfig(BaseModel):
    """The diffusion process, what the network predicts, and how errors are weighted."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    process: ProcessName = Field("ddpm", json_schema_extra=_CAME_LATER)
    """How data become noise: `ddpm` in T steps (DDPM), `flow` on straight lines (rectified flow, flow matching), `edm` by adding noise of growing deviation
    (EDM); `reconstruction` is no diffusion, for an autoencoder (`kind: autoencoder`). `num_steps`, `betas`, `prediction` and the settings of weights and
    variance belong to `ddpm`; the network of `flow` predicts eps - x_0, that of `edm` is preconditioned."""
    num_steps: int = Field(1000, ge=2, le=10_000)
    """T, the number of noise levels (DDPM section 4)."""
    betas: Betas = "linear"
    """Noise schedule: `linear` 1e-4 to 0.02 at T=1000 (DDPM section 4), `cosine` (Improved DDPM Eq. 17), `sigmoid` (GeoDiff) or `quadratic` (the square roots
    are evenly spaced, as in the code of DDIM)."""
    zero_terminal_snr: bool = Field(False, json_schema_extra=_CAME_LATER)
    """Shift and scale the schedule so that nothing of the image is left at t = T-1 (Lin et al. 2023, algorithm 1); needs `prediction` other than eps."""
    prediction: Prediction = "eps"
    """What the network estimates: `eps` (DDPM Eq. 14), `x_0`, `v` (Progressive Distillation, appendix D), or `posterior_mean`, the mean of
    q(x_{t-1} | x_t, x_0) (DDPM Eq. 7-8)."""
    loss_weight: LossWeight = Field("simple", json_schema_extra=_CAME_LATER)
    """Weight of the squared error by noise level: `simple` is 1 for whatever is predicted (DDPM Eq. 14), `min_snr` min(SNR, gamma) for the error of x_0
    (Min-SNR), `p2` SNR / (1 + SNR)^gamma for it (P2)."""
    min_snr_gamma: float = Field(5.0, gt=0.0, json_schema_extra=_CAME_LATER)
    """gamma of `loss_weight=min_snr`, a signal-to-noise ratio."""
    p2_gamma: float = Field(1.0, ge=0.0, json_schema_extra=_CAME_LATER)
    """gamma of `loss_weight=p2`; 0 is `simple` for a network that predicts eps."""
    learned_variance: bool = Field(False, json_schema_extra=_CAME_LATER)
    """The network has as many outputs again, which say where each variance of the reverse process lies between its bounds; trained on L_hybrid
    (Improved DDPM Eq. 15-16). Draw with `evaluate.sampler=ancestral evaluate.variance=learned`."""
    kl_weight: float = Field(1e-6, ge=0.0, json_schema_extra=_CAME_LATER)
    """Weight of the divergence of an autoencoder's posteriors from N(0, 1), for `reconstruction` (1e-6 in Latent Diffusion)."""
    noise_mean: float | None = Field(None, json_schema_extra=_CAME_LATER)
    """Where training looks most: mean of the logit of the time of `flow` (0 by default, as in SD3), of ln sigma of `edm` (-1.2 by default)."""
    noise_deviation: float | None = Field(None, gt=0.0, json_schema_extra=_CAME_LATER)
    """Its standard deviation; 1 for `flow` and 1.2 for `edm` by default."""
    data_deviation: float = Field(0.5, gt=0.0, json_schema_extra=_CAME_LATER)
    """sigma_data of `edm`: standard deviation of x_0; about 0.5 for photographs, 1 for points."""
    sigma_min: float = Field(0.002, gt=0.0, json_schema_extra=_CAME_LATER)
    """Least noise at which `edm` samples, before none."""
    sigma_max: float = Field(80.0, gt=0.0, json_schema_extra=_CAME_LATER)
    """Noise from which `edm` samples."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.process != "ddpm":
            for name in ("zero_terminal_snr", "loss_weight", "learned_variance"):
                if (value := getattr(self, name)) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}={value} means nothing to process={self.process}; leave it out, or use process=ddpm")
        elif self.noise_mean is not None or self.noise_deviation is not None:
            raise ValueError("noise_mean and noise_deviation mean nothing to process=ddpm, which trains all levels alike; use process=flow or process=edm")
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError("zero_terminal_snr=true needs a prediction that holds where there is noise alone; use prediction=v or prediction=x_0")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min:g} is not below sigma_max={self.sigma_max:g}; use less")
        return self

    @property
    def most_steps(self) -> int:
        """Most network evaluations of one sample: T, where there are so many levels."""
        return {"ddpm": self.num_steps, "reconstruction": 1}.get(self.process, MOST_STEPS)

    @property
    def time_deviation(self) -> float:
        """Standard deviation of what `noise_deviation` says."""
        return self.noise_deviation or (1.0 if self.process == "flow" else 1.2)

    @property
    def time_mean(self) -> float:
        """Mean of what `noise_mean` says."""
        return self.noise_mean if self.noise_mean is not None else (0.0 if self.process == "flow" else -1.2)

    def describe(self) -> str:
        """Returns the process in a few words, such as `cosine schedule, T = 1000`."""
        if self.process == "ddpm":
            return f"{self.betas} schedule{', zero terminal SNR' if self.zero_terminal_snr else ''}, T = {self.num_steps}"
        if self.process == "reconstruction":
            return "reconstruction, no noise"
        return "rectified flow" if self.process == "flow" else f"EDM, sigma {self.sigma_min:g} to {self.sigma_max:g}"
