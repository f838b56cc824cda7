"""DINOv2 features, whose Frechet distance follows the judgement of people better than FID does (Stein et al. 2023)."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from ..errors import DataError
from ..model.manifest import sha256_of
from ..storage import Location
from .features import full_precision

CONFIG, WEIGHTS = "config.json", "model.safetensors"
IMAGE_SIZE = 224  # pixels
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels / 255


class DinoExtractor:
    """The class token of DINOv2 after its last normalisation, as `dgm-eval` of Stein et al. takes it. Grey is repeated to RGB.

    Args:
        folder: a DINOv2 model in Hugging Face's form, `config.json` and `model.safetensors`; nothing is downloaded.

    Raises:
        DataError: if the folder holds no such model, or the package that runs it is not installed.
    """

    preprocessing = f"uint8 RGB, PIL bicubic to {IMAGE_SIZE}x{IMAGE_SIZE}, / 255, ImageNet mean and deviation"

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        check_dino(Location.of(folder))
        hashes = "".join(sha256_of(folder / name) for name in (CONFIG, WEIGHTS))
        self.digest = hashlib.sha256(hashes.encode()).hexdigest()
        self.name = f"fd_dinov2_{self.digest[:8]}"
        self._device = device
        self._network = _load(folder).to(device).eval()

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        x = torch.from_numpy(np.stack([_resized(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()])).permute(0, 3, 1, 2).to(self._device)
        mean, deviation = (torch.tensor(values, device=self._device).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
        with full_precision():
            features = self._network((x.float() / 255 - mean) / deviation).pooler_output
        return features.float().cpu().numpy()


def check_dino(folder: Location) -> None:
    """Checks that a folder holds the files of a DINOv2 model, and that the package which runs it is installed.

    Raises:
        DataError: if not.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"evaluate.dinov2_weights={folder} lacks {' and '.join(missing)}; name a folder with DINOv2 in Hugging Face's form")
    num_features(folder)
    if find_spec("transformers") is None:
        raise DataError(f"evaluate.dinov2_weights={folder} needs the package transformers; pip install 'transformers>=5'")


def num_features(folder: Location) -> int:
    """Returns how many features a DINOv2 model gives.

    Raises:
        DataError: if its configuration cannot be read.
    """
    try:
        return int(json.loads((folder / CONFIG).read_text())["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"evaluate.dinov2_weights={folder / CONFIG} is no configuration of DINOv2 ({error}); name another folder") from error


def _load(folder: Path) -> torch.nn.Module:
    try:
        from transformers import Dinov2Model
    except ImportError as error:
        raise DataError("DINOv2 features need the package transformers; pip install 'transformers>=5'") from error
    try:
        network, report = cast(Any, Dinov2Model).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder} holds no readable DINOv2 ({error}); name a folder with config.json and model.safetensors of one") from error
    absent = sorted(report["missing_keys"])
    if absent:
        raise DataError(f"{folder / WEIGHTS} lacks {len(absent)} tensors of DINOv2, such as {absent[0]}; name the weights that belong to config.json")
    return network


def _resized(image: np.ndarray) -> np.ndarray:
    """Returns (224, 224, 3) uint8 of an image (H, W, C) uint8."""
    rgb = np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    return np.asarray(Image.fromarray(rgb).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
