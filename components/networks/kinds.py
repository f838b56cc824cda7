"""The kinds of networks that there are: those of this folder."""

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Discriminator, Tag

from .config import NetworkConfig

_NO_KINDS = ("config", "kinds")
DEFAULT = "unet"
"""What a model is whose settings name no kind, as none did while there was one."""


def _found() -> dict[str, type[NetworkConfig]]:
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name not in _NO_KINDS)
    return {name: import_module(f".{name}", __package__).Config for name in names}


KINDS: Mapping[str, type[NetworkConfig]] = _found()
"""Settings by the name of their kind, which is that of the module or folder."""


def _kind(value: Any) -> str:
    return str(value.get("kind", DEFAULT)) if isinstance(value, dict) else str(getattr(value, "kind", DEFAULT))


if TYPE_CHECKING:
    AnyNetworkConfig = NetworkConfig
else:
    AnyNetworkConfig = Annotated[
        Union[tuple(Annotated[config, Tag(kind)] for kind, config in KINDS.items())],  # noqa: UP007
        Discriminator(_kind, custom_error_type="unknown_kind", custom_error_message=f"kind is unknown; use {' or '.join(sorted(KINDS))}"),
    ]
