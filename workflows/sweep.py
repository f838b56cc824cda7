"""`ddpm sweep`: trials of settings, each an ordinary run; the best is registered, and competes like any other."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar

from pipeline.artifacts import StageName
from pipeline.config import RunConfig
from pipeline.context import Reporter
from pipeline.errors import ConfigError
from pipeline.run import StageReport
from pipeline.sweeping.plan import METRICS, Metric, Search
from pipeline.sweeping.results import SweepResult
from pipeline.sweeping.space import parse_space
from pipeline.sweeping.sweep import Wanted, prepare, sweep
from workflows.options import run_name_of
from workflows.streams import unread_is_fine
from workflows.tables import print_summary, print_sweep

SEARCHES: tuple[Search, ...] = ("random", "optuna")
_Known = TypeVar("_Known", Metric, Search)


def wanted_of(
    preset: Path,
    arguments: Sequence[str],
    *,
    name: str | None,
    trials: int | None,
    metric: str,
    search: str,
    max_hours: float | None,
    parallel: int,
    seed: int,
) -> Wanted:
    """Returns what a command line asks for.

    Raises:
        ConfigError: naming what is wrong.
    """
    space, plain = parse_space(arguments)
    run_name = run_name_of(name or f"{preset.stem}-sweep", preset)
    run_name_of(run_name + "-000", preset)  # what its trials are called must be a name, too
    if max_hours is not None and not (math.isfinite(max_hours) and max_hours > 0):
        raise ConfigError(f"--max-hours {max_hours:g} is no time; give hours above 0, such as --max-hours 8")
    measured, searches = _one_of("--metric", metric, METRICS), _one_of("--search", search, SEARCHES)
    return Wanted(run_name, str(preset.resolve()), plain, space, trials, measured, searches, max_hours, parallel, seed)


def _one_of(option: str, text: str, known: Sequence[_Known]) -> _Known:
    found = next((each for each in known if each == text), None)
    if found is None:
        raise ConfigError(f"{option} {text} is unknown; use {', '.join(known[:-1])} or {known[-1]}")
    return found


def run_sweep(stdout: IO[str], wanted: Wanted, *, as_json: bool) -> None:
    """Runs a sweep, and prints its table, or the same as one JSON object; raises like `sweep`."""
    prepared = prepare(wanted)
    result, reports = sweep(wanted, prepared, Reporter())
    with unread_is_fine(stdout):
        if as_json:
            stdout.write(json.dumps(to_json(result, reports), indent=2) + "\n")
        else:
            _print(stdout, result, reports, prepared.first)


def _print(stdout: IO[str], result: SweepResult, reports: Mapping[StageName, StageReport], config: RunConfig) -> None:
    assert result.winner is not None
    print_sweep(stdout, result)
    print_summary(stdout, reports, result.winner.run, config)


def to_json(result: SweepResult, reports: Mapping[StageName, StageReport]) -> dict[str, object]:
    """Returns the table of a sweep, and what became of the stages of the best trial."""
    return result.model_dump(mode="json") | {"stages": {stage: report.to_json() for stage, report in reports.items()}}
