"""A grid of images from a registered model or a checkpoint folder."""

from pathlib import Path

import numpy as np
import torch

from components.diffusion.precision import prepared, resolve_precision
from components.diffusion.recipe import SAMPLERS, Recipe, SamplerName
from components.diffusion.sampling import sample
from components.figures import grid
from components.model.checkpoint import Denoiser, load_denoiser
from components.model.request import Request, draw
from components.process import Moment, Watch
from components.scratch import scratch
from components.spaces.space import Space
from components.storage import Location
from pipeline.errors import ConfigError, RegistryError
from pipeline.registry.versions import find_model
from pipeline.tracking import connect, translated
from workflows.options import writing

IMAGES = 16
"""That an animation shows by default."""


def draw_grid(
    model: str, *, num: int, steps: int, seed: int, sampler: str, out: Path, storage: Location, label: str | None = None, guidance: float = 1.0
) -> None:
    """Draws samples with seeds seed, seed + 1, ... and writes a picture of them as a PNG: images side by side, points together.

    Args:
        label: class name or number, for a conditional model; by default its classes by turns.

    Raises:
        ConfigError: if a value is out of range or the picture cannot be written.
        DataError: if the checkpoint folder is not whole.
        RegistryError: if the registry does not know the model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = resolve_precision("auto", device)
    request = Request(Recipe(_sampler(sampler), steps, guidance=guidance, precision=precision), num, seed, label)
    denoiser = _load(model, storage, device)
    try:
        rows = draw(denoiser, request, prepared(denoiser.network, precision, device))
    except ValueError as error:
        raise ConfigError(f"--{error}") from error
    _save(denoiser.spec.space.tiles(rows), out)


def watch(model: str, *, num: int | None, steps: int, seed: int, sampler: str, frames: int, storage: Location) -> tuple[Space, list[Moment]]:
    """Draws samples with seeds seed, seed + 1, ... and returns what some steps saw, and the model's space.

    Args:
        num: samples; by default as many as make a good picture.
        frames: steps to note at most.

    Raises:
        ConfigError, DataError, RegistryError: like `draw_grid`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    denoiser = _load(model, storage, device)
    spec, recipe = denoiser.spec, Recipe(_sampler(sampler), steps, precision=resolve_precision("auto", device))
    space = spec.space
    if spec.diffusion.process == "reconstruction":
        raise ConfigError(f"{model} is an autoencoder, whose images do not rise from noise; `ddpm sample` shows what it decodes random latents to")
    request = Request(recipe, num or (IMAGES if space.one_tile_per_row else space.rows_in_a_picture), seed)
    try:
        request.check(denoiser)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error
    noted, seeds = Watch(space, steps, frames), range(seed, seed + request.num_images)
    network, labels = prepared(denoiser.network, recipe.precision, device), spec.labels_by_turns(seeds)
    null = spec.null_label
    x_0 = sample(network, denoiser.process, seeds, space.shape, recipe, device=device, labels=labels, null_label=null, limit=space.limit, on_step=noted)
    return space, noted.ended(space.to_rows(x_0).cpu().numpy())


def _sampler(name: str) -> SamplerName:
    for known in SAMPLERS:
        if name == known:
            return known
    raise ConfigError(f"--sampler {name} is unknown; use {', '.join(SAMPLERS[:-1])} or {SAMPLERS[-1]}")


def _load(model: str, storage: Location, device: str) -> Denoiser:
    if not model.startswith("models:/"):
        return load_denoiser(Location.of(model), device)
    tracking = connect(storage, create=False)
    find_model(tracking, model)
    import mlflow
    from mlflow.exceptions import MlflowException

    with translated(tracking.uri), scratch("sample") as folder:
        try:
            fetched = mlflow.artifacts.download_artifacts(model.rstrip("/") + "/artifacts/checkpoint", dst_path=str(folder))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                reason = " ".join(str(error.message).split())
                raise RegistryError(f"{model} is not in the registry ({reason}); `ddpm models` lists what is") from error
            raise
        return load_denoiser(Location.of(fetched), device)


def _save(tiles: np.ndarray, out: Path) -> None:
    columns = max(1, min(16, round(len(tiles) ** 0.5 * 1.5)))
    with writing("--out", out):
        grid(tiles, columns).save(out)
