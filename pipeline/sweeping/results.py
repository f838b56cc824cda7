"""What became of a sweep's trials, and which of them is the best."""

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from components.storage import Location
from pipeline.artifacts import Evaluation
from pipeline.sweeping.plan import Metric, SweepPlan
from pipeline.sweeping.space import Value
from pipeline.sweeping.trial import Rung, read_rung, read_trials

RESULT_FILE = "sweep.json"
State = Literal["finished", "stopped", "failed", "out of time", "not started"]
"""`stopped` by ASHA, because others were better after as many steps."""


class TrialResult(BaseModel):
    """A trial where it ended.

    Attributes:
        run: name of its run.
        value: of the sweep's metric after so many steps; None where there is none.
        decided_by: the held-out number that it was compared by at its last rung.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trial: int
    run: str
    settings: dict[str, Value]
    steps: int
    value: float | None
    decided_by: float | None
    state: State
    failure: str | None
    mlflow_run_id: str | None


class SweepResult(BaseModel):
    """A sweep's table.

    Attributes:
        inputs: digest of all that decides the table.
        metric: name of the number that `value` is.
        best: number of the best trial; None where none was measured.
        limit: a line that says where --max-hours ended it, None where all was done.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    inputs: str
    metric: Metric
    decides: str
    rungs: tuple[int, ...]
    trials: tuple[TrialResult, ...]
    best: int | None
    limit: str | None

    @property
    def winner(self) -> TrialResult | None:
        """The best trial."""
        return None if self.best is None else self.trials[self.best]


def trials_of(plan: SweepPlan, out_of_time: Collection[int]) -> list[TrialResult]:
    """Returns where the trials of a sweep ended, before any is evaluated."""
    return [_result(plan, number, settings, number in out_of_time) for number, settings in enumerate(read_trials(plan.folder))]


def _result(plan: SweepPlan, number: int, settings: Mapping[str, Value], is_cut: bool) -> TrialResult:
    rungs = [rung for steps in plan.rungs if (rung := read_rung(plan.folder, plan.run_name(number), steps)) is not None and _is_of(rung, plan, settings)]
    last = rungs[-1] if rungs else None
    value = None if last is None else last.values.get(plan.decides)
    return TrialResult(
        trial=number,
        run=plan.run_name(number),
        settings=dict(settings),
        steps=0 if last is None else last.steps,
        value=None if plan.metric == "evaluation" else value,
        decided_by=value,
        state=_state(plan, last, value, is_cut),
        failure=None if last is None else last.failure,
        mlflow_run_id=None if last is None else last.run_id,
    )


def _is_of(rung: Rung, plan: SweepPlan, settings: Mapping[str, Value]) -> bool:
    """Tells whether a rung is one of these settings, not of a sweep before that had the same name."""
    return not rung.inputs or rung.inputs == plan.inputs(plan.config(settings, rung.steps))


def _state(plan: SweepPlan, last: Rung | None, value: float | None, is_cut: bool) -> State:
    if last is None:
        return "not started"
    if value is None:
        return "failed"
    if last.steps == plan.rungs[-1]:
        return "finished"
    return "out of time" if is_cut else "stopped"


def read_result(folder: Location, inputs: str) -> SweepResult | None:
    """Returns the table that a sweep of these inputs has, None where it is still to be made."""
    with suppress(OSError, ValidationError):
        result = SweepResult.model_validate_json((folder / RESULT_FILE).read_text())
        return result if result.inputs == inputs else None
    return None


def furthest(trials: Sequence[TrialResult]) -> list[TrialResult]:
    """Returns the trials that were trained for longest, and can be compared: a number of fewer steps says something else."""
    measured = [trial for trial in trials if trial.decided_by is not None]
    most = max((trial.steps for trial in measured), default=0)
    return [trial for trial in measured if trial.steps == most]


def evaluated(trial: TrialResult, evaluation: Evaluation) -> TrialResult:
    """Returns a trial with the number of its evaluation."""
    return trial.model_copy(update={"value": evaluation.metric.value})


def best_of(trials: Sequence[TrialResult]) -> int | None:
    """Returns the number of the best trial: the lowest of those that were trained for longest."""
    standing = [(trial.value, trial.trial) for trial in furthest(trials) if trial.value is not None and math.isfinite(trial.value)]
    return min(standing)[1] if standing else None


def to_csv(result: SweepResult) -> str:
    """Returns the table of a sweep, a line for each trial."""
    keys = list(dict.fromkeys(key for trial in result.trials for key in trial.settings))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "run", *keys, "steps", result.decides, *([result.metric] if result.metric != result.decides else []), "state", "best"])
    for trial in result.trials:
        values = [trial.decided_by, *([trial.value] if result.metric != result.decides else [])]
        writer.writerow([trial.trial, trial.run, *(trial.settings.get(key) for key in keys), trial.steps, *values, trial.state, trial.trial == result.best])
    return out.getvalue()
