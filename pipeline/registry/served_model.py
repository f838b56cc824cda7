"""The model as MLflow serves it. This file travels inside every registered version, beside a copy of `components`.

It needs torch, numpy, Pillow and MLflow, and nothing of the project that made it.
"""

import importlib
import io
import math
from typing import Any

import mlflow
import numpy as np
import pandas as pd

COMPONENTS = "components"
MAX_IMAGES, BATCH_SIZE = 10_000, 64


class Sampler(mlflow.pyfunc.PythonModel):
    """Draws images; image i has seed `seed + i`, whatever else is asked for."""

    def load_context(self, context: Any) -> None:
        """Rebuilds the denoiser from the checkpoint folder, checksums verified; on a GPU where there is one."""
        import torch

        checkpoint, storage = (importlib.import_module(f"{COMPONENTS}.{name}") for name in ("model.checkpoint", "storage"))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._denoiser = checkpoint.load_denoiser(storage.Location.of(context.artifacts["checkpoint"]), self._device)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:  # pyrefly: ignore[bad-override]
        """Returns one entry per image: PNG bytes, or an array (N, H, W, C) uint8 where format is `array`.

        Args:
            model_input: one row with num_images, and optionally steps (50), seed (0), sampler (`ddim`; or `ancestral`, `dpmpp_2m`, `unipc`)
                and format (`png`; or `array`).

        Raises:
            ValueError: if a value is out of range.
        """
        row = {
            key: value
            for key, value in model_input.to_dict(orient="records")[0].items()
            if value is not None and not (isinstance(value, float) and math.isnan(value))
        }
        count, seed = int(row.get("num_images", 1)), int(row.get("seed", 0))
        form = str(row.get("format", "png"))
        recipe = importlib.import_module(f"{COMPONENTS}.diffusion.recipe").Recipe(str(row.get("sampler", "ddim")), int(row.get("steps", 50)))
        recipe.check(self._denoiser.schedule.num_steps)
        if not 1 <= count <= MAX_IMAGES:
            raise ValueError(f"num_images={count} is out of range; use 1 to {MAX_IMAGES}")
        if form not in ("png", "array"):
            raise ValueError(f"format={form} is unknown; use png or array")
        pixels = self._draw(range(seed, seed + count), recipe)
        return pixels.transpose(0, 2, 3, 1) if form == "array" else [_to_png(image) for image in pixels]

    def _draw(self, seeds: range, recipe: Any) -> np.ndarray:
        sampling = importlib.import_module(f"{COMPONENTS}.diffusion.sampling")
        images = importlib.import_module(f"{COMPONENTS}.data.images")
        model, parts = self._denoiser, []
        for first in range(0, len(seeds), BATCH_SIZE):
            mine = seeds[first : first + BATCH_SIZE]
            labels = model.spec.labels_by_turns(mine)
            x_0 = sampling.sample(model.network, model.schedule, mine, model.spec.shape, recipe, device=self._device, labels=labels)
            parts.append(images.to_pixels(x_0).cpu().numpy())
        return np.concatenate(parts)


def _to_png(pixels: np.ndarray) -> bytes:
    images = importlib.import_module(f"{COMPONENTS}.data.images")
    buffer = io.BytesIO()
    images.to_image(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


mlflow.models.set_model(Sampler())
