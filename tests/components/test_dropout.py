from itertools import combinations

import numpy as np
import pytest
import torch

from components.data.batches import BatchPlan
from components.data.order import RowOrder
from components.diffusion.config import DiffusionConfig
from components.diffusion.schedule import Schedule
from components.networks.unet.config import UNetConfig
from components.networks.unet.dropout import MIX_1, MIX_2, STEP, dropped, keep_mask
from components.networks.unet.layers import ResidualBlock
from components.networks.unet.network import UNet

CONFIG = UNetConfig(base_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4, dropout=0.5)
ROWS_PER_LANE = 2


def keys_of(lanes: range, seed: int = 0, step: int = 0) -> torch.Tensor:
    plan = BatchPlan(RowOrder(64, 8 * ROWS_PER_LANE, 8, seed), Schedule(DiffusionConfig()).draw_times, mirrored=None, num_dropouts=CONFIG.num_dropouts)
    keys = plan.keys(step, lanes)
    assert keys is not None
    return keys


def random_keys(images: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-(2**31), 2**31, (images, 2), dtype=np.int32))


def masks(keys: torch.Tensor, p: float = 0.5, elements: int = 4096) -> torch.Tensor:
    return torch.stack([keep_mask(layer, p, elements) for layer in keys.unbind(1)], dim=1)


@pytest.mark.parametrize("parts", [[range(0, 2), range(2, 4)], [range(lane, lane + 1) for lane in range(4)], [range(0, 1), range(1, 4)]], ids=str)
def test_a_lane_drops_the_same_whoever_carries_it(parts: list[range]):
    assert torch.equal(torch.cat([keys_of(part) for part in parts]), keys_of(range(4)))
    assert torch.equal(torch.cat([masks(keys_of(part)) for part in parts]), masks(keys_of(range(4))))


def test_another_image_lane_step_seed_or_layer_drops_independently():
    found = torch.cat([masks(keys_of(range(2), seed, step)).flatten(0, 1) for seed, step in ((0, 0), (0, 1), (1, 0))]).float()
    differing = torch.cdist(found, found, p=0)[torch.triu_indices(len(found), len(found), offset=1).unbind()] / found.shape[1]
    assert len(differing) > 2000
    assert float((differing - 0.5).abs().max()) < 6 * 0.5 / found.shape[1] ** 0.5


def test_no_mask_is_another_one_shifted():
    found = masks(keys_of(range(2)), elements=2048).flatten(0, 1).double() * 2 - 1
    spectra = torch.fft.rfft(found, n=4096)
    for one, other in combinations(spectra, 2):
        correlation = torch.fft.irfft(one * other.conj(), n=4096) / 2048
        assert float(correlation.abs().max()) < 0.2


def test_neighbours_in_a_mask_are_independent():
    found = masks(keys_of(range(8)), elements=65536).flatten(0, 1).double() * 2 - 1
    for lag in (1, 2, 3, 8, 128, 4096):
        correlation = (found[:, lag:] * found[:, :-lag]).mean()
        assert abs(float(correlation)) < 6 / found[:, lag:].numel() ** 0.5


@pytest.mark.parametrize("p", [0.001, 0.1, 0.2, 0.7])
def test_the_part_p_is_dropped_the_rest_scaled_so_that_the_mean_stays_and_the_gradient_goes_the_same_way(p: float):
    x = torch.ones(32, 16, 32, 32).requires_grad_()
    y = dropped(x, random_keys(32), p)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y)
    kept = y != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=6 * (p * (1 - p) / y.numel()) ** 0.5)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))


def test_the_hash_is_that_of_unsigned_integers():
    keys, elements = random_keys(5), 999
    first, second = (keys[:, word, None].numpy().view(np.uint32) for word in (0, 1))
    with np.errstate(over="ignore"):
        hashed = np.arange(elements, dtype=np.uint32) * np.uint32(STEP) + first
        hashed = (hashed ^ (hashed >> np.uint32(16))) * np.uint32(MIX_1)
        hashed = (hashed ^ (hashed >> np.uint32(15)) ^ second) * np.uint32(MIX_2)
    for p in (0.1, 0.5, 0.9):
        # Unsigned hashes are compared as signed ones, which only names them otherwise: half the range lies below 0.
        expected = hashed.view(np.int32).astype(np.int64) + 2**31 >= round(p * 2**32)
        assert np.array_equal(keep_mask(keys, p, elements).numpy(), expected)


def test_neither_memory_layout_nor_threads_change_what_is_dropped():
    keys, x, threads = random_keys(4), torch.ones(4, 8, 16, 16), torch.get_num_threads()
    expected = dropped(x, keys, 0.5)
    assert torch.equal(dropped(x.to(memory_format=torch.channels_last), keys, 0.5), expected)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(dropped(x, keys, 0.5), expected)
    finally:
        torch.set_num_threads(threads)


def test_under_bfloat16_what_is_kept_is_rounded_once():
    x = torch.randn(4, 8, 16, 16).bfloat16()
    y = dropped(x, random_keys(4), 0.1)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y[y != 0], (x.float() * (1 / 0.9)).bfloat16()[y != 0], rtol=0, atol=0)


def test_a_network_takes_a_pair_of_keys_for_each_block_and_leaves_torchs_generator_alone():
    unet = UNet(CONFIG, shape=(1, 8, 8)).train()
    torch.nn.init.normal_(unet.conv_out.weight)
    for module in unet.modules():
        if isinstance(module, ResidualBlock):
            torch.nn.init.normal_(module.conv_2.weight, std=0.1)
    assert CONFIG.num_dropouts == sum(isinstance(module, ResidualBlock) for module in unet.modules())
    x, t, keys = torch.randn(4, 1, 8, 8), torch.tensor([3, 4, 5, 6]), keys_of(range(2))
    before = torch.get_rng_state()
    first = unet(x, t, None, keys)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(unet(x, t, None, keys), first)
    for layer in range(CONFIG.num_dropouts):
        other = keys.clone()
        other[0, layer] = 7
        changed = unet(x, t, None, other)
        assert not torch.equal(changed[0], first[0])
        torch.testing.assert_close(changed[1:], first[1:])


def test_without_keys_a_network_drops_by_torchs_generator_and_in_evaluation_not_at_all():
    unet, x, t = UNet(CONFIG, shape=(1, 8, 8)).train(), torch.randn(4, 1, 8, 8), torch.tensor([3, 4, 5, 6])
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(unet(x, t))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(unet.eval()(x, t, None, keys_of(range(2))), unet(x, t))
