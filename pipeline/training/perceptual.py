"""The files of `train.perceptual_weights` and `perceptual_layers`: checked before anything is trained, known by content, read by every worker."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from components.errors import DataError
from components.model.manifest import sha256_of
from components.storage import Location
from pipeline.training.config import TrainConfig

if TYPE_CHECKING:
    from components.diffusion.perceptual import Perceptual

PERCEPTUAL = ("perceptual_weights", "perceptual_layers")


def perceptual_digest(config: TrainConfig) -> str | None:
    """Returns the checksums of the files, with `+` between; None where there is no perceptual loss.

    Raises:
        DataError: if a file cannot be read.
    """
    if config.perceptual_weights is None:
        return None
    with _files(config) as files:
        return _digest(files)


def load_perceptual(config: TrainConfig, digest: str) -> "Perceptual":
    """Returns the distance by the files that settings name.

    Args:
        digest: what `perceptual_digest` said when the training began.

    Raises:
        DataError: if they are other files, or none of these weights.
    """
    from components.diffusion import perceptual

    with _files(config) as files:
        if _digest(files) != digest:
            raise DataError("the files of train.perceptual_weights are no longer what they were when the training began; bring them back")
        return perceptual.load_perceptual(*files)


def check_perceptual(config: TrainConfig) -> None:
    """Checks the files before anything expensive starts.

    Raises:
        DataError: if one is missing, or another one.
    """
    if config.perceptual_weights is None:
        return
    from components.diffusion import perceptual

    with _files(config) as files:
        perceptual.load_perceptual(*files)


def _digest(files: list[Path]) -> str:
    return "+".join(sha256_of(file) for file in files)


@contextmanager
def _files(config: TrainConfig) -> Iterator[list[Path]]:
    named = {key: Location.of(path) for key in PERCEPTUAL if (path := getattr(config, key)) is not None}
    for key, file in named.items():
        if not file.is_file():
            raise DataError(f"train.{key}={file} does not exist; name a .pth or .safetensors file")
    with ExitStack() as stack:
        yield [stack.enter_context(file.parent.local_copy([file.name])) / file.name for file in named.values()]
