"""The U-Net of the DDPM paper: eps_hat = UNet(x_t, t), or UNet(x_t, t, labels) where it is told the class."""

from itertools import repeat
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .config import UNetConfig
from .layers import Downsample, Resample, ResidualBlock, SelfAttention, TimeMLP, Upsample, conv3x3
from .norm import Norm


class Level(nn.Module):
    """Residual blocks of one resolution, the attention after each, and what leads to the next resolution."""

    def __init__(self, blocks: list[ResidualBlock], attentions: list[nn.Module], resample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    def stages(self) -> list[tuple[nn.Module, nn.Module]]:
        """Returns the (residual block, attention) pairs in the order they run."""
        return list(zip(self.blocks, self.attentions, strict=True))

    def running(self) -> list[nn.Module]:
        """Returns the residual blocks in the order they run, that which leads to the next resolution too."""
        return [*self.blocks, *([self.resample] if isinstance(self.resample, ResidualBlock) else [])]


class UNet(nn.Module):
    """The denoiser: (x_t (B, C, H, W), t (B,), labels (B,) int64 in 0..K or None) -> estimate (B, C, H, W).

    With K classes an embedding of the label is added to that of the time step, as in the code of ADM. Label K says that the class is
    not told, and so does None.

    Args:
        shape: (C, H, W).
        num_classes: K; 0 for a network that is told no class.
        outputs: how many times the channels of x_t it returns.
        conditions: A, numbers that it is told of each row beside; they are mapped without a bias, so that 0 says nothing.

    Raises:
        ValueError: if the image size cannot be halved as often as the config has levels, or labels are given to a network without classes.
    """

    def __init__(self, config: UNetConfig, *, shape: tuple[int, ...], num_classes: int = 0, outputs: int = 1, conditions: int = 0) -> None:
        super().__init__()
        config.check_shape(shape)
        channels, height, _ = shape
        self.config = config
        widths = [config.base_channels * mult for mult in config.channel_mults]
        sizes = [height >> level for level in range(len(widths))]
        self.conv_in = conv3x3(channels, widths[0])
        down, skips = self._make_down(widths, sizes)
        up = self._make_up(widths, sizes, skips)
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.mid_1, self.mid_2 = self._block(widths[-1], widths[-1]), self._block(widths[-1], widths[-1])
        self.mid_attention = self._attention(widths[-1])
        self.norm_out = Norm(config.num_groups, widths[0], config.norm_eps)
        self.conv_out = conv3x3(widths[0], channels * outputs, scale=0.0)
        running = [*(b for level in down for b in level.running()), self.mid_1, self.mid_2, *(b for level in up for b in level.running())]
        told = [block.out_channels * (2 if config.scale_shift_norm else 1) for block in running if isinstance(block, ResidualBlock)]
        self.time = TimeMLP(config.base_channels, told, cosine_first=config.time_features == "cos_sin")
        # Made last, so that all other weights are those that the same seed gives a network without classes.
        self.label_embedding = nn.Embedding(num_classes + 1, self.time.embedding_channels) if num_classes else None
        self.condition_embedding = nn.Linear(conditions, self.time.embedding_channels, bias=False) if conditions else None
        if self.condition_embedding is not None:
            nn.init.zeros_(self.condition_embedding.weight)

    def _block(self, in_channels: int, out_channels: int, resample: Resample = "none") -> ResidualBlock:
        config = self.config
        options: dict[str, Any] = {"eps": config.norm_eps, "scale_shift": config.scale_shift_norm, "resample": resample}
        return ResidualBlock(in_channels, out_channels, dropout=config.dropout, num_groups=config.num_groups, **options)

    def _down(self, width: int) -> nn.Module:
        return self._block(width, width, "down") if self.config.resample_blocks else Downsample(width, self.config.downsample_padding)

    def _up(self, width: int) -> nn.Module:
        return self._block(width, width, "up") if self.config.resample_blocks else Upsample(width)

    def _attention(self, channels: int) -> SelfAttention:
        return SelfAttention(channels, num_heads=self.config.heads(channels), num_groups=self.config.num_groups, eps=self.config.norm_eps)

    def _attention_at(self, size: int, channels: int) -> nn.Module:
        return self._attention(channels) if size in self.config.attention_resolutions else nn.Identity()

    def _make_down(self, widths: list[int], sizes: list[int]) -> tuple[list[Level], list[int]]:
        """Returns the levels on the way down, and the channels of every tensor kept for the way up."""
        levels, skips, width = [], [widths[0]], widths[0]
        for number, (out_width, size) in enumerate(zip(widths, sizes, strict=True)):
            blocks = [self._block(width if index == 0 else out_width, out_width) for index in range(self.config.num_res_blocks)]
            attentions = [self._attention_at(size, out_width) for _ in blocks]
            width, last = out_width, number == len(widths) - 1
            levels.append(Level(blocks, attentions, nn.Identity() if last else self._down(width)))
            skips += [width] * (len(blocks) + (not last))
        return levels, skips

    def _make_up(self, widths: list[int], sizes: list[int], skips: list[int]) -> list[Level]:
        levels, width, skips = [], widths[-1], list(skips)
        for number in reversed(range(len(widths))):
            blocks = []
            for _ in range(self.config.num_res_blocks + 1):
                blocks.append(self._block(width + skips.pop(), widths[number]))
                width = widths[number]
            attentions = [self._attention_at(sizes[number], width) for _ in blocks]
            levels.append(Level(blocks, attentions, self._up(width) if number else nn.Identity()))
        return levels

    def _condition(self, x_t: torch.Tensor, labels: torch.Tensor | None, conditions: torch.Tensor | None) -> torch.Tensor | None:
        label = self._label(x_t, labels)
        if self.condition_embedding is None or conditions is None:
            return label
        more = self.condition_embedding(conditions)
        return more if label is None else label + more

    def _label(self, x_t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
        if self.label_embedding is None:
            if labels is not None:
                raise ValueError("labels are given to a network without classes; give none, or train with model.conditional=true")
            return None
        if labels is None:
            labels = torch.full((len(x_t),), self.label_embedding.num_embeddings - 1, device=x_t.device)
        return self.label_embedding(labels)

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the estimate (B, outputs * C, H, W).

        Args:
            keys: (B, config.num_dropouts, 2) int32, uniformly random, which decide what is dropped while training: an image's masks depend on its own keys
                only. Without them torch's global generator decides.
            conditions: (B, A) float32, what augmentation did to each image; None says nothing.
        """
        biases = iter(self.time(t, self._condition(x_t, labels, conditions)))
        of_layers = iter(keys.unbind(1)) if keys is not None else repeat(None)

        def run(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            given = (hidden, next(biases), next(of_layers))
            return recomputed(block, *given) if self.config.checkpointing and torch.is_grad_enabled() else block(*given)

        def resample(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            return run(module, hidden) if isinstance(module, ResidualBlock) else module(hidden)

        hidden = self.conv_in(x_t)
        skips = [hidden]
        for level in _levels(self.down):
            for block, attention in level.stages():
                hidden = attention(run(block, hidden))
                skips.append(hidden)
            if not isinstance(level.resample, nn.Identity):
                hidden = resample(level.resample, hidden)
                skips.append(hidden)
        hidden = run(self.mid_2, self.mid_attention(run(self.mid_1, hidden)))
        for level in _levels(self.up):
            for block, attention in level.stages():
                hidden = attention(run(block, torch.cat([hidden, skips.pop()], dim=1)))
            hidden = resample(level.resample, hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


def _levels(modules: nn.ModuleList) -> list[Level]:
    return [module for module in modules if isinstance(module, Level)]


def recomputed(block: nn.Module, *given: torch.Tensor | None) -> torch.Tensor:
    """Returns what a block gives; its activations are not kept for the backward pass, but computed again there (Chen et al. 2016)."""
    # Without keys the masks come from torch's generator, whose state has to be the same again.
    return checkpoint(block, *given, use_reentrant=False, preserve_rng_state=given[-1] is None)
