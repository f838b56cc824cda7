"""A denoiser as a folder that diffusers loads, the format the field exchanges; written without diffusers.

model_index.json                 a DDPMPipeline
unet/                            config.json, diffusion_pytorch_model.safetensors
scheduler/scheduler_config.json  the noise levels, and what the network predicts
README.md                        how to load it; or alone, and why nothing else is here
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..diffusion.schedule import Schedule
from ..spaces.space import ScaledLimit
from .checkpoint import write_weights
from .spec import DenoiserSpec

_PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


def write_diffusers(folder: Path, spec: DenoiserSpec, weights: Mapping[str, torch.Tensor]) -> None:
    """Writes a diffusers pipeline, or a README alone where diffusers has no such network."""
    folder.mkdir(parents=True)
    network = spec.build()
    network.load_state_dict(weights)
    theirs = _why_none(spec) or spec.model.to_diffusers(network, spec.shape)
    if isinstance(theirs, str):
        (folder / "README.md").write_text(
            f"No pipeline of diffusers is here, for {theirs}. The checkpoint beside this folder holds the model.\n", encoding="utf-8"
        )
        return
    (folder / "unet").mkdir()
    (folder / "scheduler").mkdir()
    scheduler = "FlowMatchEulerDiscreteScheduler" if spec.diffusion.process == "flow" else "DDPMScheduler"
    parts = {"scheduler": ["diffusers", scheduler], "unet": ["diffusers", theirs.class_name]}
    _write_json(folder / "model_index.json", {"_class_name": "DDPMPipeline", **parts})
    _write_json(folder / "unet" / "config.json", {"_class_name": theirs.class_name, **theirs.config})
    _write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": scheduler, **scheduler_config(spec)})
    write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", theirs.weights, {"format": "pt"})
    (folder / "README.md").write_text(_readme(spec), encoding="utf-8")


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
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "timestep_spacing": "linspace",
    }


def _readme(spec: DenoiserSpec) -> str:
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


def _write_json(path: Path, record: Mapping[str, object]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
