"""Numbers of a run for Prometheus, through the endpoint that every node of Ray has: they are there while the run's process is connected to Ray."""

import sys
from typing import Any

GAUGES = {
    "ddpm_training_step": "Optimiser steps done.",
    "ddpm_training_steps": "Optimiser steps at which the training ends.",
    "ddpm_training_loss": "Mean training loss at the last point of the curve.",
    "ddpm_validation_loss": "Mean loss on held-out rows at the last measurement.",
    "ddpm_images_per_second": "Images trained on each second, all workers together.",
    "ddpm_restarts": "Starts of the workers after the first.",
    "ddpm_checkpoint_timestamp_seconds": "When the last checkpoint was written, seconds since 1970.",
    "ddpm_quarantined_files": "Files of the run's dataset that are quarantined.",
    "ddpm_dataset_rows": "Rows of the run's dataset.",
    "ddpm_candidate_distance": "Number by which the candidate was measured; the label `metric` is its unit's name.",
    "ddpm_champion_distance": "The champion's number, where one stands; the label `metric` is its unit's name.",
}
_LABELS = ("run", "model", "metric")


class RunMetrics:
    """The gauges of one run. Without Ray they go nowhere."""

    def __init__(self, run: str, model: str = "") -> None:
        self._labels = {"run": run, "model": model, "metric": ""}
        self._gauges: dict[str, Any] = {}

    def set(self, name: str, value: float | None, metric: str = "") -> None:
        """Sets a gauge of GAUGES; None leaves it as it is.

        Args:
            metric: name of the unit of a distance.
        """
        if value is None or not _is_connected():
            return
        if name not in self._gauges:
            from ray.util.metrics import Gauge

            self._gauges[name] = Gauge(name, description=GAUGES[name], tag_keys=_LABELS)
        self._gauges[name].set(float(value), tags={**self._labels, "metric": metric})


def _is_connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(getattr(ray, "is_initialized", lambda: False)())
