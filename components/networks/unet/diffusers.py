"""Weights to and from the names of diffusers' `UNet2DModel`, the format the field exchanges."""

from collections.abc import Mapping
from typing import Any

import torch

from .network import UNet

Weights = dict[str, torch.Tensor]


_PLAIN = {"conv": ("DownBlock2D", "UpBlock2D"), "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}
"""Blocks without attention, down and up, by how a level leads to the next."""


def diffusers_config(unet: UNet, shape: tuple[int, ...]) -> dict[str, object]:
    """Returns the keyword arguments of the `diffusers.UNet2DModel` that is this network."""
    config = unet.config
    channels, height, width = shape
    plain = _PLAIN["resnet" if config.resample_blocks else "conv"]
    attends = [height >> level in config.attention_resolutions for level in range(len(config.channel_mults))]
    widths = [config.base_channels * mult for mult in config.channel_mults]
    return {
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": unet.conv_out.out_channels,
        "layers_per_block": config.num_res_blocks,
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if attend else plain[0] for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else plain[1] for attend in reversed(attends)],
        "downsample_type": "resnet" if config.resample_blocks else "conv",
        "upsample_type": "resnet" if config.resample_blocks else "conv",
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "attention_head_dim": config.head_channels or (widths[-1] // config.num_heads if config.num_heads > 1 else None),
        "norm_num_groups": config.num_groups,
        "attn_norm_num_groups": config.num_groups if config.scale_shift_norm else None,
        "norm_eps": config.norm_eps,
        "dropout": config.dropout,
        "act_fn": "silu",
        "downsample_padding": config.downsample_padding,
        "flip_sin_to_cos": config.time_features == "cos_sin",
        "freq_shift": 0 if config.time_features == "cos_sin" else 1,
        "num_class_embeds": None if unet.label_embedding is None else unet.label_embedding.num_embeddings,
    }


def _prefixes(unet: UNet) -> tuple[dict[str, str], list[str]]:
    """Returns our module prefix -> theirs, and their residual blocks in the order ours run."""
    renamed = {
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
        "time.hidden": "time_embedding.linear_1",
        "time.embedding": "time_embedding.linear_2",
        "label_embedding": "class_embedding",
        "mid_1": "mid_block.resnets.0",
        "mid_2": "mid_block.resnets.1",
        "mid_attention": "mid_block.attentions.0",
    }
    order: list[str] = []
    for ours, theirs, sampler in (("down", "down_blocks", "downsamplers"), ("up", "up_blocks", "upsamplers")):
        order += ["mid_block.resnets.0", "mid_block.resnets.1"] if ours == "up" else []
        for level, modules in enumerate(getattr(unet, ours)):
            resample = f"{theirs}.{level}.{sampler}.0"
            renamed |= {f"{ours}.{level}.resample": resample, f"{ours}.{level}.resample.conv": f"{resample}.conv"}
            for index in range(len(modules.blocks)):
                renamed[f"{ours}.{level}.blocks.{index}"] = f"{theirs}.{level}.resnets.{index}"
                renamed[f"{ours}.{level}.attentions.{index}"] = f"{theirs}.{level}.attentions.{index}"
                order.append(f"{theirs}.{level}.resnets.{index}")
            order += [resample] * (len(modules.running()) - len(modules.blocks))
    return renamed, order


_LEAVES = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "out": "to_out.0",
}


def _their_name(name: str, renamed: dict[str, str]) -> str:
    prefix = max((key for key in renamed if name.startswith(key + ".")), key=len)
    leaf, _, kind = name[len(prefix) + 1 :].rpartition(".")
    return ".".join(part for part in (renamed[prefix], _LEAVES.get(leaf, leaf), kind) if part)


def to_diffusers(unet: UNet) -> Weights:
    """Returns the network's weights under diffusers' names: fused products are cut into diffusers' separate ones."""
    renamed, order = _prefixes(unet)
    theirs: Weights = {}
    for name, value in unet.state_dict().items():
        if name.startswith("condition_embedding."):
            continue  # it says what augmentation did, and a sample is told nothing of that
        kind = name.rpartition(".")[2]
        if name.startswith("time.projections."):
            pieces = value.split(unet.time.block_channels)
            theirs |= {f"{block}.time_emb_proj.{kind}": piece for block, piece in zip(order, pieces, strict=True)}
        elif ".qkv." in name or name.startswith("qkv."):
            attention = _their_name(name.replace("qkv", "to_q"), renamed).removesuffix(f"to_q.{kind}")
            theirs |= {f"{attention}to_{part}.{kind}": piece for part, piece in zip("qkv", value.chunk(3), strict=True)}
        else:
            theirs[_their_name(name, renamed)] = value
    return theirs


