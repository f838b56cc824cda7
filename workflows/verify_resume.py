"""Does an interrupted training end with the numbers of an undisturbed one: both are run here, and compared."""

import json
import os
import shutil
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from components.counts import counted
from components.model.manifest import verify
from components.storage import Location
from pipeline.config import RunConfig
from pipeline.context import Reporter
from pipeline.errors import ConfigError
from pipeline.tracking import connect
from workflows.faults import KILLS, Fault, FaultInjector, InjectedFault, Trial, TrialResult, new_folder, plan_faults, raw_curve
from workflows.processes import shared_memory_files, without_owner

LOSS = "train/loss"
CHECKPOINTS, POINTS = 8, 40
DIFFERENCES_SHOWN = 5


@dataclass(frozen=True)
class TrainingEnd:
    """What a training ended with.

    Attributes:
        checksums: SHA-256 of every file of the last checkpoint: weights, averages, optimiser, step and settings.
        written: the loss curve as workers wrote it down.
        logged: the loss curve on the run's page in MLflow.
        pages: runs in MLflow.
    """

    checksums: dict[str, str]
    written: tuple[tuple[int, float], ...]
    logged: tuple[tuple[int, float], ...]
    pages: int


def training_end_of(trial: Trial) -> TrainingEnd:
    """Returns what a training ended with; the checkpoint's files are read, and not only their manifest."""
    # Each training has a store of its own below its storage root, and MLflow leaves the address of the last one here.
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    model, tracking = trial.model(), connect(trial.storage)
    logged = [(point.step, point.value) for point in tracking.client.get_metric_history(model.mlflow_run_id, LOSS)]
    experiments = [experiment.experiment_id for experiment in tracking.client.search_experiments()]
    checksums = verify(Path(model.path))
    return TrainingEnd(checksums, tuple(raw_curve(Location.of(model.folder))), tuple(sorted(logged)), len(tracking.client.search_runs(experiments)))


@dataclass(frozen=True)
class Compared:
    """One thing of both trainings.

    Attributes:
        difference: what is unlike; empty where nothing is.
    """

    what: str
    detail: str
    difference: str

    @property
    def equal(self) -> bool:
        """Whether both have the same."""
        return not self.difference


def compare(undisturbed: TrainingEnd, disturbed: TrainingEnd) -> list[Compared]:
    """Compares file by file and point by point."""
    names = sorted(undisturbed.checksums | disturbed.checksums)
    files = [_compare_file(name, undisturbed.checksums.get(name, "missing"), disturbed.checksums.get(name, "missing")) for name in names]
    curves = [
        _compare_curves("loss curve, as written down", undisturbed.written, disturbed.written),
        _compare_curves("loss curve, in MLflow", undisturbed.logged, disturbed.logged),
    ]
    pages = "" if disturbed.pages == 1 else f"{counted(disturbed.pages, 'run')}, and it should be 1"
    return [*files, *curves, Compared("runs in MLflow", str(disturbed.pages), pages)]


def _compare_file(name: str, one: str, other: str) -> Compared:
    return Compared(name, one[:12], "" if one == other else f"{other[:12]} where disturbed")


def _compare_curves(what: str, one: Sequence[tuple[int, float]], other: Sequence[tuple[int, float]]) -> Compared:
    twice = [step for curve in (one, other) for step, count in Counter(step for step, _ in curve).items() if count > 1]
    before, after = dict(one), dict(other)
    unlike = [step for step in sorted(before | after) if before.get(step) != after.get(step)]
    describe = [f"step {step} {before.get(step, 'missing')} against {after.get(step, 'missing')}" for step in unlike[:DIFFERENCES_SHOWN]]
    parts = [f"{len(unlike)} of {counted(len(before | after), 'point')} differ: {', '.join(describe)}"] if unlike else []
    parts += [f"steps twice: {', '.join(map(str, sorted(twice)))}"] if twice else []
    parts += [] if before else ["no points"]
    return Compared(what, f"{counted(len(before), 'point')}, {len(twice)} twice", "; ".join(parts))


@dataclass(frozen=True)
class Leftovers:
    """What both trainings left behind; Ray's logs do not count."""

    processes: tuple[str, ...]
    shared_memory: tuple[str, ...]
    temporary: tuple[str, ...]

    def __str__(self) -> str:
        kinds = {"processes": self.processes, "shared memory": self.shared_memory, "temporary files": self.temporary}
        return "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds.items() if names) or "nothing"


@dataclass(frozen=True)
class Verdict:
    """The comparison, and how both trainings went."""

    compared: list[Compared]
    undisturbed: TrialResult
    disturbed: TrialResult
    wanted: int
    left: Leftovers

    @property
    def equal(self) -> bool:
        """Whether everything is the same, after as many faults as were wanted."""
        return all(one.equal for one in self.compared) and len(self.disturbed.struck) == self.wanted

    def to_json(self) -> dict[str, object]:
        """Returns everything for a script."""
        compared = [asdict(one) | {"equal": one.equal} for one in self.compared]
        return {"equal": self.equal} | asdict(self) | {"compared": compared}


