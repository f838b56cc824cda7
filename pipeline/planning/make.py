"""A run's plan: what there is already, a rehearsal of the rest or what the last training took, and what follows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.machine import cpu_model, this_machine
from cluster.nodes import Node
from cluster.placement import Placement
from cluster.placement import plan as place_on
from components.autoencoder.store import AutoencoderFiles
from components.counts import counted
from components.data.shards import read_manifest
from components.ingest.folders import Found
from components.storage import Location
from pipeline.artifacts import STAGES, ShardSet, TrainedModel
from pipeline.autoencoder import PRESET, check_autoencoder, resolve_autoencoder
from pipeline.config import RunConfig
from pipeline.context import Reporter, StageContext
from pipeline.errors import ConfigError, RegistryError
from pipeline.measurement.extractors import check_files
from pipeline.names import check_namesake
from pipeline.planning.done import Done, done_so_far
from pipeline.planning.estimate import Work, plan_of
from pipeline.planning.history import last_measured, speed_digest, speeds_of_run
from pipeline.planning.records import Plan, Quantity, Speeds, write_plan
from pipeline.planning.rehearsal import rehearsal_folder, rehearse
from pipeline.preflight import LISTING, check_storage
from pipeline.preprocess import ListedSource, files_to_open, list_source
from pipeline.ray_session import ray_session
from pipeline.tracking import Tracking, connect
from pipeline.training.perceptual import check_perceptual
from pipeline.training.start import check_init

GetSpeeds = Callable[["_Subject", AutoencoderFiles | None], tuple[Speeds, str | None]]
"""What gives the speeds of a run, and the checkpoint that measuring them left, if it did."""


@dataclass(frozen=True)
class First:
    """The autoencoder of a preset, which is trained before the run.

    Attributes:
        trained: where it lies; None where it is still to be trained.
    """

    config: RunConfig
    name: str
    trained: str | None


@dataclass(frozen=True)
class _Subject:
    """A run, and what there is of it."""

    config: RunConfig
    name: str
    listed: ListedSource
    storage: Location
    tracking: Tracking | None
    done: Done
    work: Work


def plan_by_probe(config: RunConfig, name: str, *, first: First | None, runs_per_month: Quantity, reporter: Reporter) -> Plan:
    """Returns the plan of a run by a rehearsal on the cluster of its settings, and keeps it in the run's folder.

    Args:
        first: the autoencoder that `data.autoencoder` names by a preset.

    Raises:
        ConfigError, DataError, ClusterError, RegistryError: where the run would.
    """
    storage = _checked(config, name)
    with rehearsal_folder(storage, name) as folder, ray_session(config.cluster, storage, name, reporter.line):

        def speeds(subject: _Subject, autoencoder: AutoencoderFiles | None) -> tuple[Speeds, str | None]:
            done = rehearse(subject.config, subject.name, subject.listed, folder / subject.name, reporter, autoencoder=autoencoder)
            return done.speeds, done.checkpoint

        return _plan_both(config, name, first, storage, folder, runs_per_month, reporter, speeds)


def plan_by_last(config: RunConfig, name: str, *, nodes: list[Node] | None, first: First | None, runs_per_month: Quantity, reporter: Reporter) -> Plan:
    """Returns the plan of a run by what the last training of the same settings took on such a device, as MLflow knows; nothing is tried.

    Args:
        nodes: of the cluster that will do it; None for this machine.

    Raises:
        ConfigError: if MLflow knows none.
    """
    storage = _checked(config, name)

    def speeds(subject: _Subject, autoencoder: AutoencoderFiles | None) -> tuple[Speeds, str | None]:
        placement, kind = _placed(subject.config, nodes)
        digest = speed_digest(subject.config, placement.num_workers)
        found = None if subject.tracking is None else last_measured(subject.tracking, digest, kind, use_gpu=placement.use_gpu)
        if found is None:
            right = "leave --last out to measure it now"
            raise ConfigError(f"--last: no training of these settings on {kind or 'such a device'} has measured its speed yet; {right}")
        return found, None

    with rehearsal_folder(storage, name) as folder:
        return _plan_both(config, name, first, storage, folder, runs_per_month, reporter, speeds)


def _checked(config: RunConfig, name: str) -> Location:
    """Checks what a run checks first, and returns the storage root."""
    storage = check_storage(config.cluster.storage)
    check_namesake(storage / "runs", name)
    check_files(config.evaluate)
    check_init(config.train, storage / "runs" / name)
    check_perceptual(config.train)
    check_autoencoder(config.data.autoencoder)
    return storage


def _placed(config: RunConfig, nodes: list[Node] | None) -> tuple[Placement, str | None]:
    """Returns where a run would be placed, and the kind of its devices; None for a cluster's CPUs, whose kind Ray does not know."""
    if nodes is None:
        machine = this_machine()
        cpus = max(machine.cpus, config.cluster.max_workers + 1)  # as many as a Ray of our own is told of
        nodes = [Node("", "this machine", {"CPU": float(cpus), "GPU": float(len(machine.gpus))})]
        placement = place_on(config.cluster, nodes)
        return placement, machine.gpus[0].name if placement.use_gpu and machine.gpus else cpu_model()
    placement = place_on(config.cluster, nodes)
    kinds = [node.labels["ray.io/accelerator-type"] for node in nodes if "ray.io/accelerator-type" in node.labels]
    kinds += [resource.partition(":")[2] for node in nodes for resource in node.resources if resource.startswith("accelerator_type:")]
    return placement, kinds[0] if placement.use_gpu and kinds else None


