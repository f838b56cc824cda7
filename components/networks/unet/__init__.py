"""The U-Net of the DDPM paper."""

from .config import UNetConfig as Config

__all__ = ["Config"]
