"""Latents against diffusers' own calls: encoding, decoding, and the pictures of the pipelines that a registered version carries."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, LDMPipeline

from components.autoencoder.codec import Codec, load_codec
from components.autoencoder.store import CONFIG, PACKED, WEIGHTS, AutoencoderFiles, find_autoencoder, keep_autoencoder, read_autoencoder
from components.diffusion.config import DiffusionConfig
from components.diffusion.noise import initial_noise
from components.diffusion.recipe import Recipe
from components.diffusion.sampling import sample
from components.diffusion.schedule import Schedule
from components.errors import DataError
from components.model.checkpoint import load_denoiser, write_checkpoint
from components.model.diffusers_export import write_diffusers
from components.model.spec import DenoiserSpec
from components.networks.autoencoder_kl.config import AutoencoderKLConfig
from components.networks.config import NetworkConfig
from components.networks.dit.config import DiTConfig
from components.networks.unet.config import UNetConfig
from components.spaces.latents import LatentSpace
from components.spaces.pixels import PixelSpace
from components.storage import Location

LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
IMAGES = np.random.default_rng(0).integers(0, 256, (11, 3, 16, 16), dtype=np.uint8)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Location]:
    torch.manual_seed(0)
    network: Any = AutoencoderKL(**LEVELS)
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    network.save_pretrained(folder)
    return network.eval(), Location.of(folder)


@pytest.fixture(scope="module")
def codec(theirs: tuple[Any, Location]) -> Codec:
    return load_codec(read_autoencoder(theirs[1]))


def test_posteriors_are_those_of_diffusers(theirs: tuple[Any, Location], codec: Codec):
    with torch.inference_mode():
        posterior = theirs[0].encode(torch.from_numpy(IMAGES).float() / 127.5 - 1).latent_dist
    found = torch.from_numpy(codec.encode(IMAGES))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), torch.cat([posterior.mean, posterior.std], dim=1), rtol=1e-3, atol=1e-3)


def test_pictures_of_latents_are_those_of_diffusers(theirs: tuple[Any, Location], codec: Codec):
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(codec.decode(latents), theirs[0].decode(latents).sample, rtol=1e-4, atol=1e-5)


def test_what_an_image_becomes_depends_on_it_alone(codec: Codec):
    alone = np.concatenate([codec.encode(IMAGES[number : number + 1]) for number in range(len(IMAGES))])
    assert (codec.encode(IMAGES) == alone).all()
    latents = torch.from_numpy(alone[:, :4]).float()
    assert torch.equal(codec.decode(latents), torch.cat([codec.decode(latents[number : number + 1]) for number in range(len(latents))]))


def test_a_whole_pipeline_gives_its_autoencoder_and_half_precision_is_read(theirs: tuple[Any, Location], tmp_path: Path):
    half: Any = AutoencoderKL(**LEVELS)
    half.load_state_dict(theirs[0].state_dict())
    half.half().save_pretrained(tmp_path / "pipeline" / "vae")
    files = read_autoencoder(Location.of(tmp_path / "pipeline"))
    assert (files.channels, files.latent_channels, files.factor, files.latent_shape((3, 16, 24))) == (3, 4, 2, (4, 8, 12))
    assert next(load_codec(files).network.parameters()).dtype == torch.float32


def test_what_is_no_autoencoder_is_named(theirs: tuple[Any, Location], tmp_path: Path):
    files = read_autoencoder(theirs[1])
    with pytest.raises(DataError, match=r"takes images of 3 channels, and these have 1; use data\.mode=RGB"):
        files.latent_shape((1, 16, 16))
    with pytest.raises(DataError, match="makes 2 pixels one, which does not divide height 16 and width 15"):
        files.latent_shape((3, 16, 15))
    with pytest.raises(DataError, match=r"is no folder of a diffusers AutoencoderKL: config\.json cannot be read"):
        read_autoencoder(Location.of(tmp_path))
    theirs[0].save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(DataError, match="only pickled ones, which are not read; save it with safe_serialization=True"):
        read_autoencoder(Location.of(tmp_path / "pickled"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / CONFIG).write_text('{"_class_name": "VQModel"}')
    with pytest.raises(DataError, match="holds a VQModel; name a folder of a diffusers AutoencoderKL"):
        read_autoencoder(Location.of(tmp_path / "other"))


def test_an_autoencoder_is_found_above_and_inside_and_nowhere_else(theirs: tuple[Any, Location], tmp_path: Path):
    files, storage = read_autoencoder(theirs[1]), Location.of(tmp_path)
    with pytest.raises(DataError, match=f"autoencoder {files.digest} of .* is neither there nor in autoencoders of a folder above"):
        find_autoencoder(files.digest, storage / "runs" / "a")
    kept = keep_autoencoder(files, storage)
    assert find_autoencoder(files.digest, storage / "runs" / "a" / "train").folder == kept
    inside = tmp_path / "elsewhere"
    inside.mkdir()
    for packed, name in PACKED.items():
        (inside / packed).write_bytes((kept / name).read_bytes())
    assert find_autoencoder(files.digest, Location.of(inside)).config_name == "autoencoder.json"
    (kept / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(DataError, match=f"not {files.digest}; restore it"):
        find_autoencoder(files.digest, storage / "runs")


def denoiser(model: NetworkConfig, files: AutoencoderFiles, folder: Path, labels: tuple[str, ...]) -> tuple[Any, Any]:
    """Returns a denoiser of latents with random weights by our loading, and the pipeline of diffusers that is exported with it."""
    space = LatentSpace(pixels=PixelSpace(image_size=16), autoencoder=files.digest, latent=(4, 8, 8), scale=0.7)
    spec = DenoiserSpec(model=model, diffusion=DiffusionConfig(num_steps=20, betas="cosine", prediction="v"), space=space, label_names=labels)
    network, generator = spec.build(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    names = (CONFIG, WEIGHTS)
    packed = {packed: files.folder.path / name for packed, name in zip(PACKED, names, strict=True)}
    write_checkpoint(Location.of(folder / "ours"), spec, network.state_dict(), more_files=packed)
    write_diffusers(folder / "theirs", spec, network.state_dict(), {name: files.folder.path / name for name in names})
    kind: Any = DiTPipeline if model.kind == "dit" else LDMPipeline
    pipeline = kind.from_pretrained(folder / "theirs", local_files_only=True, low_cpu_mem_usage=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return load_denoiser(Location.of(folder / "ours")), pipeline


def test_the_pipeline_of_a_transformer_draws_our_pictures(theirs: tuple[Any, Location], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from diffusers.pipelines.dit import pipeline_dit

    model = DiTConfig(depth=2, hidden_size=16, num_heads=2, conditional=True)
    ours, pipeline = denoiser(model, read_autoencoder(theirs[1]), tmp_path, ("cat", "dog"))
    noise = initial_noise(range(3), (4, 8, 8))
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *_, **__: noise)
    labels = torch.tensor([0, 1, 1])
    pictures = pipeline(class_labels=labels.tolist(), guidance_scale=1.0, num_inference_steps=20, output_type="np").images
    check(ours, pictures, labels)
    assert pipeline.labels == {"cat": 0, "dog": 1}


def test_the_pipeline_of_a_unet_draws_our_pictures(theirs: tuple[Any, Location], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = UNetConfig(base_channels=16, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(), num_groups=8)
    ours, pipeline = denoiser(model, read_autoencoder(theirs[1]), tmp_path, ())
    noise = initial_noise(range(3), (4, 8, 8))
    monkeypatch.setattr(sys.modules[LDMPipeline.__module__], "randn_tensor", lambda *_, **__: noise)
    check(ours, pipeline(batch_size=3, eta=0.0, num_inference_steps=20, output_type="np").images, None)


def check(ours: Any, pictures: np.ndarray, labels: torch.Tensor | None) -> None:
    space = ours.spec.space
    x_0 = sample(
        ours.network, Schedule(ours.spec.diffusion), range(3), space.shape, Recipe(steps=20), labels=labels, null_label=ours.spec.null_label, limit=None
    )
    decoded = space._codec.decode(x_0 / space.scale)
    expected = ((decoded + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pictures, expected, rtol=0, atol=1e-3)
    assert np.abs(space.to_rows(x_0).numpy().transpose(0, 2, 3, 1) / 255 - pictures).max() < 0.5 / 255 + 1e-3


def test_an_autoencoder_trained_here_is_one_of_diffusers(tmp_path: Path):
    spec = DenoiserSpec(
        model=AutoencoderKLConfig(base_channels=8, num_groups=4), diffusion=DiffusionConfig(process="reconstruction"), space=PixelSpace(image_size=16)
    )
    network: Any = spec.build().eval()
    write_diffusers(tmp_path / "out", spec, network.state_dict())
    loaded: Any = AutoencoderKL.from_pretrained(tmp_path / "out", local_files_only=True, low_cpu_mem_usage=False)
    x = torch.from_numpy(IMAGES).float() / 127.5 - 1
    with torch.inference_mode():
        torch.testing.assert_close(network(x, torch.zeros(len(x))), loaded(x).sample, rtol=1e-5, atol=1e-5)
