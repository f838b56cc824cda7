"""The MLflow run of a trained model: what it is, what it trains on, and the same one each time."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ValidationError

from components.data.copies import Copies
from components.data.shards import read_manifest
from components.data.summary import dataset_sheet, quarantine_by_reason
from components.storage import Location
from pipeline.artifacts import ShardSet
from pipeline.config import RunConfig, config_digest, flatten
from pipeline.context import StageContext
from pipeline.follow import Delivery, forget_deliveries
from pipeline.notebook import read_metrics
from pipeline.tracking import Tracking, git_commit, public_uri

RUN_FILE = "mlflow_run.json"
DATASET_FOLDER, DATASET_FILES = "dataset", ("contact.png", "quarantine.json")


def _profile(shards: ShardSet) -> dict[str, object]:
    """Returns what a run's page says of its dataset, a line for each."""
    return {
        "rows": shards.num_rows,
        "held_out": shards.num_rows - shards.num_train,
        "labels": shards.num_labels,
        "quarantined": shards.quarantined or 0,
        "ignored_files": shards.num_ignored,
        "image": f"{shards.channels}x{shards.image_size}x{shards.image_size} uint8",
        "source": shards.source,
    }


class _RunAddress(BaseModel):
    uri: str
    run_id: str


class TrackedRun:
    """The MLflow run of a trained model: opened when something is to be logged, the same one each time, ended with the block.

    Attributes:
        is_new: whether this call made it, because the store had none.
    """

    def __init__(self, config: RunConfig, context: StageContext, tracking: Tracking, shards: ShardSet) -> None:
        """Prepares a run for the training whose context it is; MLflow is not asked yet."""
        self.tracking, self._config, self._context, self._shards = tracking, config, context, shards
        self._run_id: str | None = None
        self.is_new = False

    def open(self) -> str:
        """Returns the run's id; finds or makes the run the first time."""
        if self._run_id is None:
            self._run_id = self._open()
        return self._run_id

    def _open(self) -> str:
        known = self._known()
        run_id = self.tracking.open_run(self._config.registry.model_name, self._context.run_name, known)
        self.is_new = run_id != known
        if self.is_new:
            forget_deliveries(self._context.folder)
            address = _RunAddress(uri=public_uri(self.tracking.uri), run_id=run_id)
            (self._context.folder / RUN_FILE).write_text(address.model_dump_json() + "\n")
        self._describe(run_id)
        if self.is_new:
            Delivery(self._context.folder, self.tracking, run_id).deliver(read_metrics(self._context.folder))
        return run_id

    def _known(self) -> str | None:
        try:
            address = _RunAddress.model_validate_json((self._context.folder / RUN_FILE).read_text())
        except (OSError, ValidationError):
            return None
        return address.run_id if address.uri == public_uri(self.tracking.uri) else None

    def _describe(self, run_id: str) -> None:
        config, shards = self._config, self._shards
        tags = {"config.digest": config_digest(config), "dataset.digest": shards.digest, "git.commit": git_commit(), "ddpm.folder": str(self._context.folder)}
        self.tracking.describe_run(run_id, flatten(config), tags)
        self.tracking.log_dataset(
            run_id, name=Location(shards.source).name or "images", digest=shards.digest, folder=Location.of(shards.path), profile=_profile(shards)
        )
        self._show_dataset(run_id)

    def _show_dataset(self, run_id: str) -> None:
        """Logs what the dataset looks like and what was left out of it, unless the run has that from a call before."""
        if self.tracking.has_files(run_id, DATASET_FOLDER, DATASET_FILES):
            return
        dataset, cluster = Location.of(self._shards.path), self._config.cluster
        manifest = read_manifest(dataset)
        sheet = dataset_sheet(dataset, manifest, Copies.of(cluster.cache, cluster.cache_bytes))
        reasons = {reason: asdict(found) for reason, found in quarantine_by_reason(dataset, manifest).items()}
        with tempfile.TemporaryDirectory(prefix="ddpm-dataset-") as folder:
            picture, lines = (Path(folder) / name for name in DATASET_FILES)
            sheet.save(picture)
            lines.write_text(json.dumps(reasons, indent=2) + "\n", encoding="utf-8")
            self.tracking.log_files(run_id, Location.of(folder), DATASET_FOLDER)

    def __enter__(self) -> "TrackedRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._run_id is not None:
            status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            self.tracking.close_run(self._run_id, status)
