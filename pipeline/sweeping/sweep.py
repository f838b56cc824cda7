"""A sweep from its first trial to the gate of the registry: dataset, trials, evaluation, registration, page."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.connect import connect, start_in_background
from cluster.placement import place
from components.counts import counted
from components.scratch import scratch
from components.storage import Location
from pipeline.artifacts import Evaluation, ShardSet, StageName
from pipeline.config import RunConfig, config_digest, digest_of
from pipeline.context import Reporter
from pipeline.errors import ConfigError
from pipeline.preflight import check_storage, one_process
from pipeline.ray_session import ray_session
from pipeline.run import FixedInputs, StageReport, run
from pipeline.sweeping.parent import ParentRun
from pipeline.sweeping.plan import Metric, Search, SweepPlan, check_trials, folder_of, measured_by, rungs_of, trial_config
from pipeline.sweeping.results import SweepResult, TrialResult, best_of, evaluated, furthest, read_result, trials_of
from pipeline.sweeping.space import Settings, Space, draw
from pipeline.sweeping.trial import PARENT_TAG, SWEEP_TAG, Rung, spent_so_far, write_trials
from pipeline.tracking import connect as connect_tracking
from pipeline.train import IMPORTED


@dataclass(frozen=True)
class Wanted:
    """What a person asks of a sweep.

    Attributes:
        preset: the preset's file; None for the defaults.
        overrides: settings that all trials share.
        trials: None for all combinations.
        max_hours: None for no limit.
        parallel: trials at once.
        seed: decides which settings are drawn.
    """

    name: str
    preset: str | None
    overrides: Sequence[str]
    space: Space
    trials: int | None
    metric: Metric
    search: Search
    max_hours: float | None
    parallel: int
    seed: int


@dataclass(frozen=True)
class Prepared:
    """A sweep whose every trial that is known is valid."""

    first: RunConfig
    overrides: tuple[str, ...]
    rungs: tuple[int, ...]
    decides: str
    drawn: list[Settings]
    trials: int


def prepare(wanted: Wanted) -> Prepared:
    """Draws the trials and checks them all, before anything is started.

    Raises:
        ConfigError: naming what is wrong.
    """
    drawn: list[Settings] = [*draw(wanted.space, wanted.trials, wanted.seed)] if wanted.search == "random" else []
    check_trials(wanted.preset, wanted.overrides, wanted.space, drawn)
    first = trial_config(wanted.preset, wanted.overrides, next(iter(drawn), None) or _some(wanted.space))
    decides = measured_by(wanted.metric, wanted.space, first)
    rungs, every = rungs_of(first)
    overrides = (*wanted.overrides, f"train.validate_every={every}")
    _check_search(wanted)
    return Prepared(first, overrides, rungs, decides, drawn, len(drawn) or wanted.trials or 0)


def _some(space: Space) -> Settings:
    return {key: values.extremes[0] for key, values in space.items()}


def _check_search(wanted: Wanted) -> None:
    if wanted.search != "optuna":
        return
    if wanted.trials is None:
        raise ConfigError("--trials is needed with --search optuna, which looks for settings as long as it may; give one, such as --trials 16")
    if wanted.parallel > 1:
        raise ConfigError(f"--parallel {wanted.parallel} leaves --search optuna less to learn from; use --parallel 1, or --search random")
    from pipeline.sweeping.search import check_optuna

    check_optuna()


def sweep(wanted: Wanted, prepared: Prepared, reporter: Reporter) -> tuple[SweepResult, Mapping[StageName, StageReport]]:
    """Trains the trials, evaluates and registers the best, and returns the table and what became of the best one's stages.

    Raises:
        ConfigError, DataError, ClusterError, RegistryError: like `run`.
    """
    storage = check_storage(prepared.first.cluster.storage)
    with one_process(folder_of(storage, wanted.name), wanted.name):
        shards = _dataset(wanted, prepared, reporter)
        tracking = connect_tracking(storage)
        with ParentRun(prepared.first.registry.model_name, wanted.name, folder_of(storage, wanted.name), tracking, reporter) as parent:
            plan = _plan(wanted, prepared, storage, shards, parent.run_id)
            result = _table(wanted, prepared, plan, storage, reporter)
            reports = _register(plan, result, reporter)
            parent.show(result)
    return result, reports


def _dataset(wanted: Wanted, prepared: Prepared, reporter: Reporter) -> ShardSet:
    """Returns the dataset that all trials train on, made once."""
    until: StageName = "encode" if prepared.first.data.autoencoder is not None else "preprocess"
    shards = run(prepared.first, wanted.name, until=until, reporter=reporter)["preprocess"].receipt
    assert isinstance(shards, ShardSet)
    return shards


def _plan(wanted: Wanted, prepared: Prepared, storage: Location, shards: ShardSet, parent: str) -> SweepPlan:
    return SweepPlan(
        name=wanted.name,
        preset=wanted.preset,
        overrides=prepared.overrides,
        storage=str(storage),
        rungs=prepared.rungs,
        metric=wanted.metric,
        decides="validation/distance" if prepared.decides == "validation/distance" else "validation/loss",
        search=wanted.search,
        max_hours=wanted.max_hours,
        shards=shards,
        parent=parent,
        began=time.time(),
        spent=spent_so_far(folder_of(storage, wanted.name)),
    )


def _table(wanted: Wanted, prepared: Prepared, plan: SweepPlan, storage: Location, reporter: Reporter) -> SweepResult:
    """Returns what became of the trials: what is on record where all that decides it is the same, else the trials are trained."""
    inputs = _inputs(wanted, prepared, plan)
    if (known := read_result(plan.folder, inputs)) is not None:
        reporter.line(f"[bold]trials[/] skipped: the same inputs ({inputs})")
        return known
    return _evaluate(plan, _search(wanted, prepared, plan, storage, reporter).model_copy(update={"inputs": inputs}), reporter)


def _inputs(wanted: Wanted, prepared: Prepared, plan: SweepPlan) -> str:
    """Returns the digest of all that decides the table of a sweep."""
    asked = plan.model_dump(mode="json", include={"rungs", "metric", "decides", "search", "max_hours"})
    space = {key: repr(values) for key, values in wanted.space.items()}
    return digest_of(plan.shards.digest, config_digest(prepared.first), asked, space, prepared.drawn, prepared.trials, wanted.seed)


def _search(wanted: Wanted, prepared: Prepared, plan: SweepPlan, storage: Location, reporter: Reporter) -> SweepResult:
    cluster = prepared.first.cluster
    write_trials(plan.folder, prepared.drawn)
    with ray_session(cluster, storage, plan.name, reporter.line):
        start_in_background(cluster, IMPORTED)
        from pipeline.sweeping.search import search

        with reporter.part("starting Ray"):
            connect(cluster)
        _check_room(wanted, prepared)
        reporter.line(f"[bold]trials[/] {counted(prepared.trials, 'trial')}, compared after {' and '.join(map(str, plan.rungs))} steps by {plan.decides}")
        with scratch("ray-tune") as bookkeeping, reporter.part("training trials"):
            out_of_time = search(
                plan,
                wanted.space,
                prepared.trials,
                seed=wanted.seed,
                parallel=wanted.parallel,
                bookkeeping=bookkeeping,
                told=lambda rung: reporter.line(f"  {plan.run_name(rung.trial)} {_said(rung, plan)}"),
            )
    reporter.times.take()  # of all trials; the best one's stages have their own
    trials = trials_of(plan, out_of_time)
    limit = f"--max-hours {plan.max_hours:g} were over: {_unfinished(trials)}; more hours go on from there" if out_of_time else None
    if limit is not None:
        reporter.line(f"  [yellow]note[/] {limit}")
    return SweepResult(
        name=plan.name, inputs="", metric=plan.metric, decides=plan.decides, rungs=plan.rungs, trials=tuple(trials), best=best_of(trials), limit=limit
    )


def _said(rung: Rung, plan: SweepPlan) -> str:
    if rung.failure is not None:
        return f"failed: {rung.failure}"
    value = rung.values.get(plan.decides)
    return f"{rung.steps} of {counted(plan.rungs[-1], 'step')}, {plan.decides} {'not finite' if value is None else f'{value:.5g}'}"


def _unfinished(trials: Sequence[TrialResult]) -> str:
    cut = sum(trial.state == "out of time" for trial in trials)
    return f"{counted(cut, 'trial')} ended before the last step, {sum(trial.state == 'not started' for trial in trials)} did not start"


def _check_room(wanted: Wanted, prepared: Prepared) -> None:
    """Checks that so many trials at once have places for their workers: they would wait for each other, and none would say why."""
    cluster = prepared.first.cluster
    workers = cluster.min_workers * wanted.parallel
    room = place(cluster.model_copy(update={"num_workers": (1, max(workers, cluster.max_workers))})).num_workers
    if wanted.parallel > 1 and room < workers:
        fits = max(1, room // cluster.min_workers)
        raise ConfigError(f"--parallel {wanted.parallel} needs places for {counted(workers, 'worker')}, and there are {room}; use --parallel {fits}")


def _evaluate(plan: SweepPlan, result: SweepResult, reporter: Reporter) -> SweepResult:
    """Returns the table with the numbers of the evaluate stage, where these decide."""
    if plan.metric != "evaluation":
        return result
    trials = list(result.trials)
    for trial in furthest(trials):
        receipt = _stages(plan, trial, "evaluate", reporter)["evaluate"].receipt
        assert isinstance(receipt, Evaluation)
        trials[trial.trial] = evaluated(trial, receipt)
    return result.model_copy(update={"trials": tuple(trials), "best": best_of(trials)})


def _register(plan: SweepPlan, result: SweepResult, reporter: Reporter) -> Mapping[StageName, StageReport]:
    """Takes the best trial to the gate, as any run is."""
    if result.winner is None:
        reasons = {trial.failure for trial in result.trials if trial.failure}
        raise ConfigError(f"no trial of {plan.name} could be measured{f' ({min(reasons)})' if reasons else ''}; vary other values")
    return _stages(plan, result.winner, "register", reporter)


def _stages(plan: SweepPlan, trial: TrialResult, until: StageName, reporter: Reporter) -> Mapping[StageName, StageReport]:
    config = plan.config(trial.settings, trial.steps)
    tags = {PARENT_TAG: plan.parent, SWEEP_TAG: plan.name}
    reporter.line(f"[bold]{until}[/] {trial.run}")
    return run(config, trial.run, until=until, reporter=reporter, given=FixedInputs(plan.shards, None), tags=tags)
