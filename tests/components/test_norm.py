import pytest
import torch
from torch.nn import functional as F

from components.networks.unet.config import UNetConfig
from components.networks.unet.layers import doubled
from components.networks.unet.network import UNet
from components.networks.unet.norm import EPS, Norm, norm_by_channel


@pytest.mark.parametrize("channels", [32, 48])  # groups of 4, and of 6 as where skips come in
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_norm_and_silu_and_their_gradients_are_those_of_torch_in_float64(channels: int, layout: torch.memory_format, mean: float):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, channels, 6, 5, generator=draw) + mean * torch.rand(3, channels, 1, 1, generator=draw)
    weight, bias, along = (torch.randn(shape, generator=draw) for shape in ((channels,), (channels,), x.shape))
    found = [tensor.clone().to(memory_format=layout) if tensor.dim() == 4 else tensor.clone() for tensor in (x, weight, bias)]
    exact = [tensor.double() for tensor in (x, weight, bias)]
    for tensor in (*found, *exact):
        tensor.requires_grad_()
    ours, theirs = F.silu(norm_by_channel(found[0], found[1], found[2], 8)), F.silu(F.group_norm(exact[0], 8, exact[1], exact[2], EPS))
    (ours * along).sum().backward()
    (theirs * along).sum().backward()
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    for mine, other in zip(found, exact, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-3, atol=1e-3)


def test_bfloat16_comes_out_as_it_goes_in_with_statistics_in_float32():
    x = (torch.randn(2, 32, 8, 8) + 5).bfloat16()
    norm = Norm(8, 32)
    ours, exact = norm_by_channel(x, norm.weight, norm.bias, 8), F.group_norm(x.double(), 8, eps=EPS)
    assert ours.dtype == torch.bfloat16
    assert float((ours.detach().double() - exact).norm() / exact.norm()) < 2**-8


def test_a_pixel_doubled_is_torchs_nearest_neighbour_and_its_gradient_the_sum_of_four():
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=layout).requires_grad_()
        assert torch.equal(doubled(x), F.interpolate(x, scale_factor=2.0, mode="nearest"))
        assert torch.autograd.gradcheck(doubled, (x,))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_change_neither_output_nor_gradient(dropout: float):
    config = UNetConfig(base_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4, dropout=dropout)
    plain = UNet(config, shape=(1, 8, 8)).train()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    thrifty = UNet(config.model_copy(update={"checkpointing": True}), shape=(1, 8, 8)).train()
    thrifty.load_state_dict(plain.state_dict())
    x, t, keys = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.randint(-(2**31), 2**31, (2, config.num_dropouts, 2)).int() if dropout else None
    for unet in (plain, thrifty):
        torch.manual_seed(0)
        unet(x, t, None, keys).square().sum().backward()
    for mine, theirs in zip(plain.parameters(), thrifty.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)
