"""A denoiser as a folder that diffusers loads, the format the field exchanges; written without diffusers.

model_index.json                 a DDPMPipeline; of a denoiser of latents a DiTPipeline or an LDMPipeline
unet/ or transformer/            config.json, diffusion_pytorch_model.safetensors
vae/ or vqvae/                   what decodes latents
scheduler/scheduler_config.json  the noise levels, and what the network predicts
README.md                        how to load it; or alone, and why nothing else is here
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..autoencoder.store import CONFIG, WEIGHTS
from ..diffusion.schedule import Schedule
from ..networks.config import DiffusersNetwork
from ..spaces.latents import LatentSpace
from ..spaces.space import ScaledLimit
from .checkpoint import write_weights
from .spec import DenoiserSpec

_PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


@dataclass(frozen=True)
class _Pipeline:
    """What diffusers draws with.

    Attributes:
        class_name: of the pipeline.
        network: what it calls the denoiser.
        decoder: what it calls the autoencoder; empty where there is none.
    """

    class_name: str
    network: str
    decoder: str = ""


def _pipeline(spec: DenoiserSpec, class_name: str) -> _Pipeline:
    if not isinstance(spec.space, LatentSpace):
        return _Pipeline("DDPMPipeline", "unet")
    return _Pipeline("DiTPipeline", "transformer", "vae") if class_name.startswith("DiT") else _Pipeline("LDMPipeline", "unet", "vqvae")


def write_diffusers(folder: Path, spec: DenoiserSpec, weights: Mapping[str, torch.Tensor], autoencoder: Mapping[str, Path] | None = None) -> None:
    """Writes a diffusers pipeline, or a README alone where diffusers has no such network.

    Args:
        autoencoder: files of what decodes latents, by diffusers' names.
    """
    folder.mkdir(parents=True)
    network = spec.build()
    network.load_state_dict(weights)
    theirs = _why_none(spec) or spec.model.to_diffusers(network, spec.shape)
    if isinstance(theirs, str):
        (folder / "README.md").write_text(
            f"No pipeline of diffusers is here, for {theirs}. The checkpoint beside this folder holds the model.\n", encoding="utf-8"
        )
        return
    if spec.diffusion.process == "reconstruction":
        write_network(folder, theirs)
        (folder / "README.md").write_text(_README_OF_AUTOENCODER, encoding="utf-8")
        return
    pipeline = _pipeline(spec, theirs.class_name)
    (folder / "scheduler").mkdir()
    scheduler = "FlowMatchEulerDiscreteScheduler" if spec.diffusion.process == "flow" else "DDPMScheduler"
    parts: dict[str, object] = {"scheduler": ["diffusers", scheduler], pipeline.network: ["diffusers", theirs.class_name]}
    if isinstance(spec.space, LatentSpace) and autoencoder:
        parts[pipeline.decoder] = ["diffusers", "AutoencoderKL"]
        _write_autoencoder(folder / pipeline.decoder, spec.space, autoencoder)
    if pipeline.class_name == "DiTPipeline":
        parts["id2label"] = {str(number): name for number, name in enumerate(spec.label_names)}
    _write_json(folder / "model_index.json", {"_class_name": pipeline.class_name, **parts})
    write_network(folder / pipeline.network, theirs)
    _write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": scheduler, **scheduler_config(spec)})
    (folder / "README.md").write_text(_readme(spec, pipeline), encoding="utf-8")


def write_network(folder: Path, network: DiffusersNetwork) -> None:
    """Writes a network as diffusers' save_pretrained does."""
    folder.mkdir(exist_ok=True)
    _write_json(folder / CONFIG, {"_class_name": network.class_name, **network.config})
    write_weights(folder / WEIGHTS, network.weights, {"format": "pt"})


_README_OF_AUTOENCODER = """```python
from diffusers import AutoencoderKL

autoencoder = AutoencoderKL.from_pretrained(folder)
```
"""


