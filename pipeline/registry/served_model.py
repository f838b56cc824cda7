"""The model as MLflow serves it. This file travels inside every registered version, beside a copy of the modules of `components` that it needs.

It needs torch, numpy, pandas, Pillow, pydantic and MLflow, and nothing else of the project that made it.
"""

import io
from collections.abc import Mapping
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

# `components` is imported within functions: MLflow runs this file where it logs it too, before the copy is on the path.

PNG, ARRAY = "png", "array"


def formats(noun: str) -> tuple[str, ...]:
    """Returns in which formats rows of a space may be had, the usual one first."""
    return (PNG, ARRAY) if noun == "image" else (ARRAY,)


def parameters(num_steps: int, noun: str = "image") -> list[tuple[str, str, Any]]:
    """Returns what may be asked for, of a model of num_steps (T) noise levels: name, MLflow's type, default."""
    return [
        ("num_images", "long", 1),
        ("steps", "long", min(50, num_steps)),
        ("seed", "long", 0),
        ("sampler", "string", "ddim"),
        ("label", "string", None),
        ("guidance", "double", 1.0),
        ("format", "string", formats(noun)[0]),
    ]


class InvalidRequestError(MlflowException, ValueError):
    """Raised for what cannot be drawn; MLflow's server answers it with status 400 and the message, without a stack trace."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)


class Sampler(mlflow.pyfunc.PythonModel):
    """Draws images; image i of a request has seed `seed + i`, whatever else is asked for."""

    def load_context(self, context: Any) -> None:
        """Rebuilds the denoiser from the checkpoint folder, checksums verified; on a GPU, and in bfloat16, where there is one that has it."""
        import torch

        from components.diffusion.precision import prepared, resolve_precision
        from components.model.checkpoint import load_denoiser
        from components.storage import Location

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._denoiser = load_denoiser(Location.of(context.artifacts["checkpoint"]), device)
        self._precision = resolve_precision("auto", device)
        self._network = prepared(self._denoiser.network, self._precision, device)
        self._defaults = {name: default for name, _, default in parameters(self._denoiser.spec.diffusion.most_steps, self._denoiser.spec.space.noun)}

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:  # pyrefly: ignore[bad-override]
        """Returns one entry per image, those of the first row first: PNG bytes, or an array (N, H, W, C) uint8 where format is `array`; of points (N, 2).

        Args:
            model_input: each row is a request of its own; a column that is absent or empty is what `params` say. No row at all is one request.
            params: what rows leave open.

        Raises:
            InvalidRequestError: a ValueError, if a value is unknown, out of range, or means nothing to this model.
        """
        from components.model.request import draw

        given = self._defaults | {name: value for name, value in (params or {}).items() if value is not None}
        rows = [given | _stated(row) for row in model_input.to_dict(orient="records")] or [given]
        requests = [self._request(row, f"row {index}: " if len(rows) > 1 else "") for index, row in enumerate(rows)]
        form = _format(rows, self._denoiser.spec.space.noun)
        _check_total(requests)
        drawn = np.concatenate([draw(self._denoiser, request, self._network) for request in requests])
        if form == ARRAY:
            return drawn.transpose(0, 2, 3, 1) if drawn.ndim == 4 else drawn
        return [_to_png(image) for image in drawn]

    def _request(self, row: Mapping[str, Any], place: str) -> Any:
        from components.diffusion.recipe import Recipe
        from components.model.request import Request

        try:
            sampler: Any = str(row["sampler"])
            recipe = Recipe(sampler, _integer("steps", row["steps"]), guidance=_number("guidance", row["guidance"]), precision=self._precision)
            request = Request(recipe, _integer("num_images", row["num_images"]), _integer("seed", row["seed"]), _label(row["label"]))
            request.check(self._denoiser)
        except ValueError as error:
            raise InvalidRequestError(f"{place}{error}") from None
        return request


def _stated(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns a row without what pandas fills in where other rows have a value and this one has none."""
    return {name: value for name, value in row.items() if not (pd.api.types.is_scalar(value) and pd.isna(value))}


def _format(rows: list[dict[str, Any]], noun: str) -> str:
    form = str(rows[0]["format"])
    if form not in formats(noun):
        wrong = "is unknown" if form not in (PNG, ARRAY) else f"means nothing to {noun}s"
        raise InvalidRequestError(f"format={form} {wrong}; use {' or '.join(formats(noun))}")
    if others := [row["format"] for row in rows if row["format"] != form]:
        raise InvalidRequestError(f"format={others[0]} differs from the first row's {form}; ask for one format in one call")
    return form


def _check_total(requests: list[Any]) -> None:
    from components.model.request import MAX_IMAGES

    total = sum(request.num_images for request in requests)
    if total > MAX_IMAGES:
        raise InvalidRequestError(f"num_images={total} of all rows is out of range; use up to {MAX_IMAGES} in one call")


def _integer(name: str, value: Any) -> int:
    # A column of whole numbers in which one is missing reaches a model as floats, which are exact up to 2**53.
    whole = isinstance(value, int | np.integer) or (isinstance(value, float | np.floating) and float(value).is_integer() and abs(value) <= 2**53)
    if isinstance(value, bool | np.bool_) or not whole:
        raise ValueError(f"{name}={value} is no exact whole number; use one such as {name}=1")
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise ValueError(f"{name}={value} is no number; use one such as {name}=1.5")
    return float(value)


def _label(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(_integer("label", value))


def _to_png(pixels: np.ndarray) -> bytes:
    from components.data.images import to_image

    buffer = io.BytesIO()
    to_image(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


mlflow.models.set_model(Sampler())
