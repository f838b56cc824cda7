"""The MLflow run of a trained model: what it is, what it trains on, and the same one each time."""

import json
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError
from rich.markup import escape

from components.data.shard_cache import ShardCache
from components.data.shards import MANIFEST, QUARANTINE, SHARDS, Manifest, read_manifest, shard_location
from components.data.summary import dataset_sheet, quarantine_by_reason
from components.scratch import scratch
from components.storage import Location
from pipeline.artifacts import ShardSet
from pipeline.config import RunConfig, config_digest, flatten, public_tree
from pipeline.context import StageContext
from pipeline.errors import RegistryError
from pipeline.provenance import ENVIRONMENT_FILES, write_environment
from pipeline.tracking import Tracking, git_commit, public_uri
from pipeline.training.metrics_relay import LAST_DELIVERY_S, LEAVING_S, Delivery, forget_deliveries, in_a_hurry

RUN_FILE = "mlflow_run.json"
CONFIG_FOLDER, CONFIG_FILES = "config", ("config.yaml",)
ENVIRONMENT_FOLDER = "environment"
DATASET_FOLDER, DATASET_FILES = "dataset", ("contact.png", "quarantine.json")
MOST_SHARD_BYTES = 64 << 20
"""Pixels up to here go with the run, so that its artifacts alone are the dataset; more would fill an artifact store with copies."""


def _profile(shards: ShardSet, manifest: Manifest) -> dict[str, object]:
    """Returns what a run's page says of its dataset, a line for each."""
    return {
        "rows": shards.num_rows,
        "held_out": shards.num_rows - shards.num_train,
        "labels": shards.num_labels,
        "quarantined": shards.quarantined or 0,
        "ignored_files": shards.num_ignored,
        shards.space.noun: f"{'x'.join(map(str, shards.space.shape))} {shards.space.dtype}",
        "source": shards.source,
        shards.space.column: f"{_shard_bytes(manifest) / 1e6:.1f} MB in {SHARDS if _goes_along(manifest) else Location.of(shards.path).parent / SHARDS}",
    }


def _shard_bytes(manifest: Manifest) -> int:
    return sum(shard.bytes for shard in manifest.shards)


def _goes_along(manifest: Manifest) -> bool:
    """Tells whether the pixels are few enough to be kept with the run."""
    return _shard_bytes(manifest) <= MOST_SHARD_BYTES


class _RunAddress(BaseModel):
    """Where the run is; `ended` is false from when it is opened until MLflow knows all of it and how it ended."""

    uri: str
    run_id: str
    ended: bool = True


