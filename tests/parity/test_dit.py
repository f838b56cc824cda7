"""The Transformer against the paper's table and against diffusers'."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import DiTTransformer2DModel

from components.diffusion.config import DiffusionConfig
from components.errors import DataError
from components.model.checkpoint import load_denoiser, write_checkpoint
from components.model.diffusers_export import write_diffusers
from components.model.diffusers_import import import_diffusers
from components.model.spec import DenoiserSpec
from components.networks.dit.config import DiTConfig
from components.networks.dit.network import position_embedding
from components.spaces.pixels import PixelSpace
from components.storage import Location

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "in_channels": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 5,
}
OURS = DiTConfig(depth=3, hidden_size=16, num_heads=2)


def random(network: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def diffusers_dit(**changes: Any) -> Any:
    """Returns a network of diffusers whose blocks share their embeddings, as DiT's do."""
    network = random(DiTTransformer2DModel(**{**TINY, **changes}))
    for block in network.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    return network


@pytest.mark.parametrize(
    ("size", "patch", "millions"),
    [
        *(("S", patch, 33) for patch in (2, 4, 8)),
        *(("B", patch, millions) for patch, millions in ((2, 130), (4, 130), (8, 131))),
        *(("L", patch, millions) for patch, millions in ((2, 458), (4, 458), (8, 459))),
        *(("XL", patch, millions) for patch, millions in ((2, 675), (4, 675), (8, 676))),
    ],
)
def test_there_are_as_many_parameters_as_the_paper_says(size: Any, patch: int, millions: int):
    """DiT table 4: latents of 4x32x32, variances learned, 1,000 classes."""
    with torch.device("meta"):
        network = DiTConfig(size=size, patch_size=patch, conditional=True).build((4, 32, 32), 1000, outputs=2)
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == millions


@pytest.mark.parametrize("changes", [{}, {"out_channels": 6}, {"in_channels": 1, "norm_eps": 1e-6}, {"patch_size": 4}])
def test_a_network_of_diffusers_computes_the_same_here(changes: dict[str, Any], tmp_path: Path):
    theirs = diffusers_dit(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_denoiser(import_diffusers(Location.of(tmp_path / "theirs"), Location.of(tmp_path / "made")))
    x, t = torch.randn(4, *ours.spec.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 17, 500, 999])
    labels = torch.tensor([0, 2, 4, 5])
    with torch.inference_mode():
        torch.testing.assert_close(ours.network(x, t, labels), theirs(x, t, class_labels=labels).sample, rtol=1e-4, atol=1e-5)
    assert len(ours.spec.label_names) == 5


@pytest.mark.parametrize("conditional", [True, False])
def test_a_network_of_ours_computes_the_same_in_diffusers(conditional: bool, tmp_path: Path):
    names = ("cat", "dog") if conditional else ()
    model = OURS.model_copy(update={"conditional": conditional})
    spec = DenoiserSpec(model=model, diffusion=DiffusionConfig(), space=PixelSpace(image_size=8), label_names=names)
    network = random(spec.build())
    write_checkpoint(Location.of(tmp_path / "ours"), spec, network.state_dict())
    write_diffusers(tmp_path / "theirs", spec, network.state_dict())
    theirs = cast(Any, DiTTransformer2DModel.from_pretrained(tmp_path / "theirs" / "unet")).eval()
    x, t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 17, 999])
    labels = torch.tensor([0, 1, 2]) if conditional else None
    with torch.inference_mode():
        found = theirs(x, t, class_labels=labels if labels is not None else torch.zeros(3, dtype=torch.int64)).sample
        torch.testing.assert_close(network(x, t, labels), found, rtol=1e-4, atol=1e-5)


def test_embeddings_that_differ_between_blocks_are_refused(tmp_path: Path):
    random(DiTTransformer2DModel(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"timestep_embedder.linear_1.weight of block 1 is not that of block 0"):
        import_diffusers(Location.of(tmp_path), Location.of(tmp_path / "made"))


def test_places_of_patches_are_those_of_diffusers():
    theirs = diffusers_dit(sample_size=12).pos_embed.pos_embed[0]
    torch.testing.assert_close(position_embedding(6, 6, 16), theirs)


def test_an_image_may_have_any_sides_that_the_patch_divides():
    network = random(DiTConfig(depth=1, hidden_size=16, num_heads=2).build((3, 12, 6)))
    x = torch.randn(2, 3, 12, 6)
    assert network(x, torch.tensor([0, 5])).shape == x.shape
    with pytest.raises(ValueError, match=r"model.patch_size=2 does not divide height 12 and width 7; use 1"):
        DiTConfig().build((3, 12, 7))


def test_a_fresh_network_estimates_zero_and_every_block_is_the_identity():
    network = OURS.build((3, 8, 8))
    assert not network(torch.randn(2, 3, 8, 8), torch.tensor([3, 7])).any()


def test_activations_that_are_computed_again_give_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        network = random(OURS.model_copy(update={"checkpointing": checkpointing}).build((3, 8, 8))).train()
        network(torch.ones(2, 3, 8, 8), torch.tensor([3, 7])).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=0, atol=0)
