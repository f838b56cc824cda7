"""The Diffusion Transformer (DiT)."""

from .config import DiTConfig as Config

__all__ = ["Config"]