def from_diffusers(unet: UNet, theirs: Weights) -> Weights:
    """Returns a state dict for `unet` from the weights of its diffusers twin.

    Raises:
        KeyError: if a tensor is missing.
    """
    renamed, order = _prefixes(unet)
    ours: Weights = {}
    for name in unet.state_dict():
        kind = name.rpartition(".")[2]
        if name.startswith("time.projections."):
            ours[name] = torch.cat([theirs[f"{block}.time_emb_proj.{kind}"] for block in order])
        elif ".qkv." in name:
            ours[name] = torch.cat([theirs[_their_name(name.replace("qkv", f"to_{part}"), renamed)] for part in "qkv"])
        else:
            ours[name] = theirs[_their_name(name, renamed)]
    return ours


def settings_of(config: Mapping[str, Any], height: int) -> dict[str, object]:
    """Returns the settings that are those of a `UNet2DModel`, from its keyword arguments.

    Args:
        height: of x_t.

    Raises:
        ValueError: naming the first setting that has no counterpart.
        KeyError: if one is missing.
    """
    fixed = {
        "time_embedding_type": "positional",
        "act_fn": "silu",
        "center_input_sample": False,
        "class_embed_type": None,
        "add_attention": True,
        "mid_block_scale_factor": 1,
    }
    for name, wanted in fixed.items():
        if config.get(name, wanted) != wanted:
            raise ValueError(f"{name}={config[name]} has no counterpart here; only {name}={wanted} has")
    downs, ups = config["down_block_types"], config["up_block_types"]
    resample, norm = config.get("downsample_type", "conv"), config.get("resnet_time_scale_shift", "default")
    if resample not in _PLAIN or config.get("upsample_type", "conv") != resample:
        raise ValueError(f"downsample_type={resample} with upsample_type={config.get('upsample_type')} has no counterpart here; both conv or both resnet have")
    if norm not in ("default", "scale_shift"):
        raise ValueError(f"resnet_time_scale_shift={norm} has no counterpart here; default and scale_shift have")
    # Where diffusers scales and shifts, its middle attention has a norm only if it is told so.
    groups, of_attention = config.get("norm_num_groups", 32), config.get("attn_norm_num_groups")
    if of_attention != groups and (of_attention is not None or norm == "scale_shift"):
        raise ValueError(f"attn_norm_num_groups={of_attention} with resnet_time_scale_shift={norm} has no counterpart here; attn_norm_num_groups={groups} has")
    known = dict.fromkeys(_PLAIN[resample], False) | {"AttnDownBlock2D": True, "AttnUpBlock2D": True}
    if unknown := next((name for name in (*downs, *ups) if name not in known), None):
        raise ValueError(f"block type {unknown} has no counterpart here; use {', '.join(known)}")
    attends = [known[name] for name in downs]
    if attends != [known[name] for name in reversed(ups)]:
        raise ValueError("down_block_types and up_block_types attend at different levels, which has no counterpart here")
    widths = list(config["block_out_channels"])
    base = widths[0]
    if any(width % base for width in widths):
        raise ValueError(f"block_out_channels={widths} are no multiples of the first, which has no counterpart here")
    head = config.get("attention_head_dim", 8)
    return {
        "base_channels": base,
        "channel_mults": [width // base for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": [height >> level for level, attend in enumerate(attends) if attend],
        "head_channels": head,
        "num_groups": config.get("norm_num_groups", 32),
        "dropout": config.get("dropout", 0.0),
        "norm_eps": config.get("norm_eps", 1e-5),
        "time_features": _time_features(config),
        "downsample_padding": config.get("downsample_padding", 1),
        "resample_blocks": resample == "resnet",
        "scale_shift_norm": norm == "scale_shift",
        "conditional": bool(config.get("num_class_embeds")),
    }


def _time_features(config: Mapping[str, Any]) -> str:
    given = (config.get("flip_sin_to_cos", True), config.get("freq_shift", 0))
    kinds = {(False, 1): "sin_cos", (True, 0): "cos_sin"}
    if given not in kinds:
        raise ValueError(f"flip_sin_to_cos={given[0]} with freq_shift={given[1]} has no counterpart here; false with 1 and true with 0 have")
    return kinds[given]
