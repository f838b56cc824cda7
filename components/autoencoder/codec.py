"""Images to latents and back. What an image becomes depends on the image alone, not on those beside it."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import DataError
from ..scratch import scratch
from ..spaces.pixels import to_model_range
from .store import CLASS, CONFIG, WEIGHTS, AutoencoderFiles

_IMPORTING = threading.Lock()  # diffusers cannot be imported by two threads at a time
AT_ONCE = 8
"""Images that the network sees together, always so many: sums may be added up in another order for another number."""


class Codec:
    """An autoencoder in evaluation mode.

    Attributes:
        network: a diffusers `AutoencoderKL`, whose type says nothing of what it has.
    """

    def __init__(self, network: Any, device: torch.device | str) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self._device = torch.device(device)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Returns mean and standard deviation of the posterior, (B, 2C, h, w) float16, of images (B, C, H, W) uint8."""
        found = []
        for first in range(0, len(pixels), AT_ONCE):
            part = torch.from_numpy(np.ascontiguousarray(pixels[first : first + AT_ONCE])).to(self._device)
            posterior = self.network.encode(_filled(to_model_range(part))).latent_dist
            found.append(torch.cat([posterior.mean, posterior.std], dim=1)[: len(part)].to(torch.float16).cpu())
        return torch.cat(found).numpy()

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images (B, C, H, W), float32, -1..1 where they are good, of latents (B, C, h, w)."""
        parts = latents.to(self._device).split(AT_ONCE)
        return torch.cat([self.network.decode(_filled(part)).sample[: len(part)] for part in parts])


def _filled(part: torch.Tensor) -> torch.Tensor:
    return F.pad(part, (0, 0) * (part.ndim - 1) + (0, AT_ONCE - len(part)))


def load_codec(files: AutoencoderFiles, device: torch.device | str = "cpu") -> Codec:
    """Returns the autoencoder of a folder, by diffusers' own loading.

    Raises:
        DataError: if diffusers is missing, or the weights do not fit the settings.
    """
    with files.folder.local_copy([files.config_name, files.weights_name]) as folder:
        if (files.config_name, files.weights_name) == (CONFIG, WEIGHTS):
            return Codec(_load(folder), device)
        with scratch("autoencoder") as named:
            for name, wanted in ((files.config_name, CONFIG), (files.weights_name, WEIGHTS)):
                (named / wanted).symlink_to((folder / name).resolve())
            return Codec(_load(named), device)


def _load(folder: Path) -> Any:
    try:
        with _IMPORTING:
            from diffusers import AutoencoderKL
    except ImportError as error:
        raise DataError(f"a latent space needs diffusers, which cannot be imported ({error}); pip install diffusers") from error
    try:
        return AutoencoderKL.from_pretrained(folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder} is no {CLASS} that diffusers loads ({' '.join(str(error).split())[:300]}); save it again") from error
