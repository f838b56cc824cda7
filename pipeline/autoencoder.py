"""Which autoencoder `data.autoencoder` means: found, checked and pinned before anything is encoded."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pydantic import BaseModel, ConfigDict, ValidationError

from components.autoencoder.store import AutoencoderFiles, find_autoencoder, keep_autoencoder, read_autoencoder
from components.errors import DataError
from components.model.manifest import MAIN_AVERAGE, MANIFEST
from components.model.spec import read_spec
from components.networks.config import NetworkConfig
from components.scratch import scratch
from components.spaces.latents import LatentSpace
from components.storage import Location
from pipeline.errors import ConfigError
from pipeline.registry.versions import fetch_checkpoint
from pipeline.tracking import Tracking

PIN_FILE = "autoencoder.json"
PRESET = "preset:"
"""What an address begins with that names the preset of an autoencoder to be trained first."""


class _Pin(BaseModel):
    """What a run's `data.autoencoder` meant when it was called first: an alias may move, and must not make the run another one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    autoencoder: str
    digest: str


def check_autoencoder(address: str | None) -> None:
    """Checks that a path in `data.autoencoder` is one of an autoencoder, before anything else is done.

    Raises:
        ConfigError, DataError: if it is not.
    """
    if address is not None and not address.startswith(("models:/", PRESET)):
        with _read(address):
            pass


def resolve_autoencoder(address: str, *, folder: Location, tracking: Tracking, storage: Location) -> AutoencoderFiles:
    """Returns the autoencoder that `data.autoencoder` means, kept below the storage root; one of the registry is the same at every call of a run.

    Args:
        folder: of the run, where it is noted.

    Raises:
        DataError: if it is none.
        RegistryError: if the registry does not know the model.
    """
    if not address.startswith("models:/"):
        with _read(address) as files:
            return read_autoencoder(keep_autoencoder(files, storage))
    with suppress(OSError, ValidationError, DataError):
        pin = _Pin.model_validate_json((folder / PIN_FILE).read_text())
        if pin.autoencoder == address:
            return find_autoencoder(pin.digest, folder)
    with _of_checkpoint(fetch_checkpoint(tracking, address, storage), MAIN_AVERAGE, address) as files:
        kept = read_autoencoder(keep_autoencoder(files, storage))
    (folder / PIN_FILE).write_text(_Pin(autoencoder=address, digest=kept.digest).model_dump_json(indent=2) + "\n")
    return kept


@contextmanager
def _read(address: str) -> Iterator[AutoencoderFiles]:
    """Gives the autoencoder of a folder: of diffusers, or a checkpoint trained here, of which `#AVERAGE` may name the average."""
    path, _, weights = address.partition("#")
    folder = Location.of(path)
    if (folder / MANIFEST).is_file():
        with _of_checkpoint(folder, weights or MAIN_AVERAGE, address) as files:
            yield files
        return
    try:
        files = read_autoencoder(folder, f"data.autoencoder={address}")
    except DataError as error:
        raise ConfigError(str(error)) from error
    yield files


@contextmanager
def _of_checkpoint(checkpoint: Location, weights: str, address: str) -> Iterator[AutoencoderFiles]:
    """Gives the autoencoder that a checkpoint is, or that it decodes by."""
    spec = read_spec(checkpoint)
    if isinstance(spec.space, LatentSpace):
        yield find_autoencoder(spec.space.autoencoder, checkpoint)
        return
    if spec.diffusion.process != "reconstruction":
        raise ConfigError(f"data.autoencoder={address} is a denoiser of pixels; name an autoencoder, or a folder of diffusers")
    from components.model.checkpoint import load_denoiser
    from components.model.diffusers_export import write_network

    denoiser = load_denoiser(checkpoint, weights=weights)
    with scratch("autoencoder") as folder:
        theirs = spec.model.to_diffusers(denoiser.network, spec.shape)
        assert not isinstance(theirs, str)
        write_network(folder / "vae", theirs)
        yield read_autoencoder(Location.of(folder / "vae"))


def check_network(model: NetworkConfig, latent: tuple[int, int, int]) -> None:
    """Checks that a network takes latents (C, h, w).

    Raises:
        ConfigError: if it does not.
    """
    try:
        model.check_shape(latent)
    except ValueError as error:
        channels, height, width = latent
        raise ConfigError(f"model: the latents are {width}x{height} of {channels} channels: {error}") from error


def check_start(checkpoint: Location, model: str, space: LatentSpace | None) -> None:
    """Checks that weights to start from work in the space that is trained in.

    Raises:
        ConfigError: if they do not.
    """
    theirs = read_spec(checkpoint).space
    found = theirs.autoencoder if isinstance(theirs, LatentSpace) else None
    wanted = space.autoencoder if space is not None else None
    if found != wanted:
        there, here = (f"latents of autoencoder {digest}" if digest else "pixels" for digest in (found, wanted))
        raise ConfigError(f"{model} works on {there}, and this run on {here}; set data.autoencoder to fit, or start from scratch")