def verify_resume(
    stdout: IO[str],
    config: RunConfig,
    preset: str,
    settings: Sequence[str],
    *,
    steps: int,
    kills: int,
    seed: int,
    as_json: bool,
    unlike: Sequence[str] = (),
) -> int:
    """Trains undisturbed and with kills, prints the comparison, and returns the exit code: 0 where both are equal, else 1.

    Args:
        config: what preset and settings come to.
        unlike: settings for the disturbed training alone, with which it cannot end alike.

    Raises:
        ConfigError: if the settings leave no room for it, or a training fails by itself.
    """
    _check(config, settings)
    folder, reporter = new_folder(), Reporter()
    equal = False
    try:
        faults = plan_faults(KILLS, kills, steps, seed)
        verdict = contrast(folder, preset, [*scaled_down(steps, kills), *settings], faults, reporter, unlike)
        equal = verdict.equal
        stdout.write(json.dumps(verdict.to_json(), indent=2) + "\n" if as_json else describe(verdict))
    finally:
        if equal:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            reporter.line(f"both trainings lie in {folder}")
    return 0 if equal else 1


def _check(config: RunConfig, settings: Sequence[str]) -> None:
    if config.cluster.address != "local":
        raise ConfigError(f"cluster.address={config.cluster.address} is another machine, whose processes are not ours to kill; use local")
    for fixed, why in (("cluster.storage", "both trainings have a temporary one"), ("train.steps", "use --steps")):
        if any(setting.startswith(f"{fixed}=") for setting in settings):
            raise ConfigError(f"{fixed} cannot be set for this command; leave it out ({why})")


def scaled_down(steps: int, kills: int) -> list[str]:
    """Returns settings for a training of few steps: checkpoints and points often, pictures never; a person's settings go over them."""
    return [
        f"train.steps={steps}",
        f"train.checkpoint_every={max(1, steps // CHECKPOINTS)}",
        f"train.log_every={max(1, steps // POINTS)}",
        f"train.sample_every={steps + 1}",
        f"cluster.max_failures={max(3, kills)}",
    ]


def contrast(folder: Path, preset: str, settings: Sequence[str], faults: Sequence[Fault], reporter: Reporter, unlike: Sequence[str] = ()) -> Verdict:
    """Runs both trainings below a folder and returns what came of it."""
    shared_memory = shared_memory_files()
    straight, hurt = Trial(preset, tuple(settings), folder / "a"), Trial(preset, (*settings, *unlike), folder / "b")
    reporter.line(f"undisturbed training in {straight.folder}")
    undisturbed = FaultInjector(straight, []).run()
    share_datasets(straight, hurt)
    reporter.line(f"the same with {counted(len(faults), 'fault')} in {hurt.folder}")
    disturbed = FaultInjector(hurt, list(faults)).run()
    compared = compare(training_end_of(straight), training_end_of(hurt))
    temporary = [f"{trial.folder.name}/{name}" for trial in (straight, hurt) for name in trial.temporary_files()]
    mapped_by_none = without_owner(shared_memory_files() - shared_memory)
    left = Leftovers((*undisturbed.processes, *disturbed.processes), tuple(mapped_by_none), tuple(temporary))
    return Verdict(compared, undisturbed, disturbed, len(faults), left)


def share_datasets(made: Trial, other: Trial) -> None:
    """Lets a trial use the dataset that another one made."""
    other.storage.path.mkdir(parents=True)
    (other.storage.path / "datasets").symlink_to(made.storage.path / "datasets")


def describe(verdict: Verdict) -> str:
    """Returns the comparison as a person reads it."""
    disturbed = verdict.disturbed
    lines = [
        f"undisturbed  {verdict.undisturbed.seconds:.0f} s",
        f"disturbed    {disturbed.seconds:.0f} s, {len(disturbed.struck)} of {counted(verdict.wanted, 'fault')}, "
        f"{counted(disturbed.starts, 'start')} of the command",
        *(f"  {_describe_fault(one)}" for one in disturbed.struck),
        *(f"{'same' if one.equal else 'UNLIKE':6} {one.what}: {one.detail}{'' if one.equal else f'; {one.difference}'}" for one in verdict.compared),
        f"left behind  {verdict.left}",
        _conclusion(verdict),
    ]
    return "\n".join(lines) + "\n"


def _describe_fault(struck: InjectedFault) -> str:
    after = "" if struck.recovered_s is None else f", {struck.recovered_s:.1f} s to the next step"
    return f"{struck.kind} ({struck.hit}) at {struck.seconds:.1f} s after step {struck.step}{after}"


def _conclusion(verdict: Verdict) -> str:
    done, wanted = len(verdict.disturbed.struck), verdict.wanted
    if verdict.equal:
        waits = [one.recovered_s for one in verdict.disturbed.struck if one.recovered_s is not None]
        typical = f"; {statistics.median(waits):.0f} s to the next step (median)" if waits else ""
        return f"EQUAL: {counted(done, 'fault')} changed nothing{typical}"
    if all(one.equal for one in verdict.compared):
        return f"NOT SHOWN: equal, but the training ended after {done} of {counted(wanted, 'fault')}; use more --steps"
    return "NOT EQUAL: " + ", ".join(one.what for one in verdict.compared if not one.equal)
