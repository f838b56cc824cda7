"""Models that diffusers wrote, as ours: the same numbers, and one clear line where they have no counterpart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from components.diffusion.config import DiffusionConfig
from components.diffusion.recipe import Recipe
from components.diffusion.sampling import sample
from components.errors import DataError
from components.model.checkpoint import load_denoiser, read_weights, write_checkpoint
from components.model.diffusers_export import write_diffusers
from components.model.diffusers_import import import_diffusers
from components.model.spec import DenoiserSpec
from components.networks.unet.config import UNetConfig
from components.spaces.pixels import PixelSpace
from components.storage import Location

BLOCKS: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}


ADM: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
}


def unet(**changes: Any) -> Any:
    torch.manual_seed(0)
    network: Any = UNet2DModel(**{"sample_size": 8, "in_channels": 3, "out_channels": 3, **BLOCKS, **changes})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},  # diffusers' defaults, of which hardly one is DDPM's
        {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6, "attention_head_dim": None},
        {"sample_size": (16, 8), "attention_head_dim": 16, "dropout": 0.2},
        {"in_channels": 1, "out_channels": 1, "num_class_embeds": 4},
        {"out_channels": 6},
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
        {**ADM, "attention_head_dim": 16},
        {**ADM, "down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2, "attention_head_dim": 32, "num_class_embeds": 4},
    ],
)
def test_a_network_of_diffusers_computes_the_same_here(changes: dict[str, Any], tmp_path: Path):
    theirs = unet(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_denoiser(import_diffusers(Location.of(tmp_path / "theirs"), Location.of(tmp_path / "made")))
    x, t = torch.randn(3, *ours.spec.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 17, 999])
    labels = torch.tensor([0, 2, 3]) if ours.spec.label_names else None
    with torch.inference_mode():
        found = ours.network(x, t) if labels is None else ours.network(x, t, labels)
        torch.testing.assert_close(found, theirs(x, t, class_labels=labels).sample, rtol=1e-4, atol=1e-4)
    assert ours.spec.diffusion.learned_variance == (theirs.config.out_channels == 2 * theirs.config.in_channels)
    again = import_diffusers(Location.of(tmp_path / "theirs"), Location.of(tmp_path / "made"))
    assert [folder.name for folder in (tmp_path / "made").iterdir()] == [again.name]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (DDPMScheduler(), DiffusionConfig()),
        (DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"), DiffusionConfig(betas="cosine", prediction="v")),
        (DDPMScheduler(500, beta_start=2e-4, beta_end=0.04, prediction_type="sample"), DiffusionConfig(num_steps=500, prediction="x_0")),
        (FlowMatchEulerDiscreteScheduler(), DiffusionConfig(process="flow")),
    ],
)
def test_the_process_of_a_pipeline_is_that_of_its_scheduler(scheduler: Any, expected: DiffusionConfig, tmp_path: Path):
    pipeline: Any = DDPMPipeline(unet(), scheduler)
    pipeline.save_pretrained(tmp_path / "theirs")
    assert load_denoiser(import_diffusers(Location.of(tmp_path / "theirs"), Location.of(tmp_path / "made"))).spec.diffusion == expected


@pytest.mark.parametrize(
    "diffusion", [DiffusionConfig(betas="cosine", prediction="v"), DiffusionConfig(learned_variance=True), DiffusionConfig(process="flow")]
)
@pytest.mark.parametrize("adm", [{}, {"scale_shift_norm": True, "resample_blocks": True}])
def test_what_is_written_for_diffusers_comes_back_as_it_was(diffusion: DiffusionConfig, adm: dict[str, Any], tmp_path: Path):
    blocks: dict[str, Any] = {"base_channels": 16, "channel_mults": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,), "num_groups": 4}
    model = UNetConfig(**blocks, head_channels=8, **adm)
    spec = DenoiserSpec(model=model, diffusion=diffusion, space=PixelSpace(image_size=8))
    weights = {name: torch.randn_like(value) * 0.1 for name, value in spec.build().state_dict().items()}
    write_diffusers(tmp_path / "theirs", spec, weights)
    made = import_diffusers(Location.of(tmp_path / "theirs"), Location.of(tmp_path / "made"))
    found = load_denoiser(made)
    assert (found.spec.diffusion, found.spec.model) == (diffusion, model)
    assert all(torch.equal(value, weights[name]) for name, value in read_weights(Path(str(made)) / "ema.safetensors").items())


def test_a_flow_that_is_written_for_diffusers_is_sampled_by_it_as_here(tmp_path: Path):
    model = UNetConfig(base_channels=16, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4)
    spec = DenoiserSpec(model=model, diffusion=DiffusionConfig(process="flow"), space=PixelSpace(image_size=8))
    weights = {name: torch.randn_like(value) * 0.1 for name, value in spec.build().state_dict().items()}
    write_diffusers(tmp_path / "theirs", spec, weights)
    write_checkpoint(Location.of(tmp_path / "ours"), spec, weights)
    ours = load_denoiser(Location.of(tmp_path / "ours"))
    pipeline: Any = DDPMPipeline.from_pretrained(tmp_path / "theirs", low_cpu_mem_usage=False)
    seen: list[torch.Tensor] = []
    levels = [1 - place / 10 for place in range(10)]
    drawn = sample(ours.network, ours.process, [3], spec.shape, Recipe(steps=10, threshold="none"), on_step=lambda level, x_t, x_0: seen.append(x_t))
    theirs: Any = pipeline.scheduler
    theirs.set_timesteps(sigmas=levels)
    x = seen[0].clone()
    with torch.inference_mode():
        for t in theirs.timesteps:
            x = theirs.step(pipeline.unet(x, t[None]).sample, t, x).prev_sample
    torch.testing.assert_close(drawn, x, rtol=1e-3, atol=1e-3)


def saved(folder: Path, **changes: Any) -> Location:
    unet().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return Location.of(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn=gelu has no counterpart here; only act_fn=silu has"),
        ({"_class_name": "UNet2DConditionModel"}, "is of a UNet2DConditionModel; name a folder of a DiTTransformer2DModel or UNet2DModel"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None with resnet_time_scale_shift=scale_shift has no counterpart here"),
        ({"downsample_type": "resnet"}, "downsample_type=resnet with upsample_type=conv has no counterpart here"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "block type SkipDownBlock2D has no counterpart here"),
        ({"block_out_channels": [32, 48]}, r"block_out_channels=\[32, 48\] are no multiples of the first"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos=False with freq_shift=0 has no counterpart here"),
        ({"layers_per_block": 2}, "lacks down_blocks"),
        ({"sample_size": None}, "sample_size is not set"),
    ],
)
def test_what_has_no_counterpart_is_named(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        import_diffusers(saved(tmp_path / "theirs", **changes), Location.of(tmp_path / "made"))


def test_a_config_that_lacks_a_setting_is_named(tmp_path: Path):
    folder = saved(tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    del config["in_channels"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="lacks in_channels; name a folder"):
        import_diffusers(folder, Location.of(tmp_path / "made"))


def test_pickled_weights_are_not_read(tmp_path: Path):
    folder = saved(tmp_path / "theirs")
    (tmp_path / "theirs" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "theirs" / "diffusion_pytorch_model.bin")
    with pytest.raises(DataError, match="which is pickled and not read"):
        import_diffusers(folder, Location.of(tmp_path / "made"))
