"""`ddpm retrain`: one scheduled attempt, from new images to a champion or a reason why not. Killed anywhere, the same command resumes it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from rich.filesize import decimal
from rich.markup import escape

from components.errors import DataError
from components.storage import Location
from pipeline.artifacts import Evaluation, Registration, ShardSet, StageName, TrainedModel
from pipeline.config import RunConfig, config_digest, digest_of, result_fields
from pipeline.context import Reporter
from pipeline.errors import RegistryError
from pipeline.housekeeping.items import Retention, in_words
from pipeline.housekeeping.prune import prune
from pipeline.lease import LeaseHeldError, alone, held
from pipeline.measurement.compare import shard_set_of
from pipeline.names import check_namesake
from pipeline.preflight import check_storage
from pipeline.retraining.alerts import next_failures, raises_alert
from pipeline.retraining.attempts import Attempt, Journal, State
from pipeline.retraining.checks import check_new_data, check_planned_hours
from pipeline.retraining.guards import Finding
from pipeline.retraining.latest import Latest, find_latest
from pipeline.retraining.notifications import report
from pipeline.retraining.start import find_start, restored
from pipeline.retraining.summary import AttemptSummary, Outcome, headline
from pipeline.retraining.webhook import check_url
from pipeline.run import FixedInputs, StageReport, run
from pipeline.tracking import connect, translated
from workflows.autoencoder_first import run_with_autoencoder

EXIT_CODES: Mapping[Outcome, int] = {"promoted": 0, "open": 0, "kept": 10, "skipped": 11, "stopped": 12}


@dataclass(frozen=True)
class Call:
    """One call of `ddpm retrain`.

    Attributes:
        settings: digest of all settings that can change an attempt's result.
    """

    config: RunConfig
    name: str
    until: StageName
    storage: Location
    journal: Journal
    settings: str
    reporter: Reporter


@dataclass(frozen=True)
class AttemptResult:
    """What became of a call.

    Attributes:
        attempt: None where none was made.
        stages: what the stages reported.
        summary: file that tells it to a person, in Markdown.
        headline: the same in one line.
    """

    outcome: Outcome
    reason: str
    attempt: Attempt | None = None
    stages: Mapping[StageName, StageReport] = field(default_factory=dict)
    summary: str | None = None
    headline: str = ""


def retrain(config: RunConfig, name: str, *, until: StageName = "register", reporter: Reporter | None = None) -> AttemptResult:
    """Makes one attempt, or goes on with the one that is open.

    Args:
        until: stage at which to leave the attempt open.

    Raises:
        ConfigError, DataError, ClusterError, RegistryError: where a person must mend something; the attempt stays open.
    """
    if config.retrain.webhook is not None:
        check_url(config.retrain.webhook)
    storage = check_storage(config.cluster.storage)
    check_namesake(storage / "retrain", name)
    settings = digest_of(config_digest(config), result_fields(config.retrain))
    call = Call(config, name, until, storage, Journal(storage / "retrain" / name), settings, reporter or Reporter())
    try:
        with _alone(call):
            told = _noted(call)
            if told.outcome != "open":
                _prune(call)
            return told
    except LeaseHeldError as error:
        return AttemptResult("skipped", f"another attempt of {name} is running in {error}")


def _prune(call: Call) -> None:
    """Removes what nothing needs any more, where the settings say so; that it could not is no failure of the attempt."""
    config = call.config.retrain
    if config.keep_days is None:
        return
    retention = Retention(config.keep_days, config.keep_versions, call.config.registry.model_name)
    try:
        done = prune(call.storage, connect(call.storage), retention, call.reporter)
    except (OSError, RegistryError, DataError) as error:
        call.reporter.line(f"  [yellow]note[/] what is not needed could not be removed ({escape(' '.join(str(error).split())[:300])})")
        return
    if done.removed:
        call.reporter.line(f"  removed {in_words(done.removed)} that nothing needs: {decimal(done.bytes)}")


@contextmanager
def _alone(call: Call) -> Iterator[None]:
    """Keeps other calls of this name out; raises HeldError where one is in, and this one is not to wait."""
    lock, wait = call.journal.folder / ".lock", call.config.retrain.when_busy == "wait"
    with alone(lock, call.reporter, f"retrains {call.name}") if wait else held(lock, wait=False):
        yield


def _noted(call: Call) -> AttemptResult:
    """Makes the attempt, notes what became of it, an error too, and tells people."""
    started = datetime.now(UTC)
    if (untold := _untold(call)) is not None:
        return _report(call, untold, started)
    try:
        told = _attempt(call)
    except Exception as error:
        _report(call, AttemptResult("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", _open_attempt(call)), started)
        raise
    return told if told.outcome == "open" else _report(call, told, started)


def _untold(call: Call) -> AttemptResult | None:
    """Returns what became of the last attempt, where the process died that was to tell it."""
    last = next(iter(call.journal.attempts()[-1:]), None)
    if last is None or last.told or last.outcome not in ("promoted", "kept", "stopped"):
        return None
    return AttemptResult(last.outcome, last.reason, last)


def _report(call: Call, told: AttemptResult, started: datetime) -> AttemptResult:
    """Notes the outcome of a call and tells it; a skip for the same reason as the last call's is told once."""
    before, config = call.journal.state(), call.config.retrain
    failures = next_failures(before.failures, told.outcome)
    call.journal.write_state(State(failures=failures, last=told.outcome, reason=told.reason, when=_now()))
    if (before.last, before.reason) == (told.outcome, told.reason) == ("skipped", told.reason):
        return told
    is_alert = raises_alert(failures, told.outcome, config.alert_after)
    summary, attempt = _summary(call, told, started, failures, is_alert), told.attempt
    place = call.journal.place(attempt.number) if attempt else call.journal.folder / "last"
    run_id = attempt.mlflow_run_id if attempt else None
    outbox = call.journal.folder / "outbox"
    file = report(summary, config, place=place, outbox=outbox, storage=call.storage, run_id=run_id, reporter=call.reporter)
    if attempt is not None and attempt.outcome is not None:
        call.journal.write(attempt.model_copy(update={"told": True}))
    return replace(told, summary=file, headline=headline(summary))


