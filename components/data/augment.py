"""Augmentation: what is done to an image before it is trained on, drawn for each row, and done on the device.

A row's numbers are A = 6: mirrored (0 or 1), cos(angle) - 1, sin(angle), the shifts to the right and down as shares of the sides, and the power of 2 by
which it is enlarged. All 0 is the image as it is. They are also what a network may be told of it (EDM appendix F.2).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

NUMBERS = 6


@dataclass(frozen=True)
class Augmentation:
    """How images are changed.

    Attributes:
        probability: of each of rotation, translation and scaling.
        rotation: largest angle, degrees.
        translation: largest shift, a share of the sides.
        scaling: largest power of 2.
        crop_jitter: largest shift of every image, whole pixels.
        size: height and width of the images, pixels.
    """

    probability: float = 0.12
    rotation: float = 0.0
    translation: float = 0.0
    scaling: float = 0.0
    crop_jitter: int = 0
    size: tuple[int, int] = (1, 1)

    def draw(self, draw: np.random.Generator, count: int) -> np.ndarray:
        """Returns the numbers (count, 6), float32, of as many rows, mirrored 0; what is off takes its draws too, so that the others stay as they are."""
        chosen = draw.random((count, 3)) < self.probability
        uniform = draw.uniform(-1.0, 1.0, (count, 4))
        jitter = draw.integers(-self.crop_jitter, self.crop_jitter, (count, 2), endpoint=True)
        angle = np.radians(self.rotation) * uniform[:, 0] * chosen[:, 0]
        height, width = self.size
        shift = self.translation * uniform[:, 1:3] * chosen[:, 1:2] + jitter / (width, height)
        scale = self.scaling * uniform[:, 3] * chosen[:, 2]
        return np.column_stack([np.zeros(count), np.cos(angle) - 1, np.sin(angle), shift, scale]).astype(np.float32)


def augmented(x_0: "torch.Tensor", numbers: "torch.Tensor") -> "torch.Tensor":
    """Returns images turned, shifted and enlarged about their middle, bilinearly, with reflections where nothing was; mirrors are not made here.

    Args:
        x_0: (B, C, H, W) float32.
        numbers: (B, 6) float32.
    """
    import torch
    from torch.nn import functional as F

    height, width = x_0.shape[2:]
    cosine, sine, right, down = numbers[:, 1] + 1, numbers[:, 2], numbers[:, 3], numbers[:, 4]
    shrink = torch.exp2(-numbers[:, 5])
    # Where each pixel comes from, in coordinates from -1 to 1: the shift is undone first, then angle and size.
    rows = [shrink * cosine, shrink * sine * (height / width), -shrink * sine * (width / height), shrink * cosine]
    across = -2 * right * rows[0] - 2 * down * rows[1]
    along = -2 * right * rows[2] - 2 * down * rows[3]
    theta = torch.stack([torch.stack([rows[0], rows[1], across], dim=1), torch.stack([rows[2], rows[3], along], dim=1)], dim=1)
    grid = F.affine_grid(theta, list(x_0.shape), align_corners=False)
    moved = F.grid_sample(x_0, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    untouched = (numbers[:, 1:] == 0).all(dim=1).view(-1, 1, 1, 1)
    return torch.where(untouched, x_0, moved)
