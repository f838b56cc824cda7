"""A small classifier of the labelled training data, whose features measure samples where there are no Inception weights.

It is trained once for a dataset and kept; its digest is part of the metric's name, because two of them never give the same numbers.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..errors import DataError
from ..model.checkpoint import read_weights
from ..model.manifest import sha256_of
from ..spaces.pixels import to_model_range
from ..streams import Purpose, stream
from .features import full_precision

WEIGHTS, RECORD = "classifier.safetensors", "classifier.json"
RECIPE = "v2"
WIDTH, FEATURES = 32, 192
BATCH_SIZE = 128
IMAGES_SEEN, MAX_EPOCHS, MIN_EPOCHS = 120_000, 30, 4
LEARNING_RATE, WEIGHT_DECAY, SMOOTHING = 5e-3, 0.05, 0.1
MOST_SHIFT = 2
MOST_SIDE = 64
"""Larger images are averaged down to at most so many pixels a side: their layout tells classes apart, and the work stays bounded."""


class Classifier(nn.Module):
    """Convolutions at full, half, quarter and eighth size, pooled to 192 features, and a linear layer to the classes."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = _convolution(channels, WIDTH)
        self.at_half = _convolution(WIDTH, 2 * WIDTH)
        self.at_quarter = _convolution(2 * WIDTH, 4 * WIDTH)
        self.residual = _convolution(4 * WIDTH, 4 * WIDTH)
        self.at_eighth = _convolution(4 * WIDTH, FEATURES)
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, 192) features of images in -1..1."""
        while min(x.shape[2:]) > MOST_SIDE:
            x = F.avg_pool2d(x, 2)
        x = self.at_half(_smaller(self.stem(x)))
        x = self.at_quarter(_smaller(x))
        x = x + self.residual(x)
        return self.at_eighth(_smaller(x)).mean(dim=(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def _convolution(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.SiLU())


def _smaller(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 2) if min(x.shape[2:]) > 1 else x


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
        with full_precision():
            return self._network.features(to_model_range(pixels.to(self._device))).cpu().numpy()


def train_classifier(
    pixels: np.ndarray, classes: np.ndarray, folder: Path, report: Callable[[float], None] = lambda share: None, device: torch.device | str = "cpu"
) -> None:
    """Trains a classifier and writes it to a folder, the record last.

    A tenth of the rows is held out to measure its accuracy. AdamW with one cycle of the learning rate (Smith & Topin 2019), smoothed labels, and images
    shifted by up to two pixels; 120,000 images seen, at least 4 epochs and at most 30.

    Args:
        pixels: (N, C, H, W) uint8.
        classes: (N,) int64, 0..K-1.
        tell: is given the share that is done, 0 to 1, after every step.
        device: where it is trained; rows, shifts and first weights are the same everywhere.
    """
    from safetensors.torch import save_file

    order = stream(Purpose.CLASSIFIER, 0).permutation(len(pixels))
    held_out, train = np.split(order, [len(order) // 10])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(pixels.shape[1], int(classes.max()) + 1).to(device)
    epochs = _epochs(len(train))
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * max(1, len(train) // BATCH_SIZE)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    for epoch in range(1, epochs + 1):
        draw = stream(Purpose.CLASSIFIER, 0, epoch)
        for rows in np.array_split(draw.permutation(train), max(1, len(train) // BATCH_SIZE)):
            x, wanted = torch.from_numpy(pixels[rows]).to(device), torch.from_numpy(classes[rows]).to(device)
            _step(network, optimizer, _shifted(to_model_range(x), draw), wanted)
            cycle.step()
            report(cycle.last_epoch / steps)
    network.eval()
    accuracy = _accuracy(network, pixels, classes, held_out, device)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.cpu().state_dict(), folder / WEIGHTS)
    record = {"recipe": RECIPE, "channels": pixels.shape[1], "num_classes": int(classes.max()) + 1, "accuracy": accuracy}
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")


def images_seen(rows: int) -> int:
    """Returns how many images a classifier sees while it is trained on so many rows."""
    train = rows - rows // 10
    return _epochs(train) * train


def _epochs(rows: int) -> int:
    return int(np.clip(IMAGES_SEEN // max(1, rows), MIN_EPOCHS, MAX_EPOCHS))


def _shifted(x: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
    """Returns images moved together by a few pixels, mirrored at their edges; by none where they are tiny."""
    most = min(MOST_SHIFT, x.shape[2] // 8)
    down, right = draw.integers(0, 2 * most + 1, 2)
    return F.pad(x, (most, most, most, most), mode="reflect")[:, :, down : down + x.shape[2], right : right + x.shape[3]]


def _step(network: Classifier, optimizer: torch.optim.Optimizer, x: torch.Tensor, classes: torch.Tensor) -> None:
    loss = F.cross_entropy(network(x), classes, label_smoothing=SMOOTHING)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.inference_mode()
def _accuracy(network: Classifier, pixels: np.ndarray, classes: np.ndarray, rows: np.ndarray, device: torch.device | str) -> float:
    hits = [
        (network(to_model_range(torch.from_numpy(pixels[part]).to(device))).argmax(1).cpu().numpy() == classes[part]).mean() * len(part)
        for part in np.array_split(rows, max(1, len(rows) // 512))
        if len(part)
    ]
    return float(sum(hits) / max(1, len(rows)))
