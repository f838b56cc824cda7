"""The journal of attempts: which is open, what became of the others.

STORAGE/retrain/NAME/attempts/0007/attempt.json  one attempt; open as long as it says no outcome
STORAGE/retrain/NAME/state.json                  failures in a row, and the last call
"""

from pydantic import BaseModel, ConfigDict, ValidationError

from components.errors import DataError
from components.storage import Location
from pipeline.artifacts import ChampionTest, Metric
from pipeline.retraining.summary import Outcome
from pipeline.tracking import ui_link

ATTEMPT_FILE, STATE_FILE = "attempt.json", "state.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Start(_Record):
    """The weights that a training starts from.

    Attributes:
        model: models:/NAME/VERSION that they belong to.
        weights: name of their file in the checkpoint, without its ending.
    """

    model: str
    checkpoint: str
    weights: str
    sha256: str


class Attempt(_Record):
    """One attempt, from the dataset that it trains on to what became of it.

    Attributes:
        settings: digest of all settings that can change its result.
        before: dataset that the last attempt or the champion was trained on; None where there is none.
        outcome: None while it is open.
        told: whether people were told of the outcome.
    """

    number: int
    run_name: str
    settings: str
    dataset: str
    dataset_digest: str
    before: str | None
    before_digest: str | None
    start: Start | None
    started: str
    outcome: Outcome | None = None
    reason: str = ""
    ended: str | None = None
    new_images: int | None = None
    removed_images: int | None = None
    quarantined: dict[str, int] = {}
    steps: int | None = None
    device_hours: float | None = None
    model: str | None = None
    metric: Metric | None = None
    champion_test: ChampionTest | None = None
    mlflow_run_id: str | None = None
    mlflow_uri: str | None = None
    experiment_id: str | None = None
    images_per_second: float | None = None
    num_workers: int | None = None
    report: str | None = None
    told: bool = False
    version: int | None = None
    champion: int | None = None

    @property
    def run_link(self) -> str | None:
        """Address of the run's page, where a server shows it."""
        if self.mlflow_run_id is None or not (self.mlflow_uri or "").startswith("http"):
            return None
        return ui_link(str(self.mlflow_uri), f"experiments/{self.experiment_id}/runs/{self.mlflow_run_id}")

    @property
    def was_trained(self) -> bool:
        """Whether it came to a decision."""
        return self.outcome in ("promoted", "kept")


class State(_Record):
    """What the last call left.

    Attributes:
        failures: calls in a row that failed, or were stopped by a guard.
        last: outcome and reason of the last call.
    """

    failures: int = 0
    last: Outcome | None = None
    reason: str = ""
    when: str = ""


class Journal:
    """The attempts of one name."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder

    def attempts(self) -> list[Attempt]:
        """Returns all attempts, oldest first.

        Raises:
            DataError: if one cannot be read.
        """
        folders = self.folder / "attempts"
        return [_read(folders / name / ATTEMPT_FILE) for name in sorted(folders.folders()) if (folders / name / ATTEMPT_FILE).is_file()]

    def write(self, attempt: Attempt) -> None:
        """Writes an attempt, anew or again."""
        (self.place(attempt.number) / ATTEMPT_FILE).write_text(attempt.model_dump_json(indent=2) + "\n")

    def place(self, number: int) -> Location:
        """Returns the folder of an attempt."""
        return self.folder / "attempts" / f"{number:04d}"

    def state(self) -> State:
        """Returns what the last call left."""
        try:
            return State.model_validate_json((self.folder / STATE_FILE).read_text())
        except (OSError, ValidationError):
            return State()

    def write_state(self, state: State) -> None:
        """Writes what this call leaves."""
        (self.folder / STATE_FILE).write_text(state.model_dump_json(indent=2) + "\n")


def _read(file: Location) -> Attempt:
    try:
        return Attempt.model_validate_json(file.read_text())
    except (OSError, ValidationError) as error:
        raise DataError(f"{file} cannot be read ({' '.join(str(error).split())[:200]}); remove the folder, and the attempt is made anew") from error
