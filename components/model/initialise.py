"""Weights of one network put into another: what fits, and what does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import DataError

NAMED = 5
"""Tensors that a message names of each kind."""


@dataclass(frozen=True)
class Fit:
    """How given weights fit a network.

    Attributes:
        fitting: names that both have, of one shape.
        missing: names that the network has and the weights lack.
        extra: names that the weights have and the network lacks.
        misshapen: names that both have, with the network's shape and the other.
    """

    fitting: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @classmethod
    def of(cls, network: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> "Fit":
        """Compares names and shapes."""
        both = [name for name in network if name in given]
        return cls(
            tuple(name for name in both if network[name].shape == given[name].shape),
            tuple(name for name in network if name not in given),
            tuple(name for name in given if name not in network),
            tuple((name, tuple(network[name].shape), tuple(given[name].shape)) for name in both if network[name].shape != given[name].shape),
        )

    @property
    def is_whole(self) -> bool:
        """Whether every tensor of both sides has its counterpart."""
        return not (self.missing or self.extra or self.misshapen)

    def __str__(self) -> str:
        shapes = [f"{name} ({list(theirs)}, not {list(ours)})" for name, ours, theirs in self.misshapen]
        parts = ((self.missing, "missing"), (self.extra, "not in the network"), (shapes, "of another shape"))
        return "; ".join(f"{len(names)} {what}: {_some(names)}" for names, what in parts if names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def initialise(network: nn.Module, given: Mapping[str, torch.Tensor], *, strict: bool, where: str) -> Fit:
    """Puts weights into a network, and returns how they fit.

    Args:
        strict: whether all must fit; else those that do are taken, and the rest stays fresh.
        where: the weights in words, for messages.

    Raises:
        DataError: naming what is missing, extra or misshapen, if all must fit; or if nothing fits.
    """
    own = network.state_dict()
    fit = Fit.of(own, given)
    if strict and not fit.is_whole:
        raise DataError(f"train.init_from={where} does not fit the network ({fit}); use the model section it was trained with, or train.init_strict=false")
    if not fit.fitting:
        raise DataError(f"train.init_from={where} has no tensor that fits the network ({fit}); use the model section it was trained with")
    network.load_state_dict({name: given[name] if name in fit.fitting else value for name, value in own.items()})
    return fit
