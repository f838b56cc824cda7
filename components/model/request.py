"""Images on request: what `ddpm sample` and a served model draw."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..diffusion.noise import initial_noise
from ..diffusion.recipe import Recipe
from ..diffusion.sampling import sample
from ..networks.autoencoder_kl.network import Autoencoder
from ..streams import MAX_SEED
from .checkpoint import Denoiser

MAX_IMAGES, BATCH_SIZE = 10_000, 64


@dataclass(frozen=True)
class Request:
    """Images that someone wants.

    Attributes:
        num_images: how many, 1 to MAX_IMAGES.
        seed: of the first image; image i has seed + i.
        label: a class's name or number; by default all classes by turns.
    """

    recipe: Recipe
    num_images: int = 1
    seed: int = 0
    label: str | None = None

    def check(self, denoiser: Denoiser) -> None:
        """Checks the request against a model.

        Raises:
            ValueError: if a value is out of range, or means nothing to this model.
        """
        if denoiser.spec.diffusion.process != "reconstruction":  # which takes no steps at all
            self.recipe.check_process(denoiser.spec.diffusion)
        if not 1 <= self.num_images <= MAX_IMAGES:
            raise ValueError(f"num_images={self.num_images} is out of range; use 1 to {MAX_IMAGES}")
        last = MAX_SEED + 1 - self.num_images
        if not 0 <= self.seed <= last:
            raise ValueError(f"seed={self.seed} is out of range; use 0 to {last}")
        if self.label is not None:
            denoiser.spec.label_number(self.label)
        if self.recipe.guidance != 1 and denoiser.spec.null_label is None:
            raise ValueError(f"guidance={self.recipe.guidance:g} needs a conditional model, and this one has no classes; use guidance=1")


def draw(denoiser: Denoiser, request: Request, network: Callable[..., torch.Tensor] | None = None) -> np.ndarray:
    """Returns the rows (num_images, *shape) that are asked for: pixels (num_images, C, H, W) uint8 of a model of images.

    Args:
        network: the denoiser's, `prepared` for the request's precision; as it is by default.

    Raises:
        ValueError: if a value is out of range, or means nothing to this model.
    """
    request.check(denoiser)
    seeds, network = range(request.seed, request.seed + request.num_images), network or denoiser.network
    return np.concatenate([_draw_batch(denoiser, network, request, seeds[first : first + BATCH_SIZE]) for first in range(0, len(seeds), BATCH_SIZE)])


def _draw_batch(denoiser: Denoiser, network: Callable[..., torch.Tensor], request: Request, seeds: range) -> np.ndarray:
    spec, device = denoiser.spec, next(denoiser.network.parameters()).device
    labels = spec.labels_by_turns(seeds)
    if labels is not None and request.label is not None:
        labels = labels.new_full(labels.shape, spec.label_number(request.label))
    if isinstance(denoiser.network, Autoencoder):
        # Of noise there is nothing to reconstruct; what its decoder makes of random latents is the nearest to a sample that it has.
        noise = initial_noise(seeds, denoiser.network.latent_shape).to(device)
        return spec.space.to_rows(denoiser.network.decode(noise)).cpu().numpy()
    x_0 = sample(network, denoiser.process, seeds, spec.shape, request.recipe, device=device, labels=labels, null_label=spec.null_label, limit=spec.space.limit)
    return spec.space.to_rows(x_0).cpu().numpy()
