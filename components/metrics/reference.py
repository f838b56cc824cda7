"""Statistics of the images that others are measured against, kept in a file of the form that the field exchanges."""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from ..storage import Location

if TYPE_CHECKING:
    from .moments import FeatureStats

ROUNDING = 1e-6  # of the traces: ten times what the eigenvalues of rank-deficient covariances of 2,048 features lose
ASYMMETRY = 1e-6  # of the largest entry: covariances are exchanged in float32, too


@dataclass(frozen=True, eq=False)
class Reference:
    """What images are measured against, with the square root of its covariance, so that a comparison takes one decomposition.

    Attributes:
        mean: (D,), float64.
        covariance: (D, D), float64, with N - 1 in the denominator.
        root: (D, D), float64, the symmetric square root of the covariance.
        count: number of images; None where a file does not say.
        unit: JSON that says of what images and by which extractor these are the statistics; None where a file does not say.
    """

    mean: np.ndarray
    covariance: np.ndarray
    root: np.ndarray
    count: int | None = None
    unit: str | None = None

    @property
    def dimensions(self) -> int:
        """D, the number of features."""
        return len(self.mean)

    @classmethod
    def of(cls, stats: "FeatureStats", unit: str | None = None) -> "Reference":
        """Returns the reference with these statistics; raises like `symmetric_root`."""
        return cls(stats.mean, stats.covariance, symmetric_root(stats.covariance), stats.count, unit)

    def save(self, path: Location) -> None:
        """Writes an .npz file that pytorch-fid and EDM read, too: keys `mu` and `sigma`, and `root`, `count` and `unit` of our own."""
        known: dict[str, Any] = {name: value for name, value in (("count", self.count), ("unit", self.unit)) if value is not None}
        content = io.BytesIO()
        np.savez(content, mu=self.mean, sigma=self.covariance, root=self.root, **known)
        path.write_bytes(content.getvalue())

    @classmethod
    def load(cls, path: Location) -> "Reference":
        """Reads an .npz file of this class, of pytorch-fid or of EDM; a root that it lacks is computed.

        Raises:
            DataError: if the file is none, or holds no mean and covariance of finite features.
        """
        arrays = _read_arrays(path)
        try:
            mean, covariance = _checked(arrays["mu"], 1), _checked(arrays["sigma"], 2)
            _check_covariance(mean, covariance)
            count = _count(arrays)
            root = _checked(arrays["root"], 2) if "root" in arrays else symmetric_root(covariance)
            _check_root(root, covariance)
            unit = str(arrays["unit"]) if "unit" in arrays else None
            json.loads(unit or "null")
        except KeyError as error:
            raise DataError(f"{path} lacks the array {error}; use an .npz file with mu and sigma, as pytorch-fid writes it") from error
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} holds no reference statistics: {error}") from error
        return cls(mean, covariance, root, count, unit)


def symmetric_root(covariance: np.ndarray) -> np.ndarray:
    """Returns the symmetric square root (D, D) of a covariance, float64.

    Raises:
        ValueError: if the matrix is not finite, or has a large negative eigenvalue.
    """
    if not np.isfinite(covariance).all():
        raise ValueError("features are not finite; the images or the extractor's weights are broken")
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -ROUNDING * np.abs(values).max():
        raise ValueError(f"the covariance has the eigenvalue {values[0]:.3g}; it must have none below zero")
    half = vectors * np.clip(values, 0, None) ** 0.25
    return half @ half.T


def _read_arrays(path: Location) -> dict[str, np.ndarray]:
    try:
        content = path.read_bytes()
        if not zipfile.is_zipfile(io.BytesIO(content)):
            raise ValueError("it is no zip archive")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {name: archive[name] for name in ("mu", "sigma", "root", "count", "unit") if name in archive}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is no readable .npz file ({error}); use reference statistics with mu and sigma") from error


def _count(arrays: Mapping[str, np.ndarray]) -> int | None:
    count = int(arrays["count"]) if "count" in arrays else None
    if count is not None and count < 2:
        raise ValueError(f"count={count} images have no covariance")
    return count


def _checked(array: np.ndarray, dimensions: int) -> np.ndarray:
    if array.ndim != dimensions or not array.size or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"an array of {array.dtype} has shape {array.shape}; mu must be (D,), sigma and root (D, D), all of floating point")
    if not np.isfinite(array).all():
        raise ValueError("a value is not finite")
    return array.astype(np.float64)


def _check_covariance(mean: np.ndarray, covariance: np.ndarray) -> None:
    if covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"sigma has shape {covariance.shape}, which does not fit mu of length {len(mean)}")
    if np.abs(covariance - covariance.T).max() > ASYMMETRY * np.abs(covariance).max():
        raise ValueError("sigma is not symmetric")


def _check_root(root: np.ndarray, covariance: np.ndarray) -> None:
    """Checks root root = covariance on one random vector, which a wrong root fails (Freivalds 1977)."""
    probe = np.random.Generator(np.random.Philox(0)).normal(size=len(covariance))
    if root.shape != covariance.shape or np.abs(root @ (root @ probe) - covariance @ probe).max() > 1e-5 * np.abs(covariance).max() * len(probe) ** 0.5:
        raise ValueError("root is not the square root of sigma")
