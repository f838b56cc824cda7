"""The MLflow run of a sweep, whose children are the runs of its trials."""

import json
from contextlib import suppress

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.markup import escape

from components.charts import Column, save_parallel_coordinates
from components.scratch import scratch
from components.storage import Location
from pipeline.context import Reporter
from pipeline.errors import RegistryError
from pipeline.sweeping.results import RESULT_FILE, SweepResult, to_csv
from pipeline.tracking import Tracking, git_commit, public_uri

RUN_FILE, KIND_TAG, FOLDER = "mlflow_run.json", "ddpm.kind", "sweep"
TABLE, PICTURE = "trials.csv", "parallel_coordinates.png"


class _Address(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    run_id: str


class ParentRun:
    """The same MLflow run each time a sweep is called; ended with the block.

    Attributes:
        run_id: of the run.
    """

    def __init__(self, experiment: str, name: str, folder: Location, tracking: Tracking, reporter: Reporter) -> None:
        self._folder, self._tracking, self._reporter = folder, tracking, reporter
        self.run_id = tracking.open_run(experiment, name, self._known())
        address = _Address(uri=public_uri(tracking.uri), run_id=self.run_id)
        (folder / RUN_FILE).write_text(address.model_dump_json() + "\n")
        tracking.tag_run(self.run_id, {KIND_TAG: "sweep", "git.commit": git_commit(), "ddpm.folder": str(folder)})

    def _known(self) -> str | None:
        with suppress(OSError, ValidationError):
            address = _Address.model_validate_json((self._folder / RUN_FILE).read_text())
            return address.run_id if address.uri == public_uri(self._tracking.uri) else None
        return None

    def show(self, result: SweepResult) -> None:
        """Writes the table and the picture beside the sweep's records, and gives them to MLflow."""
        text = result.model_dump_json(indent=2) + "\n"
        if self._is_shown(text):
            return
        with self._reporter.part("sending the sweep to MLflow"), scratch("artifacts") as staging:
            (staging / RESULT_FILE).write_text(text, encoding="utf-8")
            (staging / TABLE).write_text(to_csv(result), encoding="utf-8")
            save_parallel_coordinates(staging / PICTURE, columns_of(result), best=result.best)
            self._tracking.log_files(self.run_id, Location.of(staging), FOLDER)
            self._tracking.log_picture(self.run_id, staging / PICTURE, key="sweep", step=0)
            self._describe(result)
            for name in (TABLE, PICTURE, RESULT_FILE):  # the last says that the others are there
                (self._folder / name).write_bytes((staging / name).read_bytes())

    def _is_shown(self, text: str) -> bool:
        with suppress(OSError):
            return (self._folder / RESULT_FILE).read_text() == text and self._tracking.has_files(self.run_id, FOLDER, [RESULT_FILE, TABLE, PICTURE])
        return False

    def _describe(self, result: SweepResult) -> None:
        best = result.winner
        if best is None:
            return
        settings = {f"best.{key}": json.dumps(value) if isinstance(value, list) else str(value) for key, value in best.settings.items()}
        # A setting is written once, and a sweep of more trials or hours may find a better one: then the tags say which.
        tags = settings | {"best.run": best.run, "best.value": repr(best.value), "sweep.metric": result.metric, "sweep.trials": str(len(result.trials))}
        self._tracking.describe_run(self.run_id, settings, tags)

    def __enter__(self) -> "ParentRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        try:
            self._tracking.close_run(self.run_id, status)
        except RegistryError as failure:  # the same command closes it
            self._reporter.line(f"  [yellow]warning[/] {escape(str(failure))}")


def columns_of(result: SweepResult) -> list[Column]:
    """Returns what the picture shows of each trial: its settings, steps and number."""
    keys = list(dict.fromkeys(key for trial in result.trials for key in trial.settings))
    settings = [Column(key, tuple(_shown(trial.settings.get(key)) for trial in result.trials)) for key in keys]
    numbers = [
        Column("steps", tuple(float(trial.steps) for trial in result.trials)),
        Column(result.decides, tuple(trial.decided_by for trial in result.trials)),
    ]
    return [*settings, *numbers, *([Column(result.metric, tuple(trial.value for trial in result.trials))] if result.metric != result.decides else [])]


def _shown(value: object) -> float | str | None:
    """Returns a value as an axis has it: numbers in their places, all else as names."""
    if value is None or isinstance(value, str):
        return value
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else json.dumps(value)
