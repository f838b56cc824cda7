"""The folder that a registered version carries for diffusers is, to diffusers, the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline

from components.diffusion.config import DiffusionConfig, Prediction
from components.diffusion.noise import initial_noise
from components.diffusion.recipe import Recipe
from components.diffusion.sampling import sample
from components.diffusion.schedule import Schedule
from components.model.diffusers_export import write_diffusers
from components.model.spec import DenoiserSpec
from components.networks.unet.config import UNetConfig
from components.spaces.pixels import PixelSpace

CONFIGS = {
    "attention in the middle": (UNetConfig(base_channels=16, channel_mults=(1, 2, 2), attention_resolutions=(8,), num_groups=8), 16, 3),
    "grey, one level": (UNetConfig(base_channels=16, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4), 8, 1),
    "two heads at the lowest level": (UNetConfig(base_channels=16, channel_mults=(1, 2), attention_resolutions=(4,), num_heads=2, num_groups=8), 8, 3),
}


def exported(folder: Path, spec: DenoiserSpec) -> Any:
    """Returns a network with random weights, and writes it for diffusers."""
    network, generator = spec.build().eval(), torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    write_diffusers(folder, spec, network.state_dict())
    return network


def pipeline(folder: Path, kind: Any = DDPMPipeline) -> Any:
    return kind.from_pretrained(folder, low_cpu_mem_usage=False, local_files_only=True)


def steps_of_diffusers(folder: Path, x_t: torch.Tensor) -> torch.Tensor:
    """Returns x_0 by all steps of diffusers' DDIM."""
    parts = pipeline(folder)
    scheduler: Any = DDIMScheduler.from_config(parts.scheduler.config)
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x_t = scheduler.step(parts.unet(x_t, t).sample, t, x_t, use_clipped_model_output=True).prev_sample
    return x_t


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loaded_network_computes_the_same(name: str, tmp_path: Path):
    config, size, channels = CONFIGS[name]
    ours = exported(
        tmp_path / "out", DenoiserSpec(model=config, diffusion=DiffusionConfig(), space=PixelSpace(image_size=size, mode="L" if channels == 1 else "RGB"))
    )  # pyrefly: ignore
    x, t = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 17, 999])
    with torch.inference_mode():
        torch.testing.assert_close(pipeline(tmp_path / "out").unet(x, t).sample, ours(x, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_all_steps_of_diffusers_lead_to_the_same_images(prediction: Prediction, betas: Any, tmp_path: Path):
    config, size, channels = CONFIGS["grey, one level"]
    spec = DenoiserSpec(
        model=config,
        diffusion=DiffusionConfig(num_steps=25, betas=betas, prediction=prediction),
        space=PixelSpace(image_size=size, mode="L" if channels == 1 else "RGB"),
    )  # pyrefly: ignore
    ours, seeds = exported(tmp_path / "out", spec), range(3)
    x_0 = sample(ours, Schedule(spec.diffusion), seeds, spec.shape, Recipe(steps=25))
    torch.testing.assert_close(steps_of_diffusers(tmp_path / "out", initial_noise(seeds, spec.shape)), x_0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [10, 1000])
@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_the_noise_levels_are_the_same(betas: Any, num_steps: int, tmp_path: Path):
    spec = DenoiserSpec(
        model=CONFIGS["grey, one level"][0], diffusion=DiffusionConfig(num_steps=num_steps, betas=betas), space=PixelSpace(image_size=8, mode="L")
    )
    exported(tmp_path / "out", spec)
    levels = pipeline(tmp_path / "out").scheduler.alphas_cumprod
    torch.testing.assert_close(levels.double(), Schedule(spec.diffusion).alpha_bar, rtol=1e-4, atol=1e-7)


def test_diffusers_pipelines_draw_from_it(tmp_path: Path):
    spec = DenoiserSpec(model=CONFIGS["grey, one level"][0], diffusion=DiffusionConfig(num_steps=20), space=PixelSpace(image_size=8, mode="L"))
    exported(tmp_path / "out", spec)
    for kind in (DDPMPipeline, DDIMPipeline):
        drawn = pipeline(tmp_path / "out", kind)(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np").images
        assert drawn.shape == (2, 8, 8, 1)
        assert drawn.std() > 0


def test_a_network_that_is_told_classes_keeps_them_and_the_readme_names_them(tmp_path: Path):
    config = CONFIGS["grey, one level"][0].model_copy(update={"conditional": True})
    ours = exported(
        tmp_path / "out", DenoiserSpec(model=config, diffusion=DiffusionConfig(), space=PixelSpace(image_size=8, mode="L"), label_names=("cat", "dog"))
    )
    x, t, labels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 17, 999]), torch.tensor([0, 1, 2])
    with torch.inference_mode():
        torch.testing.assert_close(pipeline(tmp_path / "out").unet(x, t, class_labels=labels).sample, ours(x, t, labels), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pipeline(tmp_path / "out").unet(x, t, class_labels=labels[[2, 2, 2]]).sample, ours(x, t), rtol=1e-5, atol=1e-5)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "class_labels=labels" in readme
    assert "| 1 | dog |\n| 2 | none told" in readme


def test_a_network_that_diffusers_cannot_have_is_left_out_with_the_reason(tmp_path: Path):
    config = UNetConfig(base_channels=16, channel_mults=(1, 2), attention_resolutions=(8,), num_heads=2, num_groups=8)
    exported(tmp_path / "out", DenoiserSpec(model=config, diffusion=DiffusionConfig(), space=PixelSpace(image_size=8, mode="RGB")))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["README.md"]
    assert "cannot have num_heads=2 at levels of different width (channel_mults=[1, 2])" in (tmp_path / "out" / "README.md").read_text()


def test_the_weights_are_as_readable_as_the_files_beside_them(tmp_path: Path):
    exported(tmp_path / "out", DenoiserSpec(model=CONFIGS["grey, one level"][0], diffusion=DiffusionConfig(), space=PixelSpace(image_size=8, mode="L")))
    modes = {file.stat().st_mode for file in (tmp_path / "out" / "unet").iterdir()}
    assert len(modes) == 1
