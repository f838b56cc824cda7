"""A diffusers folder as a checkpoint of ours: a network, alone or in a DDPMPipeline; read without diffusers, and without pickle."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..diffusion.config import DiffusionConfig
from ..errors import DataError
from ..networks.config import NetworkConfig
from ..networks.kinds import KINDS
from ..spaces.pixels import PixelSpace
from ..storage import Location
from .checkpoint import read_weights, write_checkpoint
from .spec import DenoiserSpec

WEIGHTS = "diffusion_pytorch_model.safetensors"
_PREDICTIONS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
_BETAS = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}


def import_diffusers(folder: Location, target: Location) -> Location:
    """Returns a checkpoint folder below `target`, named by what it is made of; it is written once.

    Raises:
        DataError: naming what of the folder is missing, or has no counterpart here.
    """
    pipeline = (folder / "model_index.json").is_file()
    network = folder / "unet" if pipeline else folder
    config, scheduler = _json(network / "config.json"), _json(folder / "scheduler" / "scheduler_config.json") if pipeline else {}
    if config.get("_class_name") not in _kinds():
        raise DataError(
            f"{network / 'config.json'} is of a {config.get('_class_name')}; name a folder of a {' or '.join(_kinds())}, or of a DDPMPipeline with one"
        )
    if not (network / WEIGHTS).is_file():
        unsafe = ", which is pickled and not read," if (network / "diffusion_pytorch_model.bin").is_file() else ""
        raise DataError(f"{network} has no {WEIGHTS}{unsafe}; save it with safe_serialization=True")
    try:
        spec = spec_of(config, scheduler, str(network))
    except KeyError as error:
        raise DataError(f"{network / 'config.json'} lacks {error.args[0]}; name a folder that diffusers' save_pretrained wrote") from error
    with network.local_copy([WEIGHTS]) as copy:
        raw = (copy / WEIGHTS).read_bytes()
        named = hashlib.sha256(raw + spec.model_dump_json().encode()).hexdigest()[:16]
        made = target / named
        if not (made / "manifest.json").is_file():
            write_checkpoint(made, spec, _converted(spec, read_weights(copy / WEIGHTS), str(network)))
    return made


def _converted(spec: DenoiserSpec, theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
    network = spec.build()
    try:
        weights = spec.model.from_diffusers(network, dict(theirs))
    except KeyError as error:
        raise DataError(f"{where}/{WEIGHTS} lacks {error.args[0]}, which its config.json promises; save the model again") from error
    except ValueError as error:
        raise DataError(f"{where}/{WEIGHTS}: {error}") from error
    if unlike := [name for name, value in network.state_dict().items() if value.shape != weights[name].shape]:
        raise DataError(f"{where}/{WEIGHTS} has {unlike[0]} of another shape than its config.json says; save the model again")
    return weights


def spec_of(config: Mapping[str, Any], scheduler: Mapping[str, Any], where: str) -> DenoiserSpec:
    """Returns what a network and a scheduler are here. The last of its embeddings of classes is taken for that which says no class.

    Raises:
        DataError: naming the first setting that has no counterpart.
    """
    size = config["sample_size"]
    if size is None:
        raise DataError(f"{where}: sample_size is not set in config.json; write the height of the images into it")
    height, width = (size, size) if isinstance(size, int) else size
    channels = int(config["in_channels"])
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise DataError(f"{where}: in_channels={channels}; images have 1, 3 or 4")
    outputs = (config["out_channels"] or channels) // channels
    network, classes = _network(config, height, where)
    diffusion = _diffusion(scheduler, outputs, where)
    names = tuple(f"class {number}" for number in range(classes))
    space = PixelSpace.model_validate({"image_size": height if height == width else [height, width], "mode": modes[channels]})
    return DenoiserSpec(model=network, diffusion=diffusion, space=space, label_names=names)


def _kinds() -> dict[str, type[NetworkConfig]]:
    """Returns the settings of networks by the names that diffusers has for them."""
    return {kind.diffusers_class: kind for kind in KINDS.values() if kind.diffusers_class}


def _network(config: Mapping[str, Any], height: int, where: str) -> tuple[NetworkConfig, int]:
    """Returns the network's settings, and how many classes it is told."""
    try:
        return _kinds()[config["_class_name"]].of_diffusers(config, height)
    except ValueError as error:
        raise DataError(f"{where}: {' '.join(str(error).split())[:300]}") from error


def _diffusion(scheduler: Mapping[str, Any], outputs: int, where: str) -> DiffusionConfig:
    """Returns the process of a scheduler's settings; without a scheduler, that of DDPM's defaults."""
    name = scheduler.get("_class_name", "DDPMScheduler")
    if name.startswith("FlowMatch"):
        return DiffusionConfig(process="flow")
    prediction, steps = scheduler.get("prediction_type", "epsilon"), int(scheduler.get("num_train_timesteps", 1000))
    if prediction not in _PREDICTIONS:
        raise DataError(f"{where}: the scheduler's prediction_type={prediction} has no counterpart here; use {', '.join(_PREDICTIONS)}")
    settings = {"num_steps": steps, "betas": _betas(scheduler, steps, where), "prediction": _PREDICTIONS[prediction], "learned_variance": outputs == 2}
    return DiffusionConfig.model_validate(settings | {"zero_terminal_snr": bool(scheduler.get("rescale_betas_zero_snr"))})


def _betas(scheduler: Mapping[str, Any], steps: int, where: str) -> str:
    """Returns the schedule that a scheduler means: by name, if its ends are ours, or the one whose betas are written out."""
    import torch

    from ..diffusion.betas import FIRST, LAST
    from ..diffusion.schedule import BETAS

    if (written := scheduler.get("trained_betas")) is not None:
        theirs = torch.tensor(written, dtype=torch.float64)
        for name, make in BETAS.items():
            if len(theirs) == steps and torch.allclose(make(steps), theirs, rtol=1e-4, atol=1e-7):
                return name
        raise DataError(f"{where}: the scheduler's trained_betas are none of {', '.join(BETAS)}; other noise levels have no counterpart here")
    named, scale = scheduler.get("beta_schedule", "linear"), 1000.0 / steps
    if named not in _BETAS:
        raise DataError(f"{where}: the scheduler's beta_schedule={named} has no counterpart here; {', '.join(_BETAS)} have")
    for key, ours in (("beta_start", FIRST * scale), ("beta_end", LAST * scale)):
        if named != "squaredcos_cap_v2" and abs(scheduler.get(key, ours) / ours - 1) > 1e-6:
            raise DataError(f"{where}: the scheduler's {key}={scheduler[key]} has no counterpart here; {ours:g} has, at T = {steps}")
    return _BETAS[named]


def _json(file: Location) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); name a folder that diffusers' save_pretrained wrote") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} is no JSON object; name a folder that diffusers' save_pretrained wrote")
    return found
