"""MLflow runs: one for each trained model, written by one process, addressed by its id."""

import json
import logging
import os
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.tree import COMMIT_FILE
from components.storage import Location
from pipeline.errors import RegistryError
from pipeline.tracking_client import make_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH_METRICS, BATCH_TAGS = 900, 90
REACH_TIMEOUT_S = 5
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the run prints its link itself, once
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",
}
_LINES_OF_MLFLOW = ("mlflow", "alembic", "alembic.runtime.migration", "sqlalchemy")

NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""What MLflow's stores say of a run, version or alias that they do not have."""

MetricsAt = tuple[int, int, Mapping[str, float]]


def tracking_uri(storage: Location) -> str:
    """Returns where runs are tracked: MLFLOW_TRACKING_URI where it is set, else SQLite below the storage root.

    Raises:
        RegistryError: if it is not set and the storage root is no file system, where SQLite cannot lie.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and not storage.is_local:
        raise RegistryError(f"cluster.storage={storage} cannot hold an SQLite store; set MLFLOW_TRACKING_URI to an MLflow server")
    if uri and not uri.startswith("http") and not storage.is_local:
        raise RegistryError(f"MLFLOW_TRACKING_URI={public_uri(uri)} keeps artifacts in a folder, and cluster.storage={storage} is none; name an MLflow server")
    return uri or f"sqlite:///{storage / 'mlflow' / 'mlflow.db'}"


@dataclass(frozen=True)
class Tracking:
    """A reachable MLflow store.

    Attributes:
        artifacts: where a local store keeps files; None where a server decides.
    """

    uri: str
    client: "MlflowClient"
    artifacts: Path | None

    def open_run(self, experiment: str, name: str, run_id: str | None) -> str:
        """Returns the id of a run of this store, set to RUNNING: the given one if it is here, else a new one.

        Raises:
            RegistryError: if the store refuses.
        """
        with translated(self.uri):
            if run_id is not None and self.has_run(run_id):
                self.client.update_run(run_id, status="RUNNING")
                return run_id
            return self.client.create_run(self._experiment(experiment), run_name=name).info.run_id

    def _experiment(self, name: str) -> str:
        """Returns the id of an experiment, made or restored if need be."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            location = None if self.artifacts is None else (self.artifacts / name).as_uri()
            try:
                return self.client.create_experiment(name, artifact_location=location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # two first runs at once
                    raise
                found = self.client.get_experiment_by_name(name)
        assert found is not None
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def has_run(self, run_id: str) -> bool:
        """Tells whether the store holds a run that is not deleted."""
        from mlflow.exceptions import MlflowException

        with translated(self.uri):
            try:
                return self.client.get_run(run_id).info.lifecycle_stage == "active"
            except MlflowException as error:
                if error.error_code in NOT_THERE:
                    return False
                raise

    def describe_run(self, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Logs what a run is: its settings and tags. Settings are write-once; repeating the same ones changes nothing."""
        from mlflow.entities import Param, RunTag

        with translated(self.uri):
            known = self.client.get_run(run_id).data.params
            fresh = [Param(key, value[:6000]) for key, value in params.items() if known.get(key) != value[:6000] and key not in known]
            for first in range(0, len(fresh), 90):
                self.client.log_batch(run_id, params=fresh[first : first + 90])
            self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def tag_run(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Sets tags of a run."""
        from mlflow.entities import RunTag

        with translated(self.uri):
            entries = [RunTag(key, value) for key, value in tags.items()]
            for first in range(0, len(entries), BATCH_TAGS):
                self.client.log_batch(run_id, tags=entries[first : first + BATCH_TAGS])

    def log_dataset(self, run_id: str, *, name: str, digest: str, folder: Location, profile: Mapping[str, object]) -> None:
        """Names the dataset that a run trains on, once.

        Args:
            profile: what there is of what, for the run's page.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.types import ColSpec, DataType, Schema

        with translated(self.uri):
            inputs = self.client.get_run(run_id).inputs
            known = [entry.dataset.digest for entry in inputs.dataset_inputs] if inputs else []
            if digest in known:
                return
            columns = Schema([ColSpec(DataType.binary, "pixels"), ColSpec(DataType.string, "label", required=False), ColSpec(DataType.string, "source")])
            dataset = Dataset(
                name=name,
                digest=digest,
                source_type="local" if folder.is_local else "s3",
                source=json.dumps({"uri": str(folder)}),  # as MLflow's own sources of these types are written, and its page reads them
                schema=json.dumps({"mlflow_colspec": columns.to_dict()}),
                profile=json.dumps(profile),
            )
            self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def has_files(self, run_id: str, artifact_path: str, names: Collection[str]) -> bool:
        """Tells whether a run's artifacts hold all of some files of a folder."""
        with translated(self.uri):
            there = {file.path for file in self.client.list_artifacts(run_id, artifact_path)}
        return {f"{artifact_path}/{name}" for name in names} <= there

    def log_metrics(self, run_id: str, lines: Sequence[MetricsAt]) -> None:
        """Logs (timestamp in ms, step, values) lines. Sending a line twice leaves it there once.

        Raises:
            RegistryError: if the store cannot be reached.
        """
        from mlflow.entities import Metric

        metrics = [Metric(key, value, timestamp, step) for timestamp, step, values in lines for key, value in values.items()]
        with translated(self.uri):
            for first in range(0, len(metrics), BATCH_METRICS):
                self.client.log_batch(run_id, metrics=metrics[first : first + BATCH_METRICS])

    def log_model_metrics(self, run_id: str, model_id: str, step: int, values: Mapping[str, float], *, dataset: str, digest: str) -> None:
        """Shows numbers on the page of a logged model, beside the dataset that they were measured on, so that models can be sorted by them."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(key, value, now, step, model_id=model_id, dataset_name=dataset, dataset_digest=digest) for key, value in values.items()]
        with translated(self.uri):
            self.client.log_batch(run_id, metrics=metrics)

    def has_picture(self, run_id: str, *, key: str, step: int) -> bool:
        """Tells whether a run has the picture of a step, both the large and the small one that its page shows."""
        with translated(self.uri):
            names = [file.path for file in self.client.list_artifacts(run_id, "images")]
        ours = [name for name in names if name.startswith(f"images/{key}+step+{step}+")]
        return all(any(name.endswith(suffix) for name in ours) for suffix in (".png", ".webp"))

    def log_picture(self, run_id: str, picture: Path, *, key: str, step: int) -> None:
        """Logs a picture of a step, so that the run's page shows it under a slider."""
        from PIL import Image

        with translated(self.uri), Image.open(picture) as image:
            self.client.log_image(run_id, image.convert("RGB"), key=key, step=step, synchronous=True)

    def note(self, run_id: str, markdown: str) -> None:
        """Sets the description on a run's page."""
        with translated(self.uri):
            self.client.set_tag(run_id, "mlflow.note.content", markdown[:5000])

    def tag_experiment(self, run_id: str, key: str, value: str) -> None:
        """Sets a tag on the experiment of a run, unless it has that tag."""
        with translated(self.uri):
            experiment = self.client.get_experiment(self.client.get_run(run_id).info.experiment_id)
            if key not in experiment.tags:
                self.client.set_experiment_tag(experiment.experiment_id, key, value)

    def log_files(self, run_id: str, folder: Location, artifact_path: str) -> None:
        """Copies the files of a folder to the run's artifacts."""
        with translated(self.uri), folder.local_copy() as copy:
            self.client.log_artifacts(run_id, str(copy), artifact_path)

    def close_run(self, run_id: str, status: str) -> None:
        """Ends a run as FINISHED, FAILED or KILLED."""
        with translated(self.uri):
            self.client.set_terminated(run_id, status)


class translated:
    """Turns what MLflow and its database raise inside a block into a RegistryError."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, RegistryError):
            return
        import requests
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        if isinstance(error, MlflowException | SQLAlchemyError | requests.RequestException | Boto3Error | BotoCoreError | ClientError):
            raise RegistryError(_describe(self._uri, error)) from error


def _describe(uri: str, error: BaseException) -> str:
    """Returns what happened and what would be right, without a password."""
    public, user = public_uri(uri), os.environ.get("MLFLOW_TRACKING_USERNAME")
    message = " ".join(str(error).replace(uri, public).split())[:300]
    code = getattr(error, "error_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    if code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", 401):
        wrong = f"refuses MLFLOW_TRACKING_USERNAME={user} with its password" if user else "asks for a user and a password"
        return f"MLFLOW_TRACKING_URI={public} {wrong}; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to those of a user of that server"
    if "Invalid Host header" in message:
        host = public.partition("://")[2].partition("/")[0]
        return f"MLFLOW_TRACKING_URI={public} is not a name of that server; use one that it accepts, or add {host} to its --allowed-hosts"
    if code in ("PERMISSION_DENIED", 403):
        return f"MLflow at {public} does not let {user or 'you'} do this ({message}); an administrator may grant EDIT on the experiment and the model"
    if type(error).__module__.partition(".")[0] in ("boto3", "botocore"):
        right = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL where it is not Amazon's"
        return f"MLflow at {public} keeps files on S3, which refuses: {message}; set {right}"
    if "mlflow-artifacts URI" in message and not uri.startswith("http"):
        return f"MLflow at {public} names files that only the server can fetch which made them; set MLFLOW_TRACKING_URI to that server's address"
    return f"MLflow at {public} failed: {message}; start it, or set MLFLOW_TRACKING_URI to one that answers"


def public_uri(uri: str) -> str:
    """Returns a URI without the user and password it may hold."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def connect(storage: Location, *, create: bool = True) -> Tracking:
    """Returns the tracking store of a storage root; brings a local one's schema up to date, and checks that a server answers.

    Args:
        create: make a local store where there is none.

    Raises:
        RegistryError: if it cannot be reached within seconds, or is not there.
    """
    uri = tracking_uri(storage)
    _prepare_environment()
    if not create and uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise RegistryError(f"{storage} holds no MLflow store yet; run `ddpm run digits` first, or name another --storage")
    if uri.startswith("http"):
        _check_answers(uri)
    if uri.startswith("sqlite:///"):
        _make_sqlite(uri)
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    tracking = Tracking(uri, make_client(uri), None if uri.startswith("http") else (storage / "mlflow" / "artifacts").path)
    with translated(uri):
        tracking.client.search_experiments(max_results=1)
    return tracking


def _prepare_environment() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _LINES_OF_MLFLOW:
        logging.getLogger(name).setLevel(logging.ERROR)
    # It prints with a traceback what it raises too.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def _check_answers(uri: str) -> None:
    import requests

    # MLflow's client trusts what this variable names; requests would not look at it.
    trusted = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() not in ("true", "1")
    try:
        requests.get(uri.rstrip("/") + "/health", timeout=REACH_TIMEOUT_S, verify=trusted).raise_for_status()
    except requests.exceptions.SSLError as error:
        raise RegistryError(
            f"MLFLOW_TRACKING_URI={public_uri(uri)} has a certificate that is not trusted here; set REQUESTS_CA_BUNDLE to the file of who signed it"
        ) from error
    except requests.HTTPError as error:
        if error.response.status_code in (401, 403):
            raise RegistryError(_describe(uri, error)) from error
        raise RegistryError(
            f"MLFLOW_TRACKING_URI={public_uri(uri)} is no MLflow server, or a broken one: /health answers {error.response.status_code}; look there"
        ) from error
    except requests.RequestException as error:
        raise RegistryError(
            f"MLFLOW_TRACKING_URI={public_uri(uri)} does not answer ({type(error).__name__}); start the server, or unset it to use the local store"
        ) from error


def _make_sqlite(uri: str) -> None:
    """Creates the database before anyone else touches it: two processes that create it at once break each other."""
    path = Path(uri.removeprefix("sqlite:///"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegistryError(f"{path.parent} cannot be made ({error.strerror}); give write permission, or set MLFLOW_TRACKING_URI") from error
    import fcntl

    with (path.parent / ".create.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        import mlflow

        with translated(uri):
            mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri).search_registered_models(max_results=1)


def git_commit() -> str:
    """Returns the commit of the project's checkout, with `-dirty` where it has changes; `unknown` outside a checkout.

    A tree that was sent to a cluster has no history, but a file that says which commit it was.
    """
    root = Path(__file__).resolve().parent.parent
    if (root / COMMIT_FILE).is_file():
        return (root / COMMIT_FILE).read_text(encoding="utf-8").strip()
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def ui_link(base: str, fragment: str) -> str:
    """Returns the address of a page of MLflow's site, in the mode that shows models."""
    return f"{base.rstrip('/')}/{ui_fragment(fragment)}"


def ui_fragment(fragment: str) -> str:
    """Returns the address of a page from another page of the same site."""
    return f"#/{fragment}?workflowType=machine_learning"


def as_tags(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns values as MLflow tags, at most 5,000 characters each."""
    return {key: str(value)[:5000] for key, value in values.items()}
