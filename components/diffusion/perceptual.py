"""How unlike images look to a network that was trained to tell things apart (LPIPS), as a loss. Its weights are given, never fetched."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

from ..errors import DataError

_ENDS = (4, 9, 16, 23, 30)
"""Behind which of VGG16's layers features are compared: behind the last ReLU before each pooling, and the last."""


class Perceptual(nn.Module):
    """LPIPS (Zhang et al. 2018, Eq. 1) by VGG16: images (B, C, H, W) in -1..1, 1, 3 or 4 channels of which the fourth is not looked at, to their mean distance.

    Args:
        features: the convolutions of torchvision's VGG16.
        layers: what each channel of each of the five feature maps counts, (C,) each; None for 1, the baseline without what people said.
    """

    def __init__(self, features: nn.Sequential, layers: list[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(features[first:last] for first, last in zip((0, *_ENDS[:-1]), _ENDS, strict=True))
        for part in self.parts.modules():
            if isinstance(part, nn.ReLU):
                part.inplace = False
        for index in range(len(_ENDS)):
            self.register_buffer(f"layer_{index}", None if layers is None else layers[index].float().view(1, -1, 1, 1))
        # The authors' code states both for images in -1..1, rounded to three places.
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Returns the mean distance, a float32 scalar."""
        one, other = self._scaled(one), self._scaled(other)
        total = one.new_zeros(())
        for index, part in enumerate(self.parts):
            one, other = part(one), part(other)
            difference, layer = (_unit(one) - _unit(other)).square(), getattr(self, f"layer_{index}")
            total = total + (difference if layer is None else difference * layer).sum(dim=1).mean()
        return total

    def _scaled(self, images: torch.Tensor) -> torch.Tensor:
        colours = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
        return (colours.float() - self.mean) / self.deviation


def _unit(features: torch.Tensor) -> torch.Tensor:
    # Where no channel fires the root's own derivative would be infinite.
    return features * (features.square().sum(dim=1, keepdim=True) + 1e-20).rsqrt()


def load_perceptual(weights: Path, layers: Path | None = None) -> Perceptual:
    """Returns the distance by weights from files.

    Args:
        weights: torchvision's VGG16 (`vgg16-397923af.pth`, or the same tensors as safetensors), with or without its classifier.
        layers: LPIPS' layers (`vgg.pth` of version 0.1, or the same tensors as safetensors).

    Raises:
        DataError: if a file is not that.
    """
    from torchvision.models import vgg16

    with torch.device("meta"):
        features = vgg16(weights=None, init_weights=False).features
    assert isinstance(features, nn.Sequential)
    found, state = _tensors(weights), features.state_dict()
    taken = {name: found.get(f"features.{name}", found.get(name)) for name in state}
    if wrong := [name for name, value in taken.items() if value is None or value.shape != state[name].shape]:
        raise DataError(f"{weights} is no VGG16 of torchvision: features.{wrong[0]} is missing or has another shape; name vgg16-397923af.pth")
    features.load_state_dict({name: value.float() for name, value in taken.items() if value is not None}, assign=True)
    if layers is None:
        return Perceptual(features)
    found = _tensors(layers)
    told = [found.get(f"lin{index}.model.1.weight") for index in range(len(_ENDS))]
    widths = [value.shape[0] for name, value in state.items() if name in [f"{end - 2}.bias" for end in _ENDS]]
    if wrong := [index for index, (layer, width) in enumerate(zip(told, widths, strict=True)) if layer is None or layer.numel() != width]:
        raise DataError(f"{layers} holds no layers of LPIPS for VGG16: lin{wrong[0]}.model.1.weight is missing or has another shape; name its vgg.pth")
    return Perceptual(features, [layer for layer in told if layer is not None])


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, ImportError) as error:
        raise DataError(f"{file} cannot be read as tensors ({' '.join(str(error).split())[:200]}); name a .pth or .safetensors file") from error
    except UnpicklingError as error:
        raise DataError(f"{file} holds more than tensors, and is not read; save it as safetensors") from error
    return dict(found)
