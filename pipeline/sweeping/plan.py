"""What a sweep is: settings that all trials share, what each adds, and the steps at which they are compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from components.storage import Location
from pipeline.artifacts import ShardSet
from pipeline.config import RunConfig, digest_of, load_config
from pipeline.errors import ConfigError
from pipeline.sweeping.space import Settings, Space, extremes, to_overrides

Metric = Literal["validation/loss", "validation/distance", "evaluation"]
"""What the best trial is lowest in; `evaluation` is the number of the evaluate stage, of those that trained to the end."""
METRICS: tuple[Metric, ...] = ("validation/loss", "validation/distance", "evaluation")
Search = Literal["random", "optuna"]
FACTOR = 3
"""About one trial in so many goes on from one rung to the next, which has as many times the steps."""
RUNGS = 3
MOST_MEASUREMENTS = 27
"""Of a trial, where the sweep chooses how often it is measured."""


class SweepPlan(BaseModel):
    """A sweep, ready to begin.

    Attributes:
        preset: the preset's file, absolute.
        overrides: settings that all trials share.
        rungs: steps at which trials are compared, the last where they end.
        decides: the metric that trials are stopped by.
        max_hours: of work, all calls together, after which no rung is begun; None for no limit.
        shards: the dataset of all trials.
        parent: MLflow run that those of the trials are children of.
        began: when this call began, seconds since the epoch.
        spent: hours of work before this call.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    preset: str | None
    overrides: tuple[str, ...]
    storage: str
    rungs: tuple[int, ...]
    metric: Metric
    decides: Literal["validation/loss", "validation/distance"]
    search: Search
    max_hours: float | None
    shards: ShardSet
    parent: str
    began: float
    spent: float

    @property
    def folder(self) -> Location:
        """Where the sweep keeps its records."""
        return folder_of(Location.of(self.storage), self.name)

    def run_name(self, trial: int) -> str:
        """Returns what the run of a trial is called."""
        return run_name_of_trial(self.name, trial)

    def config(self, settings: Settings, steps: int) -> RunConfig:
        """Returns the settings of a trial's run up to a step; raises like `load_config`."""
        return trial_config(self.preset, self.overrides, settings, steps)

    def inputs(self, config: RunConfig) -> str:
        """Returns the digest of all that decides what a trial's measurement says."""
        measured = config.train.model_dump(mode="json", include={"validate_images", "validate_samples"})
        return digest_of(self.shards.digest, config.model, config.diffusion, config.train, measured)


def folder_of(storage: Location, name: str) -> Location:
    """Returns where a sweep keeps its records."""
    return storage / "sweeps" / name


def run_name_of_trial(name: str, trial: int) -> str:
    """Returns what the run of a sweep's trial is called."""
    return f"{name}-{trial:03d}"


def trial_config(preset: str | None, overrides: Sequence[str], settings: Settings, steps: int | None = None) -> RunConfig:
    """Returns the settings of a trial; raises like `load_config`."""
    ends = () if steps is None else (f"train.steps={steps}",)
    return load_config(None if preset is None else Path(preset), [*overrides, *to_overrides(settings), *ends])


def check_trials(preset: str | None, overrides: Sequence[str], space: Space, drawn: Sequence[Settings]) -> None:
    """Checks every trial's settings that are known, and that all trials can be compared.

    Raises:
        ConfigError: naming what is wrong.
    """
    first, *others = [trial_config(preset, overrides, settings) for settings in [*extremes(space), *drawn]]
    for config in (first, *others):
        _check_length(config)
        if config.registry.model_name != first.registry.model_name:
            raise ConfigError(
                f"trials would compete as {first.registry.model_name} and {config.registry.model_name}; set registry.model_name, so that they are compared"
            )


def _check_length(config: RunConfig) -> None:
    if config.train.depends_on_steps:
        raise ConfigError(
            "train.lr_schedule=cosine depends on where a run ends, and trials end at several steps; "
            f"set train.decay_steps, such as train.decay_steps={config.train.steps}"
        )
    if config.train.early_stop:
        raise ConfigError(f"train.early_stop={config.train.early_stop} ends trials at steps where they are not compared; use 0")


def measured_by(metric: str, space: Space, config: RunConfig) -> Literal["validation/loss", "validation/distance"]:
    """Returns the metric that trials are stopped by.

    Raises:
        ConfigError: if there are no held-out images or no samples for it, or it says nothing about what is varied.
    """
    if metric not in METRICS:
        raise ConfigError(f"--metric {metric} is unknown; use {', '.join(METRICS[:-1])} or {METRICS[-1]}")
    if not config.data.holdout_fraction and config.data.holdout_split is None:
        raise ConfigError("data.holdout_fraction=0.0 leaves no images to measure trials on; use data.holdout_fraction=0.1")
    if metric == "validation/distance" and not config.train.validate_samples:
        raise ConfigError("--metric validation/distance needs samples; set train.validate_samples, such as train.validate_samples=256")
    if metric != "validation/loss" and config.train.validate_samples:
        return "validation/distance"
    if asked := sorted(key for key in space if key.startswith("diffusion.")):
        raise ConfigError(
            f"{asked[0]} changes what the network is asked, so that held-out losses are not comparable; "
            "use --metric validation/distance train.validate_samples=256, which compares samples"
        )
    return "validation/loss"


def rungs_of(config: RunConfig) -> tuple[tuple[int, ...], int]:
    """Returns the steps at which trials are compared, the last where they end, and how often they are measured.

    Raises:
        ConfigError: if a trial would not be measured where it ends.
    """
    steps, every = config.train.steps, config.train.validate_every
    if every and steps % every:
        raise ConfigError(f"train.validate_every={every} does not measure a trial where it ends, at train.steps={steps}; use a divisor of it")
    if not every:
        every = _divisor(steps)
    first = max(every, steps // FACTOR ** (RUNGS - 1) // every * every)
    return (*(first * FACTOR**index for index in range(RUNGS) if first * FACTOR ** (index + 1) <= steps), steps), every


def _divisor(steps: int) -> int:
    """Returns the steps between measurements, the last of them at the end."""
    first = max(1, steps // FACTOR ** (RUNGS - 1))
    every = max(number for number in range(1, first + 1) if steps % number == 0)
    if steps // every > MOST_MEASUREMENTS:
        round_number = max(RUNGS**2, steps // 9 * 9)
        raise ConfigError(
            f"train.steps={steps} has no divisor at which to compare trials now and then; use train.steps={round_number}, or set train.validate_every to one"
        )
    return every
