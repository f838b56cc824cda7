"""The settings of scheduled retraining."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

_NO_RESULT: dict[str, JsonValue] = {"result": False}

Policy = Literal["scratch", "champion", "champion_ema"]


class RetrainConfig(BaseModel):
    """When `ddpm retrain` trains, from what, and whom it tells."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    start: Policy = "champion_ema"
    """Weights that training starts from: fresh ones, the champion's last ones, or their average; without a champion always fresh ones."""
    steps: int | None = Field(None, ge=1)
    """Optimiser steps of a training that starts from the champion; by default `train.steps`."""
    min_new_images: int = Field(1, ge=0, json_schema_extra=_NO_RESULT)
    """New images below which an attempt is skipped, unless the settings changed; 0 retrains for removed ones too."""
    max_quarantined_fraction: float = Field(0.2, ge=0.0, le=1.0, json_schema_extra=_NO_RESULT)
    """Share of new files that may be quarantined."""
    max_label_drift: float = Field(0.3, ge=0.0, le=1.0, json_schema_extra=_NO_RESULT)
    """Largest total variation distance between the labels of new images and those before."""
    max_brightness_drift: float = Field(0.15, ge=0.0, le=1.0, json_schema_extra=_NO_RESULT)
    """Largest Wasserstein distance between mean grey values (0 to 1) of new images and those before."""
    max_hours: float | None = Field(None, gt=0.0, json_schema_extra=_NO_RESULT)
    """Device-hours that an attempt may plan, workers times hours; none by default."""
    keep_days: float | None = Field(None, ge=0.0, json_schema_extra=_NO_RESULT)
    """Days for which what nothing needs any more is kept; older is removed after each attempt, as `ddpm prune` does. Null removes nothing."""
    keep_versions: int | None = Field(None, ge=1, json_schema_extra=_NO_RESULT)
    """With `keep_days`: newest versions of the model to keep, beside those that have an alias; null for all."""
    when_busy: Literal["leave", "wait"] = Field("leave", json_schema_extra=_NO_RESULT)
    """What a second attempt does while another of the same name runs."""
    alert_after: int = Field(3, ge=1, json_schema_extra=_NO_RESULT)
    """Failures in a row that raise an alert."""
    webhook: str | None = Field(None, json_schema_extra=_NO_RESULT)
    """Address that every attempt's summary is sent to, signed by DDPM_WEBHOOK_SECRET where that is set."""

    @model_validator(mode="after")
    def _check_retention(self) -> Self:
        if self.keep_versions is not None and self.keep_days is None:
            raise ValueError(f"keep_versions={self.keep_versions} needs keep_days, the days for which the rest is kept, such as keep_days=30")
        return self
