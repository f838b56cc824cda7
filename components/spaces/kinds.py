"""The kinds of spaces that there are."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Tag

from .latents import LatentSpace
from .pixels import PixelSpace
from .points import PointSpace
from .space import Space


def _kind(value: Any) -> str:
    return str(value.get("kind", "pixels")) if isinstance(value, dict) else str(getattr(value, "kind", "pixels"))


if TYPE_CHECKING:
    AnySpace = Space
else:
    AnySpace = Annotated[
        Annotated[PixelSpace, Tag("pixels")] | Annotated[PointSpace, Tag("points")] | Annotated[LatentSpace, Tag("latents")],
        Discriminator(_kind),
    ]