def _summary(call: Call, told: AttemptResult, started: datetime, failures: int, is_alert: bool) -> AttemptSummary:
    attempt = told.attempt
    facts = {
        "name": call.name,
        "outcome": told.outcome,
        "reason": told.reason,
        "started": attempt.started if attempt else started.isoformat(timespec="seconds"),
        "seconds": (datetime.now(UTC) - (datetime.fromisoformat(attempt.started) if attempt else started)).total_seconds(),
        "failures": failures,
        "is_alert": is_alert,
    }
    if attempt is not None:
        start = attempt.start
        facts |= {name: getattr(attempt, name) for name in ("new_images", "removed_images", "quarantined", "metric", "champion_test", "model", "report")}
        facts |= {"attempt": attempt.number, "dataset_before": attempt.before_digest, "dataset_after": attempt.dataset_digest}
        facts |= {"start": f"{start.weights} of {start.model}" if start else None, "steps": attempt.steps, "device_hours": attempt.device_hours}
        facts |= {"version": attempt.version, "champion": attempt.champion, "run_link": attempt.run_link}
    return AttemptSummary.model_validate(facts)


def _attempt(call: Call) -> AttemptResult:
    attempt = _open_attempt(call)
    if attempt is not None and (why := _why_not_on(call, attempt)):
        call.reporter.line(f"  attempt {attempt.number} is abandoned: {why}")
        call.journal.write(_ended(attempt, "abandoned", why))
        attempt = None
    begun = _begin(call) if attempt is None else attempt
    if isinstance(begun, AttemptResult):
        return begun
    origin = f"from {begun.start.weights} of {begun.start.model}" if begun.start else "from fresh weights"
    call.reporter.line(f"[bold]attempt {begun.number}[/] of {call.name}: dataset {begun.dataset_digest}, {origin}")
    return _carry_on(call, begun)


def _why_not_on(call: Call, attempt: Attempt) -> str:
    """Returns why an open attempt cannot be gone on with, nothing where it can."""
    if attempt.settings != call.settings:
        return "the settings changed"
    if not (Location.of(attempt.dataset) / "manifest.json").is_file():
        return f"its dataset {attempt.dataset} is gone"
    if attempt.start is not None and not _has_checkpoints(call, attempt) and not restored(attempt.start, tracking=connect(call.storage), storage=call.storage):
        return f"the weights of {attempt.start.model} that it started from are gone"
    return ""


def _has_checkpoints(call: Call, attempt: Attempt) -> bool:
    """Tells whether an attempt's training has gone so far that it needs the weights no more that it started from."""
    trainings = call.storage / "runs" / attempt.run_name / "train"
    return any(name.startswith("step_") for training in trainings.folders() for name in (trainings / training).folders())


def _open_attempt(call: Call) -> Attempt | None:
    return next((attempt for attempt in reversed(call.journal.attempts()) if attempt.outcome is None), None)