def _plan_both(
    config: RunConfig,
    name: str,
    first: First | None,
    storage: Location,
    folder: Location,
    runs_per_month: Quantity,
    reporter: Reporter,
    get_speeds: GetSpeeds,
) -> Plan:
    listed, tracking, before, made = _listed(config, storage, reporter), _tracking(storage), None, None
    if first is not None and first.trained is None:
        reporter.line(f"[bold]autoencoder[/] {first.name}")
        before, made = _plan_one(_look(first.config, first.name, listed, storage, tracking, None, reporter), None, get_speeds, runs_per_month, None)
        write_plan(storage / "runs" / first.name, before)
        reporter.line(f"[bold]denoiser[/] {name}")
    address = first.trained if first is not None else config.data.autoencoder
    subject = _look(config, name, listed, storage, tracking, address, reporter)
    with _autoencoder(made or address, folder, storage, tracking) as autoencoder:
        plan, _ = _plan_one(subject, autoencoder, get_speeds, runs_per_month, before)
    write_plan(storage / "runs" / name, plan)
    return plan


@contextmanager
def _autoencoder(address: str | None, folder: Location, storage: Location, tracking: Tracking | None) -> Iterator[AutoencoderFiles | None]:
    """Gives the autoencoder that a rehearsal encodes by; of one that is not trained yet the one that its own rehearsal left."""
    if address is None or address.startswith(PRESET):
        yield None
        return
    if tracking is None:
        if address.startswith("models:/"):
            raise RegistryError(f"data.autoencoder={address}: there is no registry yet in {storage}; set MLFLOW_TRACKING_URI to the one that has it")
        tracking = connect(storage)
    yield resolve_autoencoder(address, folder=folder / "autoencoder", tracking=tracking, storage=folder if not address.startswith("models:/") else storage)


def _listed(config: RunConfig, storage: Location, reporter: Reporter) -> ListedSource:
    found = Found()
    with reporter.part(LISTING, lambda: counted(found.num_listed, "file", ",")):
        return list_source(config.data, storage, found)


def _tracking(storage: Location) -> Tracking | None:
    try:
        return connect(storage, create=False)
    except RegistryError:
        return None


def _look(
    config: RunConfig, name: str, listed: ListedSource, storage: Location, tracking: Tracking | None, autoencoder: str | None, reporter: Reporter
) -> _Subject:
    with reporter.part("looking at what there is of the run"):
        done = done_so_far(config, name, listed, storage, tracking, autoencoder)
        context = StageContext(storage, storage / "runs" / name, "", name, config.cluster, reporter)
        todo = 0 if "preprocess" in done.receipts else files_to_open(config.data, listed, context)
    return _Subject(config, name, listed, storage, tracking, done, _work(config, listed, done, todo))


def _work(config: RunConfig, listed: ListedSource, done: Done, todo: int) -> Work:
    """Returns how much there is to do; of a dataset that is not made yet every file is taken for an image."""
    shards, files, split = done.receipts.get("preprocess"), len(listed.listing), listed.listing.held_out
    if isinstance(shards, ShardSet):
        size = sum(shard.bytes for shard in read_manifest(Location.of(shards.path)).shards)
        held_out = shards.num_rows - shards.num_train
        return Work(files, todo, shards.num_train, held_out, "computed", size, frozenset(done.receipts), done.steps)
    held_out = round(files * config.data.holdout_fraction) if split is None else int(split.sum())
    return Work(files, todo, files - held_out, held_out, "assumed", None, frozenset(done.receipts), done.steps)


def _plan_one(
    subject: _Subject, autoencoder: AutoencoderFiles | None, get_speeds: GetSpeeds, runs_per_month: Quantity, before: Plan | None
) -> tuple[Plan, str | None]:
    model = subject.done.receipts.get("train")
    stages = {stage for stage in STAGES if stage != "encode" or subject.config.data.autoencoder is not None}
    if isinstance(model, TrainedModel) and stages <= set(subject.done.receipts):
        found = speeds_of_run(subject.config, subject.done.receipts, {"train": 0.0}, use_gpu=model.gpu_bytes is not None)
        assert found is not None
        speeds, checkpoint = found.model_copy(update={"source": "done"}), None
    else:
        speeds, checkpoint = get_speeds(subject, autoencoder)
    return plan_of(subject.config, subject.name, speeds, subject.work, runs_per_month, before), checkpoint
