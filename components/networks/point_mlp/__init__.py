"""A residual perceptron, for rows of a few numbers such as points."""

from .config import PointMLPConfig as Config

__all__ = ["Config"]