def _write_autoencoder(folder: Path, space: LatentSpace, files: Mapping[str, Path]) -> None:
    """Writes the autoencoder with the scale of these latents, which pipelines divide by before it decodes."""
    folder.mkdir()
    for name, file in files.items():
        shutil.copyfile(file, folder / name)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    _write_json(folder / CONFIG, config | {"scaling_factor": space.scale, "shift_factor": None})


def _why_none(spec: DenoiserSpec) -> str:
    """Returns why diffusers cannot draw from the denoiser whatever its network is; nothing where it can."""
    if isinstance(spec.space.limit, ScaledLimit):
        return "its images are scaled by statistics of every channel (data.normalisation=per_channel), and pipelines take -1..1"
    if spec.diffusion.process == "edm":
        return "DDPMPipeline does not precondition a network as EDM does (diffusion.process=edm)"
    if spec.diffusion.process == "ddpm" and spec.diffusion.prediction not in _PREDICTIONS:
        return f"diffusers' schedulers know no prediction {spec.diffusion.prediction}"
    return ""


def scheduler_config(spec: DenoiserSpec) -> dict[str, object]:
    """Returns the keyword arguments of the diffusers scheduler that goes through the denoiser's noise levels."""
    if spec.diffusion.process == "flow":
        return {"num_train_timesteps": 1000, "shift": 1.0}
    schedule = Schedule(spec.diffusion)
    return {
        "num_train_timesteps": schedule.num_steps,
        # The numbers themselves, because diffusers' own linear betas know nothing of T.
        "trained_betas": schedule.betas.tolist(),
        "prediction_type": _PREDICTIONS[schedule.prediction],
        "variance_type": "learned_range" if spec.diffusion.learned_variance else "fixed_small",
        "clip_sample": spec.space.limit is not None,
        "clip_sample_range": 1.0,
        "timestep_spacing": "linspace",
    }


def _readme(spec: DenoiserSpec, pipeline: _Pipeline) -> str:
    if isinstance(spec.space, LatentSpace):
        return _readme_of_latents(spec, pipeline)
    if not spec.label_names:
        use = "images = DDPMPipeline.from_pretrained(folder)(batch_size=4).images"
        return f"```python\nfrom diffusers import DDPMPipeline\n\n{use}\n```\n\n`DDIMPipeline.from_pretrained(folder)` takes fewer steps.\n"
    names = "\n".join(f"| {number} | {name} |" for number, name in enumerate(spec.label_names))
    return f"""This network is told a class, which `DDPMPipeline` does not pass on: take its parts.

```python
from diffusers import DDPMPipeline

parts = DDPMPipeline.from_pretrained(folder)
output = parts.unet(x_t, t, class_labels=labels).sample
```

| label | class |
|---|---|
{names}
| {spec.null_label} | none told, for classifier-free guidance |
"""


def _readme_of_latents(spec: DenoiserSpec, pipeline: _Pipeline) -> str:
    name = pipeline.class_name
    labels = "class_labels=[0, 0, 1, 1], guidance_scale=1.0, " if name == "DiTPipeline" else "batch_size=4, "
    use = f"```python\nfrom diffusers import {name}\n\nimages = {name}.from_pretrained(folder)({labels}num_inference_steps=50).images\n```\n"
    rows = "".join(f"| {number} | {label} |\n" for number, label in enumerate(spec.label_names))
    table = f"\n| label | class |\n|---|---|\n{rows}| {spec.null_label} | none told, for classifier-free guidance |\n" if rows else ""
    if spec.diffusion.process == "flow":
        use = f"`{name}.from_pretrained(folder)` has the parts; its call knows no FlowMatchEulerDiscreteScheduler, so step through them yourself.\n"
    elif spec.label_names and name == "LDMPipeline":
        use = f"`{name}.from_pretrained(folder)` has the parts; its call tells the network no class, so step through them yourself.\n"
    return use + table


def _write_json(path: Path, record: Mapping[str, object]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
