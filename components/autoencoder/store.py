"""Where autoencoders lie: below the storage root by digest, and inside registered versions; finding one loads no torch.

STORAGE/autoencoders/DIGEST/    config.json, diffusion_pytorch_model.safetensors: as diffusers writes them
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from ..storage import Location

FOLDER = "autoencoders"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
PACKED = {"autoencoder.json": CONFIG, "autoencoder.safetensors": WEIGHTS}
"""Names of the files in a checkpoint that holds its autoencoder."""
DIGEST_LENGTH = 16
CLASS = "AutoencoderKL"


@dataclass(frozen=True)
class AutoencoderFiles:
    """An autoencoder's files.

    Attributes:
        digest: of both files' content.
        channels: of the images.
        latent_channels: of the latents.
        factor: pixels of an image for each of a latent, in height and in width.
    """

    folder: Location
    config_name: str
    weights_name: str
    digest: str
    channels: int
    latent_channels: int
    factor: int

    def latent_shape(self, pixels: tuple[int, ...]) -> tuple[int, int, int]:
        """Returns (C, h, w) of the latents of images (C, H, W).

        Raises:
            DataError: if it takes no such images; names what would do.
        """
        channels, height, width = pixels
        if channels != self.channels:
            modes = {1: "L", 3: "RGB", 4: "RGBA"}
            right = f"use data.mode={modes[self.channels]}" if self.channels in modes else "use another autoencoder"
            raise DataError(f"data.autoencoder takes images of {self.channels} channels, and these have {channels}; {right}")
        if height % self.factor or width % self.factor:
            raise DataError(f"data.autoencoder makes {self.factor} pixels one, which does not divide height {height} and width {width}; use multiples of it")
        return self.latent_channels, height // self.factor, width // self.factor


def read_autoencoder(folder: Location, where: str = "") -> AutoencoderFiles:
    """Returns what a folder of a diffusers `AutoencoderKL` holds, its weights hashed.

    Args:
        where: what messages call it.

    Raises:
        DataError: if it is none, or its weights are pickled.
    """
    where = where or str(folder)
    inner = folder / "vae" if (folder / "vae" / CONFIG).is_file() else folder  # a whole pipeline
    config = _config(inner, CONFIG, where)
    if not (inner / WEIGHTS).is_file():
        unsafe = ", only pickled ones, which are not read" if (inner / "diffusion_pytorch_model.bin").is_file() else ""
        raise DataError(f"{where} has no {WEIGHTS}{unsafe}; save it with safe_serialization=True")
    return _files(inner, CONFIG, WEIGHTS, config)


def _config(folder: Location, name: str, where: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{where} is no folder of a diffusers {CLASS}: {name} cannot be read ({error}); name one that save_pretrained wrote") from error
    if not isinstance(config, dict) or config.get("_class_name") != CLASS:
        found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise DataError(f"{where} holds a {found}; name a folder of a diffusers {CLASS}")
    return config


def _files(folder: Location, config_name: str, weights_name: str, config: Mapping[str, Any]) -> AutoencoderFiles:
    with (folder / weights_name).open() as file:
        state = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        while block := file.read(1 << 20):
            state.update(block)
    levels = len(config.get("block_out_channels", [64]))
    return AutoencoderFiles(
        folder,
        config_name,
        weights_name,
        state.hexdigest()[:DIGEST_LENGTH],
        int(config.get("in_channels", 3)),
        int(config.get("latent_channels", 4)),
        2 ** (levels - 1),
    )


def keep_autoencoder(files: AutoencoderFiles, storage: Location) -> Location:
    """Returns the folder of an autoencoder below the storage root, copied there the first time, where every node can read it."""
    kept = storage / FOLDER / files.digest
    if not (kept / CONFIG).is_file():
        (kept / WEIGHTS).write_bytes((files.folder / files.weights_name).read_bytes())
        (kept / CONFIG).write_bytes((files.folder / files.config_name).read_bytes())  # last: it makes the folder whole
    return kept


def find_autoencoder(digest: str, near: Location) -> AutoencoderFiles:
    """Returns the autoencoder of a digest: that in a checkpoint itself, or that below the storage root around it.

    Args:
        near: a checkpoint or a dataset.

    Raises:
        DataError: if it is in neither place, or no longer what it was.
    """
    packed, plain = PACKED, {CONFIG: CONFIG, WEIGHTS: WEIGHTS}
    places, folder = [(near, packed)], near
    while folder.parent != folder:
        places.append((folder / FOLDER / digest, plain))
        folder = folder.parent
    for place, names in places:
        config_name, weights_name = names
        if (place / config_name).is_file() and (place / weights_name).is_file():
            files = _files(place, config_name, weights_name, _config(place, config_name, str(place)))
            if files.digest != digest:
                raise DataError(f"autoencoder in {place} has digest {files.digest}, not {digest}; restore it")
            return files
    raise DataError(f"autoencoder {digest} of {near} is neither there nor in {FOLDER} of a folder above; restore it, or run the encode stage again")
