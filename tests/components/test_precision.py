"""Sampling in bfloat16: the network alone computes in it, and its weights are cast once."""

from dataclasses import replace

import pytest
import torch

from components.diffusion.config import DiffusionConfig
from components.diffusion.graphs import MOST_GRAPHS, GraphedNetwork, padded
from components.diffusion.precision import prepared, resolve_precision
from components.diffusion.recipe import SAMPLERS, Recipe
from components.diffusion.sampling import sample
from components.diffusion.schedule import Schedule
from components.networks.unet.config import UNetConfig
from components.networks.unet.network import UNet

SHAPE, LABELS = (3, 8, 8), torch.tensor([0, 1, 2])
RECIPES = [
    *(Recipe(sampler, 8) for sampler in SAMPLERS),
    Recipe(steps=8, eta=1.0),
    Recipe("unipc", 8, guidance=3.0, threshold="dynamic"),
    Recipe("ancestral", 8, guidance=2.0, variance="large"),
]
by_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=Recipe.describe)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_network(device: str = "cpu") -> UNet:
    torch.manual_seed(0)
    config = UNetConfig(base_channels=16, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4, dropout=0.0, conditional=True)
    network = UNet(config, shape=(3, 8, 8), num_classes=3)
    for parameter in network.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return network.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def drawn(network: object, recipe: Recipe, device: str = "cpu", seeds: range = range(3)) -> torch.Tensor:
    labels = torch.tensor([seed % 3 for seed in seeds])
    schedule = Schedule(DiffusionConfig(prediction="v")).to(device)
    return sample(network, schedule, seeds, SHAPE, recipe, device=device, labels=labels, null_label=3)  # pyrefly: ignore[bad-argument-type]


@by_recipe
def test_bfloat16_draws_nearly_the_images_of_float32_and_not_the_same(recipe: Recipe):
    network, lower = make_network(), replace(recipe, precision="bfloat16")
    exact, rounded = drawn(network, recipe), drawn(network, lower)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()


@by_recipe
def test_weights_that_are_cast_once_draw_what_those_cast_at_every_call_draw(recipe: Recipe):
    network, lower = make_network(), replace(recipe, precision="bfloat16")
    ready = prepared(network, "bfloat16", "cpu")
    assert torch.equal(drawn(ready, lower), drawn(network, lower))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_a_network_for_float32_is_the_network_itself():
    network = make_network()
    assert prepared(network, "float32", "cpu") is network


def test_only_the_network_computes_in_bfloat16():
    seen: list[torch.dtype] = []

    def network(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.extend([x_t.dtype, (x_t.flatten(1) @ x_t.flatten(1).T).dtype])
        return x_t * 0.5

    drawn(network, Recipe(steps=1))
    drawn(network, Recipe(steps=1, precision="bfloat16"))
    assert seen == [torch.float32, torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("seeds", [range(1), range(2, 5), range(4, 5)], ids=str)
def test_a_sample_in_bfloat16_depends_on_its_seed_only(seeds: range):
    recipe = Recipe("unipc", 6, precision="bfloat16")
    network = prepared(make_network(), "bfloat16", "cpu")
    together = drawn(network, recipe, seeds=range(6))
    torch.testing.assert_close(drawn(network, recipe, seeds=seeds), together[seeds.start : seeds.stop], rtol=0, atol=0.02)


def test_auto_is_float32_on_a_cpu_and_a_wish_is_heeded():
    assert resolve_precision("auto", "cpu") == "float32"
    assert resolve_precision("bfloat16", "cpu") == "bfloat16"
    assert resolve_precision("float32", torch.device("cuda")) == "float32"


def test_an_address_of_float32_samples_says_nothing_of_precision():
    assert "precision" not in Recipe().identity()
    assert Recipe(precision="bfloat16").identity() == Recipe().identity() | {"precision": "bfloat16"}


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision=float16 is unknown; use float32 or bfloat16"):
        Recipe(precision="float16").check(1000)  # pyrefly: ignore[bad-argument-type]


def test_batches_are_padded_to_few_sizes_and_by_less_than_their_double():
    sizes = {rows: padded(rows) for rows in range(1, 257)}
    assert all(rows <= size < 2 * rows for rows, size in sizes.items())
    assert all(sizes[rows] == rows for rows in (1, 2, 4, 8, 16, 32, 64, 96, 128, 256))
    assert len(set(sizes.values())) == 5 + 8


@on_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_graph_draws_what_the_network_draws(precision: str):
    network = make_network("cuda")
    recipe = Recipe("unipc", 6, guidance=2.0, precision="bfloat16" if precision == "bfloat16" else "float32")
    graphed = prepared(network, recipe.precision, "cuda")
    for count in (1, 3, 4, 33, 3):
        found, expected = drawn(graphed, recipe, "cuda", range(count)), drawn(network, recipe, "cuda", range(count))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05 if precision == "bfloat16" else 5e-3)


@on_gpu
def test_graphs_are_bounded_and_follow_the_arithmetic_that_they_are_called_in():
    network = make_network("cuda")
    graphed = GraphedNetwork(network)

    def call(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(rows, *SHAPE, device="cuda"), torch.arange(rows, device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda")
        return graphed(*inputs).clone(), network(*inputs)

    for rows in (*range(1, 200, 16), 5, 199):
        found, expected = call(rows)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
        assert len(graphed._graphs) <= MOST_GRAPHS
    with torch.autocast("cuda", torch.bfloat16):
        assert call(4)[0].dtype == torch.bfloat16
    assert call(4)[0].dtype == torch.float32
