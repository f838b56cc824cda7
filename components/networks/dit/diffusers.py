"""Weights to and from the names of diffusers' `DiTTransformer2DModel`, whose blocks have an embedding of time and class each."""

from collections.abc import Mapping
from typing import Any

import torch

from .network import DiT

Weights = dict[str, torch.Tensor]

_LEAVES = {
    "attention.out": "attn1.to_out.0",
    "perceptron.inner": "ff.net.0.proj",
    "perceptron.outer": "ff.net.2",
    "modulation": "norm1.linear",
}
_REST = {"patches": "pos_embed.proj", "modulation_out": "proj_out_1", "out": "proj_out_2"}
_EMBEDDINGS = {
    "time_hidden": "timestep_embedder.linear_1",
    "time_embedding": "timestep_embedder.linear_2",
    "label_embedding": "class_embedder.embedding_table",
}


def diffusers_config(dit: DiT, shape: tuple[int, ...]) -> dict[str, object]:
    """Returns the keyword arguments of the `diffusers.DiTTransformer2DModel` that is this network. One without classes is told class 0 there."""
    _, hidden_size, num_heads = dit.config.measures
    return {
        "num_attention_heads": num_heads,
        "attention_head_dim": hidden_size // num_heads,
        "in_channels": shape[0],
        "out_channels": shape[0] * dit.outputs,
        "num_layers": len(dit.blocks),
        "dropout": 0.0,
        "attention_bias": True,
        "sample_size": shape[1],
        "patch_size": dit.config.patch_size,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1 if dit.label_embedding is None else dit.label_embedding.num_embeddings - 1,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": dit.config.norm_eps,
    }


def _their_name(name: str) -> str:
    """Returns diffusers' name of a tensor; of one that every block has, the name within a block."""
    module, _, kind = name.rpartition(".")
    if module in _EMBEDDINGS:
        return f"norm1.emb.{_EMBEDDINGS[module]}.{kind}"
    if not module.startswith("blocks."):
        return f"{_REST[module]}.{kind}"
    _, number, leaf = module.split(".", 2)
    return f"transformer_blocks.{number}.{_LEAVES[leaf]}.{kind}"


def to_diffusers(dit: DiT) -> Weights:
    """Returns the network's weights under diffusers' names; every block gets the embeddings that all share here."""
    theirs: Weights = {}
    for name, value in dit.state_dict().items():
        if name.startswith("condition_embedding."):
            continue  # it says what augmentation did, and a sample is told nothing of that
        if ".qkv." in name:
            number, kind = name.split(".")[1], name.rpartition(".")[2]
            theirs |= {f"transformer_blocks.{number}.attn1.to_{part}.{kind}": piece for part, piece in zip("qkv", value.chunk(3), strict=True)}
        elif name.rpartition(".")[0] in _EMBEDDINGS:
            theirs |= {f"transformer_blocks.{number}.{_their_name(name)}": value.clone() for number in range(len(dit.blocks))}
        else:
            theirs[_their_name(name)] = value
    if dit.label_embedding is None:
        told = f"norm1.emb.{_EMBEDDINGS['label_embedding']}.weight"
        theirs |= {f"transformer_blocks.{number}.{told}": torch.zeros(2, dit.out.in_features) for number in range(len(dit.blocks))}
    return theirs


def from_diffusers(dit: DiT, theirs: Weights) -> Weights:
    """Returns a state dict for `dit` from the weights of its diffusers twin.

    Raises:
        KeyError: if a tensor is missing.
        ValueError: if the embeddings of two blocks differ, for which there is no place here.
    """
    ours: Weights = {}
    for name in dit.state_dict():
        if ".qkv." in name:
            number, kind = name.split(".")[1], name.rpartition(".")[2]
            ours[name] = torch.cat([theirs[f"transformer_blocks.{number}.attn1.to_{part}.{kind}"] for part in "qkv"])
        elif name.rpartition(".")[0] in _EMBEDDINGS:
            ours[name] = _shared(theirs, _their_name(name), len(dit.blocks))
        else:
            ours[name] = theirs[_their_name(name)]
    return ours


def _shared(theirs: Weights, name: str, blocks: int) -> torch.Tensor:
    first, *others = (theirs[f"transformer_blocks.{number}.{name}"] for number in range(blocks))
    for number, other in enumerate(others, 1):
        if not torch.equal(first, other):
            raise ValueError(f"{name} of block {number} is not that of block 0; a DiT has one for all blocks")
    return first


def settings_of(config: Mapping[str, Any]) -> dict[str, object]:
    """Returns the settings of a network here that are those of a `DiTTransformer2DModel`, from its keyword arguments.

    Raises:
        ValueError: naming the first setting that has no counterpart.
        KeyError: if one is missing.
    """
    fixed = {
        "dropout": 0.0,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "upcast_attention": False,
    }
    for name, wanted in fixed.items():
        if config.get(name, wanted) != wanted:
            raise ValueError(f"{name}={config[name]} has no counterpart here; only {name}={wanted} has")
    heads = int(config["num_attention_heads"])
    return {
        "kind": "dit",
        "num_heads": heads,
        "hidden_size": heads * int(config["attention_head_dim"]),
        "depth": config["num_layers"],
        "patch_size": config["patch_size"],
        "norm_eps": config.get("norm_eps", 1e-5),
        "conditional": True,
    }
