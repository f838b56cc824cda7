"""All that is checked before the first stage, in the order in which it costs; what a run needs comes out of it once, and goes down one way."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import yaml

from cluster.connect import start_in_background
from components.counts import counted
from components.errors import DataError
from components.ingest.folders import Found
from components.storage import Location
from pipeline import preprocess as preprocess_stage
from pipeline import train as train_stage
from pipeline.artifacts import StageName
from pipeline.autoencoder import check_autoencoder
from pipeline.cluster_check import check_cluster
from pipeline.config import RunConfig, public_tree
from pipeline.context import Reporter
from pipeline.errors import ConfigError
from pipeline.lease import LeaseHeldError, alone, held
from pipeline.measurement.extractors import check_files
from pipeline.names import check_cache, check_namesake
from pipeline.ray_session import ray_session
from pipeline.tracking import Tracking, connect
from pipeline.training.perceptual import check_perceptual
from pipeline.training.start import check_init

LISTING = "listing the source"
PROBE_BYTES = 16 << 10  # more than a full disk takes


@dataclass
class Ready:
    """What a run may count on.

    Attributes:
        config: with what the cluster decided.
        listed: the source, None where the run has its dataset already, and once somebody took it.
        tracking: MLflow's store, None where only the dataset is made.
    """

    config: RunConfig
    storage: Location
    listed: preprocess_stage.ListedSource | None
    tracking: Tracking | None


@contextmanager
def preflight(config: RunConfig, name: str, until: StageName, reporter: Reporter, *, lists: bool, trains_anew: bool) -> Iterator[Ready]:
    """Checks storage, lease, source, files of extractors, tracking store and cluster; gives the run to a block, in a session of Ray.

    Args:
        until: the last stage.
        lists: whether the source is looked at.
        trains_anew: whether the training is asked for whatever there is.

    Raises:
        ConfigError, DataError, ClusterError, RegistryError: before anything expensive starts.
    """
    storage = check_storage(config.cluster.storage)
    check_namesake(storage / "runs", name)
    with one_process(storage / "runs" / name, name, reporter if until == "preprocess" else None):
        listed = _list(config, storage, reporter) if lists else None
        check_files(config.evaluate)
        check_init(config.train, storage / "runs" / name)
        check_perceptual(config.train)
        check_autoencoder(config.data.autoencoder)
        if config.cluster.address == "local":
            check_cache(config.cluster.cache, is_used=not storage.is_local)
        with ray_session(config.cluster, storage, name, reporter.line):
            if until != "preprocess" and (trains_anew or not _was_trained(storage, name)):
                start_in_background(config.cluster, train_stage.IMPORTED)
            tracking = connect(storage) if until != "preprocess" else None
            (storage / "runs" / name / "config.yaml").write_text(yaml.safe_dump(public_tree(config), sort_keys=False))
            if config.cluster.address != "local":
                cluster = check_cluster(config.cluster, _needed(config), storage, reporter)
                config = config.model_copy(update={"cluster": cluster})
            ready = Ready(config, storage, listed, tracking)
            del listed  # with millions of files it is large, and only the first stage needs it
            yield ready


def _list(config: RunConfig, storage: Location, reporter: Reporter) -> preprocess_stage.ListedSource:
    found = Found()
    with reporter.part(LISTING, lambda: counted(found.num_listed, "file", ",")):
        return preprocess_stage.list_source(config.data, storage, found)


def _was_trained(storage: Location, name: str) -> bool:
    """Tells whether the run may have a training that matches; without any it has to train, whatever its settings and its data turn out to be."""
    trainings = storage / "runs" / name / "train"
    return any((trainings / folder / "receipt.json").is_file() for folder in trainings.folders())


def _needed(config: RunConfig) -> dict[str, str | None]:
    """Returns what every node must see, by setting."""
    return {
        "data.source": config.data.source,
        "data.root": config.data.root,
        "train.perceptual_weights": _on_this_machine(config.train.perceptual_weights),
        "train.perceptual_layers": _on_this_machine(config.train.perceptual_layers),
        "evaluate.inception_weights": _on_this_machine(config.evaluate.inception_weights),
        "evaluate.dinov2_weights": _on_this_machine(config.evaluate.dinov2_weights),
    }


def _on_this_machine(address: str | None) -> str | None:
    """Returns a path written out, for other nodes to look at; nothing for an address on S3, which is the same everywhere."""
    location = None if address is None else Location.of(address)
    return str(location) if location is not None and location.is_local else None


def check_storage(storage: str) -> Location:
    """Returns the storage root, made if need be.

    Raises:
        ConfigError: if it cannot be written.
    """
    try:
        root = Location.of(storage)
    except DataError as error:
        raise ConfigError(f"cluster.storage={error}") from error
    probe = root / f".write-{uuid.uuid4().hex[:8]}"
    try:
        probe.write_text("." * PROBE_BYTES)
        probe.remove()
    except (OSError, ValueError) as error:
        right = "name a folder with write permission" if root.is_local else "look at the bucket's name, the AWS_* credentials and AWS_ENDPOINT_URL"
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        raise ConfigError(f"cluster.storage={storage} cannot be written ({reason}); {right}") from error
    return root


@contextmanager
def one_process(folder: Location, name: str, waiting: Reporter | None = None) -> Iterator[None]:
    """Keeps two processes from working on the same run at once; the lock ends with the process that holds it.

    Args:
        waiting: wait for the other process, and say so here.

    Raises:
        ConfigError: if another process holds it, and it is not to be waited for.
    """
    if waiting is not None:
        with alone(folder / ".lock", waiting, f"works on run {name}"):
            yield
        return
    try:
        with held(folder / ".lock", wait=False):
            yield
    except LeaseHeldError as error:
        raise ConfigError(f"run {name} is in progress in {error}; wait for it, or choose another --name") from error
