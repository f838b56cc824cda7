"""The perceptual loss, against the `lpips` package of its authors by the same weights; these are random, for none can be fetched."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import vgg16

from components.diffusion.config import DiffusionConfig
from components.diffusion.objective import training_loss
from components.diffusion.perceptual import load_perceptual
from components.diffusion.process import make_process
from components.diffusion.reconstruction import Reconstruction
from components.errors import DataError
from components.networks.autoencoder_kl.config import AutoencoderKLConfig


@pytest.fixture(scope="module")
def theirs() -> Any:
    import lpips

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, that `pretrained` has another name
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)


@pytest.fixture(scope="module")
def files(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """VGG16 as torchvision's file has it, and the layers as LPIPS' file has them."""
    folder = tmp_path_factory.mktemp("perceptual")
    convolutions = [layer for number in range(1, 6) for layer in getattr(theirs.net, f"slice{number}") if isinstance(layer, torch.nn.Conv2d)]
    with torch.device("meta"):
        names = [name for name in vgg16(weights=None, init_weights=False).state_dict() if name.startswith("features.")]
    values = [value for layer in convolutions for value in layer.state_dict().values()]
    torch.save({**dict(zip(names, values, strict=True)), "classifier.0.bias": torch.zeros(3)}, folder / "vgg16.pth")
    torch.save({name: value for name, value in theirs.state_dict().items() if name.startswith("lin") and name[3] != "s"}, folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth"


def images(channels: int = 3, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    one = torch.rand(2, channels, side, side, generator=draw) * 2 - 1
    return one, (one + 0.3 * torch.randn(one.shape, generator=draw)).clamp(-1, 1)


@pytest.mark.parametrize("with_layers", [True, False])
def test_the_distance_and_its_gradient_are_those_of_its_authors(with_layers: bool, theirs: Any, files: tuple[Path, Path]):
    ours = load_perceptual(files[0], files[1] if with_layers else None)
    theirs.lpips = with_layers
    found, expected = [], []
    for distance, into in ((ours, found), (theirs, expected)):
        one, other = images()
        value = distance(one.requires_grad_(True), other).mean()
        value.backward()
        into += [value.detach(), one.grad]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_grey_is_looked_at_as_colour_and_an_image_is_not_unlike_itself_even_where_nothing_fires(files: tuple[Path, Path]):
    distance = load_perceptual(*files)
    grey, other = images(channels=1)
    torch.testing.assert_close(distance(grey, other), distance(grey.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1)))
    dead = load_perceptual(*files)
    for part in dead.parts.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.load_state_dict({"weight": torch.zeros_like(part.weight), "bias": torch.full((part.out_channels,), -1.0)})
    one = grey.clone().requires_grad_(True)
    dead(one, other).backward()
    assert one.grad is not None
    assert torch.isfinite(one.grad).all()


def test_the_loss_of_an_autoencoder_has_it_beside_the_rest(files: tuple[Path, Path]):
    network = AutoencoderKLConfig(base_channels=8, num_groups=4).build((3, 32, 32))
    process = make_process(DiffusionConfig(process="reconstruction"))
    assert isinstance(process, Reconstruction)
    x, eps, t = images()[0], torch.randn(2, 3, 32, 32), torch.zeros(2)
    without = training_loss(process)(network, process, x, eps, t)
    process.perceptual, process.perceptual_scale = load_perceptual(*files), 0.5
    reconstructed, _, _ = network(x, eps)
    torch.testing.assert_close(training_loss(process)(network, process, x, eps, t), without + 0.5 * process.perceptual(reconstructed, x))


def test_what_is_no_vgg_or_no_layers_is_named(files: tuple[Path, Path], tmp_path: Path):
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.safetensors")
    with pytest.raises(DataError, match=r"is no VGG16 of torchvision: features\.0\.bias is missing or has another shape"):
        load_perceptual(tmp_path / "part.safetensors")
    with pytest.raises(DataError, match=r"lin0\.model\.1\.weight is missing or has another shape"):
        load_perceptual(files[0], tmp_path / "part.safetensors")
    torch.save({"a": Path()}, tmp_path / "code.pth")
    with pytest.raises(DataError, match="holds more than tensors, and is not read"):
        load_perceptual(tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(DataError, match=r"cannot be read as tensors|holds more than tensors"):
        load_perceptual(tmp_path / "text.pth")


@pytest.mark.slow
def test_by_the_command_it_is_part_of_what_a_training_is(files: tuple[Path, Path], command: Callable[..., Any], tmp_path: Path):
    layers = f"train.perceptual_layers={files[1]}"
    small = ["data.image_size=16", "model.base_channels=8", "model.num_groups=4", "train.steps=3", "train.warmup_steps=1", "train.global_batch_size=16"]
    plain = command("train", "digits-autoencoder", *small, "--json", cwd=tmp_path)
    with_it = command("train", "digits-autoencoder", *small, f"train.perceptual_weights={files[0]}", layers, "--json", cwd=tmp_path)
    assert (plain.code, with_it.code) == (0, 0), plain.stderr + with_it.stderr
    assert plain.json["train"]["weights_sha256"] != with_it.json["train"]["weights_sha256"]
    copy = tmp_path / "elsewhere.pth"
    copy.write_bytes(files[0].read_bytes())
    again = command("train", "digits-autoencoder", *small, f"train.perceptual_weights={copy}", layers, "--json", cwd=tmp_path)
    assert again.json["train"]["skipped"]
    wrong = command("train", "digits-autoencoder", *small, f"train.perceptual_weights={files[1]}", cwd=tmp_path)
    assert wrong.code == 2
    assert "is no VGG16 of torchvision" in wrong.stderr
