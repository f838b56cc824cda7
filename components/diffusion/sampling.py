"""From seeds to images. A sample depends on its own seed only: not on its batch, its worker, or its place in line."""

from collections.abc import Callable, Sequence

import torch

from ..spaces.pixels import scaled, unscaled
from ..spaces.space import Limit, ScaledLimit
from .bound import split_output
from .levels import Level
from .noise import initial_noise
from .process import Process
from .recipe import Precision, Recipe, Threshold
from .samplers import ancestral, ddim, dpmpp_2m, heun, noise_levels, unipc

OnStep = Callable[[Level, torch.Tensor, torch.Tensor], None]
Guided = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

DYNAMIC_QUANTILE = 0.995


@torch.inference_mode()
def sample(
    network: Callable[..., torch.Tensor],
    process: Process,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    labels: torch.Tensor | None = None,
    null_label: int | None = None,
    x_T: torch.Tensor | None = None,
    on_step: OnStep | None = None,
    limit: Limit = 1.0,
) -> torch.Tensor:
    """Draws one row per seed and returns x_0 (len(seeds), *shape), float32, within the limit unless the recipe does not clip.

    Args:
        network: (x_t, t (B,)), or (x_t, t, labels (B,)) where labels are given, -> output of x_t's shape. It may hand out the same memory
            at every call, as one under CUDA graphs does. With guidance it is called once with both halves, the labelled one first.
            Where it says variances it has twice as many channels. It runs in the recipe's precision, x_t and all else stay float32; `prepared`
            makes one for which that costs no cast of weights.
        shape: of x_0, such as (C, H, W).
        labels: (len(seeds),) int64, the class of each image.
        null_label: the label that means none, which guidance needs.
        x_T: noise (len(seeds), *shape) to start from instead of the seeds' own; fresh noise still comes from the seeds.
        on_step: called with (level, x_t, the estimate of x_0) after every evaluation.
        limit: largest absolute value of x_0, which thresholds keep to; None where there is none.

    Raises:
        ValueError: if the recipe does not fit the schedule, or needs labels that are not there, or a length differs from that of seeds.
    """
    levels = noise_levels(recipe, process)
    _check_inputs(recipe, seeds, labels, null_label, x_T)
    network = _in_precision(network, recipe.precision, torch.device(device).type)
    guided = _guided(network, recipe.guidance, None if labels is None else labels.to(device), null_label, learned=process.config.learned_variance)

    learned, said = process.config.learned_variance, []

    def estimate(x_t: torch.Tensor, level: Level) -> torch.Tensor:
        t = torch.full((len(x_t),), level.t, device=x_t.device)
        x = x_t if level.scale == 1 else x_t * level.scale
        output, fraction = split_output(guided(*process.network_inputs(x, t)).float(), learned)
        said[:] = [] if fraction is None else [fraction]
        x_0 = thresholded(process.predict_x_0(output, x, t[:1]), recipe.threshold, limit)
        if on_step is not None:
            on_step(level, x_t, x_0)
        return x_0

    def fresh_noise(level: Level) -> torch.Tensor:
        return initial_noise(seeds, shape, draw=level.index + 1).to(device)

    x_t = (initial_noise(seeds, shape) if x_T is None else x_T.float()).to(device)
    x_t = x_t if process.start == 1 else x_t * process.start
    if recipe.sampler == "ddim":
        return ddim(estimate, x_t, levels, fresh_noise, recipe.eta)
    if recipe.sampler == "ancestral":
        return ancestral(estimate, x_t, levels, fresh_noise, recipe.variance, lambda: said[0])
    if recipe.sampler == "heun":
        return heun(estimate, x_t, levels, straight=process.config.process != "edm")
    return {"dpmpp_2m": dpmpp_2m, "unipc": unipc}[recipe.sampler](estimate, x_t, levels)


def thresholded(x_0: torch.Tensor, threshold: Threshold, limit: Limit = 1.0) -> torch.Tensor:
    """Returns an estimate of x_0 (B, ...) kept in range, always in memory of its own.

    `clip` clamps to the limit; `dynamic` clamps to the 99.5 % quantile of each row's absolute values, at least the limit, and scales that to it
    (Imagen section 2.3); `none` leaves it as it is, and so does every threshold of a space without a limit.
    """
    if threshold == "none" or limit is None:
        # Of an x_0 model this is the network's own output, which its next call may overwrite.
        return x_0.clone()
    if isinstance(limit, ScaledLimit):
        return scaled(thresholded(unscaled(x_0, *limit), threshold), *limit)
    if threshold == "clip":
        return x_0.clamp(-limit, limit)
    limits = x_0.abs().flatten(1).quantile(DYNAMIC_QUANTILE, dim=1).clamp(min=limit).view(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-limits, limits) / (limits / limit)


def _in_precision(network: Callable[..., torch.Tensor], precision: Precision, device_type: str) -> Callable[..., torch.Tensor]:
    """Returns the network in some arithmetic, by autocast.

    No casts are kept: autocast would keep those of weights alone that ask for gradients, and a CUDA graph must not meet any.
    """

    def network_in_precision(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
            return network(*inputs)

    return network_in_precision


def _guided(network: Callable[..., torch.Tensor], guidance: float, labels: torch.Tensor | None, null_label: int | None, *, learned: bool) -> Guided:
    """Returns the network as a function of x_t and t: labelled, and led away from the unlabelled output (Classifier-Free Guidance Eq. 6, guidance = 1 + w).

    Variances that a network says are the labelled ones.
    """
    if labels is None:
        return network
    if guidance == 1 or null_label is None:
        return lambda x_t, t: network(x_t, t, labels)
    both = torch.cat([labels, torch.full_like(labels, null_label)])

    def guided(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        labelled, unlabelled = network(torch.cat([x_t, x_t]), torch.cat([t, t]), both).float().chunk(2)
        led = unlabelled + guidance * (labelled - unlabelled)
        return torch.cat([led.chunk(2, dim=1)[0], labelled.chunk(2, dim=1)[1]], dim=1) if learned else led

    return guided


def _check_inputs(recipe: Recipe, seeds: Sequence[int], labels: torch.Tensor | None, null_label: int | None, x_T: torch.Tensor | None) -> None:
    if recipe.guidance != 1 and (labels is None or null_label is None):
        missing = "labels" if labels is None else "a null label"
        raise ValueError(f"guidance={recipe.guidance} needs {missing}; use guidance=1, or a model trained with labels that were dropped at times")
    for name, given in (("labels", labels), ("x_T", x_T)):
        if given is not None and len(given) != len(seeds):
            raise ValueError(f"{name} has {len(given)} rows for {len(seeds)} seeds; give one for each")
