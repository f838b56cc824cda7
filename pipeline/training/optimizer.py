"""What takes the step: the optimiser, its groups of parameters, its learning rate, and the running averages behind it."""

import fnmatch
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from components.errors import DataError
from components.model.ema import Ema, half_life, power_decay, warmed_up
from components.model.manifest import average_name, power_average_name
from components.model.post_hoc import exponent_of
from pipeline.training.config import TrainConfig
from pipeline.training.muon import Muon, split_matrices


def learning_rate(config: TrainConfig, step: int) -> float:
    """Returns the learning rate of step `step` (0, 1, ...): linear warm-up (DDPM appendix B), then what `train.lr_schedule` says."""
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps)) * _decay(config, step)


def _decay(config: TrainConfig, step: int) -> float:
    if config.lr_schedule == "cosine":
        first, last = config.warmup_steps, config.decay_steps or config.steps
        return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - first) / (last - first))))
    if config.lr_schedule == "inverse_sqrt" and config.decay_steps is not None:
        return 1 / math.sqrt(max(1.0, (step + 1) / config.decay_steps))  # EDM2 Eq. 67
    return 1.0


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Keeps parameters whose names match a pattern from being trained.

    Raises:
        DataError: if a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            parts = sorted({name.partition(".")[0] for name in names})
            raise DataError(f"train.freeze: {pattern!r} matches no parameter; they begin with {', '.join(parts)}, such as {names[0]}")
    for name, parameter in network.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise DataError(f"train.freeze={list(patterns)} leaves nothing to train; name fewer parameters")


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Returns the optimiser of the parameters that are trained; on a GPU it reads its learning rate from the device."""
    on_gpu = next(network.parameters()).is_cuda
    lr = torch.tensor(config.lr, device=next(network.parameters()).device) if on_gpu else config.lr
    groups = parameter_groups(network, config)
    if config.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, fused=True)
        for parameter in parameters_of(sgd) if config.momentum else ():
            # From the beginning, for a first step that is left out would leave its memory as it finds it.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if config.optimizer == "muon":
        embeddings = {module.weight for module in network.modules() if isinstance(module, nn.Embedding)}
        return Muon(split_matrices(groups, embeddings), lr=lr, betas=config.adam_betas, capturable=on_gpu)
    return torch.optim.AdamW(groups, lr=lr, betas=config.adam_betas, fused=True, capturable=on_gpu)


def parameter_groups(network: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Returns the parameters that are trained: all with one weight decay, or in two groups, of which the second has none."""
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    if config.decay_all or not config.weight_decay:
        return [{"params": [parameter for _, parameter in trained], "weight_decay": config.weight_decay}]
    embeddings = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Embedding)}
    spared = [name for name, parameter in trained if parameter.ndim < 2 or name in embeddings]
    groups = [{"params": [parameter for name, parameter in trained if name not in spared], "weight_decay": config.weight_decay}]
    return [group for group in (*groups, {"params": [parameter for name, parameter in trained if name in spared], "weight_decay": 0.0}) if group["params"]]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns the parameters in the order in which the optimiser numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def make_averages(network: nn.Module, config: TrainConfig) -> tuple[Ema, dict[str, Ema]]:
    """Returns the main running average, and the further ones by the name that checkpoints give them."""
    main = partial(warmed_up, config.ema_decay)
    if config.ema_half_life is not None:
        main = partial(half_life, config.ema_half_life, config.global_batch_size, config.ema_ramp_up)
    more = {average_name(decay): Ema(network, partial(warmed_up, decay)) for decay in config.more_ema_decays}
    powers = {power_average_name(width): Ema(network, partial(power_decay, exponent_of(width))) for width in config.ema_widths}
    return Ema(network, main), more | powers
