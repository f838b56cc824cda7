"""A small classifier of the labelled training data, whose features measure samples where there are no Inception weights.

It is trained once for a dataset and kept; its digest is part of the metric's name, because two of them never give the same numbers.
"""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..data.images import to_model_range
from ..errors import DataError
from ..model.checkpoint import read_weights, sha256_of
from ..streams import Purpose, stream

WEIGHTS, RECORD = "classifier.safetensors", "classifier.json"
RECIPE = "v1"
FEATURES = 128
BATCH_SIZE = 128
MIN_IMAGES_SEEN, MAX_EPOCHS, MIN_EPOCHS = 60_000, 30, 3


class Classifier(nn.Module):
    """Three convolutions at full, half and quarter size, pooled to 128 features, and a linear layer to the classes."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        widths = (channels, 32, 64, FEATURES)
        self.convs = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, 128) features of images in -1..1."""
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.silu(norm(conv(F.avg_pool2d(x, 2) if index and min(x.shape[2:]) > 1 else x)))
        return x.mean(dim=(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


class ClassifierExtractor:
    """Features of a trained `Classifier`.

    Raises:
        DataError: if the folder holds none.
    """

    preprocessing = "uint8 / 127.5 - 1"

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no classifier ({error}); delete it and run evaluate again") from error
        self.digest = sha256_of(folder / WEIGHTS)
        self.name = f"fd_clf_{self.digest[:8]}"
        self.accuracy = float(record["accuracy"])
        self._device = device
        self._network = Classifier(record["channels"], record["num_classes"])
        self._network.load_state_dict(read_weights(folder / WEIGHTS))
        self._network = self._network.to(device).eval()

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        return self._network.features(to_model_range(pixels.to(self._device))).cpu().numpy()


def train_classifier(pixels: np.ndarray, classes: np.ndarray, folder: Path) -> None:
    """Trains a classifier and writes it to a folder, the record last.

    A tenth of the rows is held out to measure its accuracy. Adam at 2e-3 with a cosine decay; 60,000 images seen, at least 3 epochs and
    at most 30.

    Args:
        pixels: (N, C, H, W) uint8.
        classes: (N,) int64, 0..K-1.
    """
    from safetensors.torch import save_file

    order = stream(Purpose.CLASSIFIER, 0).permutation(len(pixels))
    held_out, train = np.split(order, [len(order) // 10])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(pixels.shape[1], int(classes.max()) + 1)
    epochs = int(np.clip(MIN_IMAGES_SEEN // max(1, len(train)), MIN_EPOCHS, MAX_EPOCHS))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(train) // BATCH_SIZE))
    for epoch in range(1, epochs + 1):
        rows = stream(Purpose.CLASSIFIER, 0, epoch).permutation(train)
        for first in range(0, len(rows), BATCH_SIZE):
            _step(network, optimizer, pixels, classes, rows[first : first + BATCH_SIZE])
            decay.step()
    accuracy = _accuracy(network, pixels, classes, held_out)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / WEIGHTS)
    record = {"recipe": RECIPE, "channels": pixels.shape[1], "num_classes": int(classes.max()) + 1, "accuracy": accuracy}
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")


def _step(network: Classifier, optimizer: torch.optim.Optimizer, pixels: np.ndarray, classes: np.ndarray, rows: np.ndarray) -> None:
    loss = F.cross_entropy(network(to_model_range(torch.from_numpy(pixels[rows]))), torch.from_numpy(classes[rows]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.inference_mode()
def _accuracy(network: Classifier, pixels: np.ndarray, classes: np.ndarray, rows: np.ndarray) -> float:
    hits = [
        (network(to_model_range(torch.from_numpy(pixels[part]))).argmax(1).numpy() == classes[part]).mean() * len(part)
        for part in np.array_split(rows, max(1, len(rows) // 512))
        if len(part)
    ]
    return float(sum(hits) / max(1, len(rows)))
