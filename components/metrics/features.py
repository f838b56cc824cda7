"""From pixels to feature vectors. An extractor has a name and a digest, and a number made with it carries both.

Only `InceptionExtractor` may be called FID: Inception-2015 pool3 features of uint8 images, TF1-style resize (TTUR; torch-fidelity).
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ..errors import DataError
from ..model.manifest import sha256_of

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FEATURES = 2048
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


class Extractor(Protocol):
    """Pixels to features.

    Attributes:
        name: how the Frechet distance over these features is called.
        digest: SHA-256 of all that decides the features.
        preprocessing: what happens to the pixels before the network, in words.
    """

    name: str
    digest: str
    preprocessing: str

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        """Returns features (B, D), float32, of uint8 pixels (B, C, H, W)."""
        ...


@lru_cache(maxsize=4)
def dct_matrix(size: int) -> torch.Tensor:
    """Returns the orthonormal DCT-II matrix (size, size), float64."""
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    matrix = torch.cos(torch.pi / size * (n + 0.5) * k) * (2.0 / size) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


class DctExtractor:
    """Energies of block cosine transforms, version 1: no weights, so that every machine agrees.

    Blocks of 8x8 at stride 4 (4x4 at stride 2 for images under 28 pixels, padded by reflection to whole strides), orthonormal DCT-II.
    Features: per channel and coefficient, the mean over blocks of its absolute value and its standard deviation over blocks.
    """

    name = "fd_dct8_v1"
    preprocessing = "uint8 / 255, blocks at half-block stride"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.digest = hashlib.sha256(b"dct8_v1").hexdigest()
        self._device = device

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        coefficients = _block_dct(pixels.to(self._device).double() / 255.0, _block(min(pixels.shape[2:])))
        features = torch.cat([coefficients.abs().mean(dim=2), coefficients.std(dim=2, correction=0)], dim=2)
        return features.flatten(1).float().cpu().numpy()


def dct_features(shape: tuple[int, ...]) -> int:
    """Returns how many features `DctExtractor` gives of images (C, H, W)."""
    channels, height, width = shape
    return 2 * channels * _block(min(height, width)) ** 2


def _block(image_size: int) -> int:
    return 8 if image_size >= 28 else 4


def _block_dct(values: torch.Tensor, block: int) -> torch.Tensor:
    """Returns coefficients (B, C, blocks, block * block)."""
    stride = block // 2
    pad_y, pad_x = (-values.shape[2] % stride, -values.shape[3] % stride)
    values = torch.nn.functional.pad(values, (0, pad_x, 0, pad_y), mode="reflect")
    blocks = values.unfold(2, block, stride).unfold(3, block, stride)
    matrix = dct_matrix(block).to(values.device)
    return (matrix @ blocks @ matrix.T).flatten(2, 3).flatten(3)


@contextmanager
def full_precision() -> Iterator[None]:
    """Keeps a GPU from rounding float32 to TF32, which changes features by more than models differ."""
    allowed = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed[0]
        torch.set_float32_matmul_precision(allowed[1])


class PointExtractor:
    """Points as they are."""

    name = "ed_points"
    preprocessing = "coordinates as they are"
    digest = hashlib.sha256(b"points_v1").hexdigest()

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        return pixels.numpy()


class InceptionExtractor:
    """Inception-2015 pool3 (2048 features), by torch-fidelity: the features that FID is defined on. Grey is repeated to RGB.

    Args:
        weights: torch-fidelity's weights file.
        expected_sha256: what the file must hash to, checked before it is opened.

    Raises:
        DataError: if the file is missing or another one.
    """

    name = "fid"
    preprocessing = "uint8 RGB, TF1 bilinear to 299x299, (x - 128) / 128"

    def __init__(self, weights: Path, device: torch.device | str = "cpu", expected_sha256: str = INCEPTION_SHA256) -> None:
        check_inception_weights(weights, expected_sha256)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.digest = expected_sha256
        self._device = device
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
        self._network = network.to(device)

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        return self.with_logits(pixels)[0]

    @torch.inference_mode()
    def with_logits(self, pixels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Returns features (B, 2048) and the logits without bias (B, 1008) that the Inception score takes, float32, by one pass."""
        with full_precision():
            features, logits = self._network(pixels.expand(-1, 3, -1, -1).to(self._device))
        return features.cpu().numpy(), logits.cpu().numpy()


def check_inception_weights(weights: Path, expected_sha256: str = INCEPTION_SHA256) -> None:
    """Checks that a file is the Inception-2015 network.

    Raises:
        DataError: if it is missing or hashes to something else.
    """
    if not weights.is_file():
        raise DataError(f"evaluate.inception_weights={weights} does not exist; name torch-fidelity's {INCEPTION_FILE}")
    found = sha256_of(weights)
    if found != expected_sha256:
        raise DataError(
            f"evaluate.inception_weights={weights} has SHA-256 {found[:16]}..., not {expected_sha256[:16]}...; "
            f"only torch-fidelity's {INCEPTION_FILE} gives an FID"
        )


def fetch_inception_weights(folder: Path) -> Path:
    """Returns the Inception weights in a folder, downloaded once and checked.

    Raises:
        DataError: if they are not there and cannot be downloaded.
    """
    target = folder / INCEPTION_FILE
    if not target.is_file():
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(target), INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"evaluate.extractor=inception needs {INCEPTION_FILE}, which could not be downloaded ({error}); "
                f"put it at {target}, or set evaluate.inception_weights to its path"
            ) from error
    check_inception_weights(target)
    return target


def features_in_batches(extractor: Extractor, pixels: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns the features (N, D) of uint8 pixels (N, C, H, W), batch by batch."""
    parts: Sequence[np.ndarray] = [
        extractor(torch.from_numpy(np.ascontiguousarray(pixels[first : first + batch_size]))) for first in range(0, len(pixels), batch_size)
    ]
    return np.concatenate(parts)