def _begin(call: Call) -> Attempt | AttemptResult:
    """Looks for news and opens an attempt, or tells why there is none."""
    config, attempts = call.config, call.journal.attempts()
    reports = run(config, call.name, until="preprocess", reporter=call.reporter)
    shards = reports["preprocess"].receipt
    assert isinstance(shards, ShardSet)
    name, tracking = config.registry.model_name, connect(call.storage)
    latest = find_latest(attempts, model_name=name, config_digest=config_digest(config), settings=call.settings, tracking=tracking, storage=call.storage)
    attempt = _planned(call, attempts, latest, shards)
    found, drift = check_new_data(config, latest, shards, call.journal.place(attempt.number))
    news = (drift.new_images, drift.removed_images, drift.quarantined) if drift else (shards.num_rows, None, shards.quarantined)
    attempt = attempt.model_copy(update=dict(zip(("new_images", "removed_images", "quarantined"), news, strict=True)))
    if found is not None and found.kind == "stop":
        return _stop(call, attempt, found, reports)
    if old := _old_news(call, attempt, latest, found):
        return AttemptResult("skipped", old, None, reports)
    start = find_start(config.retrain.start, name, config.model, config.diffusion, shards, tracking=tracking, storage=call.storage)
    attempt = attempt.model_copy(update={"start": start})
    found = check_planned_hours(_plan_of(call, attempt), latest, call.reporter)
    if found is not None:
        return _stop(call, attempt, found, reports)
    call.journal.write(attempt)
    return attempt


def _stop(call: Call, attempt: Attempt, found: Finding, reports: Mapping[StageName, StageReport]) -> AttemptResult:
    stopped = _ended(attempt, "stopped", found.reason)
    call.journal.write(stopped)
    return AttemptResult("stopped", found.reason, stopped, reports)


def _old_news(call: Call, attempt: Attempt, latest: Latest | None, found: Finding | None) -> str:
    """Returns why there is nothing to train on, nothing where there is: other settings are news too."""
    if latest is None or latest.settings != call.settings:
        return ""
    if latest.digest == attempt.dataset_digest:
        return f"nothing new since {latest.what}: dataset {attempt.dataset_digest}, the same settings"
    return found.reason if found is not None else ""


def _planned(call: Call, attempts: list[Attempt], latest: Latest | None, shards: ShardSet) -> Attempt:
    """Returns the next attempt; one that a guard stopped for the same data is taken up again."""
    again = next((attempt for attempt in attempts[-1:] if attempt.outcome == "stopped" and attempt.dataset == shards.path), None)
    number = again.number if again else max((attempt.number for attempt in attempts), default=0) + 1
    return Attempt(
        number=number,
        run_name=f"{call.name}-{number:04d}",
        settings=call.settings,
        dataset=shards.path,
        dataset_digest=shards.digest,
        before=str(latest.dataset.folder) if latest and latest.dataset else None,
        before_digest=latest.digest if latest else None,
        start=None,
        started=_now(),
    )


def _plan_of(call: Call, attempt: Attempt) -> RunConfig:
    """Returns the settings of an attempt's run: fewer steps where it starts from the champion and the settings say so."""
    config = call.config
    if attempt.start is None or config.retrain.steps is None:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": config.retrain.steps})})


def _carry_on(call: Call, attempt: Attempt) -> AttemptResult:
    """Runs the stages of an attempt, those that are done in no time, and ends it after the last."""
    if call.until == "preprocess":
        return AttemptResult("open", "the dataset is made", attempt)
    given = FixedInputs(shard_set_of(Location.of(attempt.dataset)), attempt.start)
    reports = run_with_autoencoder(_plan_of(call, attempt), attempt.run_name, until=call.until, reporter=call.reporter, given=given)
    if call.until != "register":
        return AttemptResult("open", f"done up to {call.until}", attempt, reports)
    ended = _result(attempt, reports)
    tracking = connect(call.storage)
    with translated(tracking.uri):
        experiment = tracking.client.get_run(str(ended.mlflow_run_id)).info.experiment_id
    ended = ended.model_copy(update={"experiment_id": experiment})
    call.journal.write(ended)
    assert ended.outcome is not None
    return AttemptResult(ended.outcome, ended.reason, ended, reports)


def _result(attempt: Attempt, reports: Mapping[StageName, StageReport]) -> Attempt:
    trained, evaluation, registration = (reports[stage].receipt for stage in ("train", "evaluate", "register"))
    assert isinstance(trained, TrainedModel)
    assert isinstance(evaluation, Evaluation)
    assert isinstance(registration, Registration)
    return _ended(attempt, "promoted" if registration.promoted else "kept", registration.decision).model_copy(
        update={
            "model": registration.uri,
            "metric": evaluation.metric,
            "champion_test": registration.champion_test,
            "mlflow_run_id": registration.mlflow_run_id,
            "mlflow_uri": registration.tracking_uri,
            "steps": trained.steps,
            "device_hours": trained.seconds * trained.num_workers / 3600,
            "version": registration.version,
            "champion": registration.version if registration.promoted else registration.previous_champion,
            "images_per_second": trained.images_per_second,
            "num_workers": trained.num_workers,
            "report": evaluation.report,
        }
    )


def _ended(attempt: Attempt, outcome: Outcome, reason: str) -> Attempt:
    return attempt.model_copy(update={"outcome": outcome, "reason": reason, "ended": _now()})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
