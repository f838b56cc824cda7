"""A trial at its rungs: an ordinary run is called with more and more steps, and goes on where it was, or is skipped where that was done before."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from components.storage import Location
from pipeline.artifacts import TrainedModel
from pipeline.errors import ConfigError, TrainingError
from pipeline.run import FixedInputs, run
from pipeline.sweeping.plan import SweepPlan
from pipeline.sweeping.space import Settings, Value
from pipeline.training.metrics_log import read_metrics

TRIALS, PARENT_TAG, SWEEP_TAG = "trials.json", "mlflow.parentRunId", "ddpm.sweep"
_LIST = TypeAdapter(list[dict[str, Value]])


class Rung(BaseModel):
    """What a trial was like after so many steps.

    Attributes:
        inputs: digest of all that decides the numbers.
        values: what was measured on held-out images, by metric; empty where nothing finite was.
        run_id: of the trial's MLflow run.
        failure: why the trial cannot go on; None where it can.
        spent: hours of the sweep's work up to here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trial: int
    steps: int
    inputs: str
    values: dict[str, float]
    run_id: str | None
    failure: str | None
    spent: float


class Runner:
    """Trains trials, in a process of its own, which is no part of what Ray Tune has for a trial: the training workers ask for their own places."""

    def __init__(self, plan: str, environment: Mapping[str, str], folder: str) -> None:
        """Prepares it.

        Args:
            plan: a SweepPlan, as JSON.
            environment: of the command, which on a cluster this process does not inherit.
            folder: the command's, to which relative paths of its settings belong.
        """
        os.environ.update(environment)
        os.chdir(folder)
        self._plan = SweepPlan.model_validate_json(plan)

    def number(self, settings: Settings) -> int:
        """Returns the number of a trial that a searcher suggests, the next one that is free."""
        trials = read_trials(self._plan.folder)
        write_trials(self._plan.folder, [*trials, settings])
        return len(trials)

    def train(self, trial: int, steps: int) -> str | None:
        """Trains a trial up to a step, and returns its Rung, as JSON; None where there is no time left to begin with it."""
        plan, settings = self._plan, read_trials(self._plan.folder)[trial]
        try:
            config = plan.config(settings, steps)
        except ConfigError as error:  # a searcher's suggestion; all that was drawn beforehand was checked
            return self._write(trial, steps, "", {}, None, str(error))
        inputs = plan.inputs(config)
        if (known := read_rung(plan.folder, plan.run_name(trial), steps)) is not None and known.inputs == inputs:
            return known.model_dump_json()
        if is_over(plan):
            return None
        tags = {PARENT_TAG: plan.parent, SWEEP_TAG: plan.name}
        try:
            trained = run(config, plan.run_name(trial), until="train", given=FixedInputs(plan.shards, None), tags=tags)["train"].receipt
        except TrainingError as error:
            return self._write(trial, steps, inputs, {}, None, str(error))
        assert isinstance(trained, TrainedModel)
        return self._write(trial, steps, inputs, _measured(trained), trained.mlflow_run_id, None)

    def _write(self, trial: int, steps: int, inputs: str, values: Mapping[str, float], run_id: str | None, failure: str | None) -> str:
        plan = self._plan
        spent = plan.spent + (time.time() - plan.began) / 3600
        rung = Rung(trial=trial, steps=steps, inputs=inputs, values=dict(values), run_id=run_id, failure=failure, spent=spent)
        (plan.folder / plan.run_name(trial) / _file(steps)).write_text(rung.model_dump_json(indent=2) + "\n")
        return rung.model_dump_json()


def _measured(trained: TrainedModel) -> dict[str, float]:
    """Returns what held-out images said of a training where it ended."""
    at_end = [line.metrics for line in read_metrics(Location.of(trained.folder)) if line.step == trained.steps]
    return {key: value for metrics in at_end for key, value in metrics.items() if key in ("validation/loss", "validation/distance")}


def is_over(plan: SweepPlan) -> bool:
    """Tells whether the sweep's hours are spent, by what its rungs say: the same whenever it is asked."""
    return plan.max_hours is not None and spent_so_far(plan.folder) >= plan.max_hours


def spent_so_far(folder: Location) -> float:
    """Returns the hours of work up to the last rung of a sweep."""
    return max((rung.spent for rung in read_rungs(folder)), default=0.0)


def _file(steps: int) -> str:
    return f"{steps:09d}.json"


def read_rung(folder: Location, run_name: str, steps: int) -> Rung | None:
    """Returns what a trial was like after so many steps, None where that was not measured or cannot be read."""
    with suppress(OSError, ValidationError):
        return Rung.model_validate_json((folder / run_name / _file(steps)).read_text())
    return None


def read_rungs(folder: Location) -> Iterator[Rung]:
    """Yields all rungs of a sweep, trial by trial, in the order of their steps."""
    for trial in sorted(folder.folders()):
        for file in sorted((folder / trial).files()):
            with suppress(OSError, ValidationError):
                yield Rung.model_validate_json((folder / trial / file).read_text())


def read_trials(folder: Location) -> list[dict[str, Value]]:
    """Returns the settings of a sweep's trials."""
    return _LIST.validate_json((folder / TRIALS).read_text())


def write_trials(folder: Location, trials: Sequence[Settings]) -> None:
    """Writes the settings of a sweep's trials."""
    (folder / TRIALS).write_text(_LIST.dump_json([dict(settings) for settings in trials], indent=2).decode() + "\n")