class TrackedRun:
    """The MLflow run of a trained model: opened when something is to be logged, the same one each time, ended with the block.

    A run that an earlier process left open, because it was killed or the server was away, is opened by the block itself.

    Attributes:
        is_new: whether this call made it, because the store had none.
    """

    def __init__(self, config: RunConfig, context: StageContext, tracking: Tracking, shards: ShardSet, tags: Mapping[str, str]) -> None:
        """Prepares a run for the training whose context it is; MLflow is not asked yet.

        Args:
            tags: further ones than those that every run has.
        """
        self._tags = tags
        self.tracking, self._config, self._context, self._shards = tracking, config, context, shards
        self._run_id: str | None = None
        self.is_new = False

    @property
    def is_open(self) -> bool:
        """Whether something is logged in this block, or was to be by a process that did not come to its end."""
        return self._run_id is not None

    def open(self) -> str:
        """Returns the run's id; finds or makes the run the first time."""
        if self._run_id is None:
            self._run_id = self._open()
        return self._run_id

    def _open(self) -> str:
        found = self._known()
        known = None if found is None else found.run_id
        run_id = self.tracking.open_run(self._config.registry.model_name, self._context.run_name, known)
        self.is_new = run_id != known
        if self.is_new:
            forget_deliveries(self._context.folder)
        self._write_address(run_id, ended=False)
        with self._context.reporter.part("describing the run to MLflow"):
            self._describe(run_id)
            Delivery(self._context.folder, self.tracking, run_id).deliver()
        return run_id

    def _known(self) -> _RunAddress | None:
        try:
            address = _RunAddress.model_validate_json((self._context.folder / RUN_FILE).read_text())
        except (OSError, ValidationError):
            return None
        return address if address.uri == public_uri(self.tracking.uri) else None

    def _write_address(self, run_id: str, *, ended: bool) -> None:
        address = _RunAddress(uri=public_uri(self.tracking.uri), run_id=run_id, ended=ended)
        (self._context.folder / RUN_FILE).write_text(address.model_dump_json() + "\n")

    def _describe(self, run_id: str) -> None:
        config, shards = self._config, self._shards
        tags = {"config.digest": config_digest(config), "dataset.digest": shards.digest, "git.commit": git_commit(), "ddpm.folder": str(self._context.folder)}
        tags["train.steps"] = str(config.train.steps)  # a setting is written once, and a run may be made longer
        self.tracking.describe_run(run_id, flatten(config), tags | dict(self._tags))
        dataset = Location.of(shards.path)
        manifest = read_manifest(dataset)
        name = Location(shards.source).name or "images"
        self.tracking.log_dataset(run_id, name=name, digest=shards.digest, folder=dataset, profile=_profile(shards, manifest))
        self._attach(run_id, CONFIG_FOLDER, CONFIG_FILES, self._write_config)
        self._attach(run_id, ENVIRONMENT_FOLDER, ENVIRONMENT_FILES, write_environment)
        records = (MANIFEST, QUARANTINE, manifest.rows_file)
        self._attach(run_id, DATASET_FOLDER, (*DATASET_FILES, *records), lambda folder: self._write_dataset(folder, dataset, manifest, records))
        if _goes_along(manifest):
            files = {shard.name: shard_location(dataset, shard.name) for shard in manifest.shards}
            self._attach(run_id, SHARDS, files, lambda folder: [file.download(folder / name) for name, file in files.items()])

    def _attach(self, run_id: str, artifact_path: str, names: Collection[str], write: Callable[[Path], object]) -> None:
        """Logs the files that a function writes into a folder, unless the run has those names from a call before: what it started with stays."""
        if self.tracking.has_files(run_id, artifact_path, names):
            return
        with scratch("artifacts") as staging:
            write(staging)
            self.tracking.log_files(run_id, Location.of(staging), artifact_path)

    def _write_config(self, folder: Path) -> None:
        text = yaml.safe_dump(public_tree(self._config), sort_keys=False)
        (folder / CONFIG_FILES[0]).write_text(text, encoding="utf-8")

    def _write_dataset(self, folder: Path, dataset: Location, manifest: Manifest, records: Collection[str]) -> None:
        """Writes what the dataset looks like, what was left out of it, and the records that make it one."""
        for name in records:
            (dataset / name).download(folder / name)
        cluster = self._config.cluster
        picture, lines = (folder / name for name in DATASET_FILES)
        dataset_sheet(dataset, manifest, ShardCache.of(cluster.cache, cluster.cache_bytes)).save(picture)
        reasons = {reason: asdict(found) for reason, found in quarantine_by_reason(dataset, manifest).items()}
        lines.write_text(json.dumps(reasons, indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> "TrackedRun":
        known = self._known()
        if known is not None and not known.ended:
            self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._run_id is None:
            return
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        if not in_a_hurry(error):
            with self._context.reporter.part("ending the run in MLflow"):
                self._try_to_end(self._run_id, status)
            return
        ending = threading.Thread(target=self._try_to_end, args=(self._run_id, status), name="end-of-run", daemon=True)
        ending.start()
        ending.join(LEAVING_S)

    def _try_to_end(self, run_id: str, status: str) -> None:
        try:
            self._end(run_id, status)
        except (RegistryError, OSError) as failure:
            self._context.reporter.line(f"  [yellow]warning[/] {escape(str(failure))}; the same command delivers the rest")

    def _end(self, run_id: str, status: str) -> None:
        """Ends the run when MLflow has all of it; what a slow server has not taken by the deadline waits for the next call."""
        deadline = time.monotonic() + LAST_DELIVERY_S
        complete = Delivery(self._context.folder, self.tracking, run_id).deliver(lambda: time.monotonic() < deadline)
        self.tracking.close_run(run_id, status)
        self._write_address(run_id, ended=complete)
