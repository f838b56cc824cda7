"""Our U-Net computes what diffusers' UNet2DModel computes, with the same weights."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from components.networks.unet.config import UNetConfig
from components.networks.unet.diffusers import diffusers_config, from_diffusers, to_diffusers
from components.networks.unet.network import UNet

LABELS = torch.tensor([0, 4, 5])
CONFIGS = {
    "attention in the middle": (UNetConfig(base_channels=16, channel_mults=(1, 2, 2), attention_resolutions=(8,), num_groups=8), 16, 3),
    "grey, one level": (UNetConfig(base_channels=16, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4), 8, 1),
    "several heads": (UNetConfig(base_channels=16, channel_mults=(1, 2), attention_resolutions=(4,), num_heads=1, num_groups=8), 8, 3),
}


def randomised(unet: UNet) -> UNet:
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return unet.eval()


@pytest.mark.parametrize("labels", [None, LABELS], ids=["no classes", "five classes"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_those_of_diffusers(name: str, labels: torch.Tensor | None):
    config, size, channels = CONFIGS[name]
    ours = randomised(UNet(config, shape=(channels, size, size), num_classes=0 if labels is None else 5))
    theirs: Any = UNet2DModel(**diffusers_config(ours, (channels, size, size)))
    theirs.eval()
    theirs.load_state_dict(to_diffusers(ours))
    x, t = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 17, 999])
    with torch.inference_mode():
        torch.testing.assert_close(ours(x, t, labels), theirs(x, t, class_labels=labels).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_classes", [0, 5])
def test_weights_survive_the_way_to_diffusers_and_back(num_classes: int):
    config, size, channels = CONFIGS["attention in the middle"]
    ours = randomised(UNet(config, shape=(channels, size, size), num_classes=num_classes))
    back = from_diffusers(ours, to_diffusers(ours))
    assert all(torch.equal(back[name], value) for name, value in ours.state_dict().items())
    assert set(back) == set(ours.state_dict())


def test_the_defaults_are_the_cifar10_network_of_the_paper():
    with torch.device("meta"):
        ours = UNet(UNetConfig(), shape=(3, 32, 32))
        theirs: Any = UNet2DModel(**diffusers_config(ours, (3, 32, 32)))
    assert sum(parameter.numel() for parameter in ours.parameters()) == 35_746_307
    assert {name: value.shape for name, value in to_diffusers(ours).items()} == {name: value.shape for name, value in theirs.state_dict().items()}


def test_channels_last_changes_nothing_but_the_speed():
    config, size, channels = CONFIGS["attention in the middle"]
    ours = randomised(UNet(config, shape=(channels, size, size)))
    x, t = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 500])
    with torch.inference_mode():
        expected = ours(x, t)
        torch.testing.assert_close(ours.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t), expected, rtol=1e-4, atol=1e-5)
