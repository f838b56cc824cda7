"""What `ddpm retrain` prints: one line for a person, or one JSON object."""

import json
from typing import IO

from pipeline.artifacts import STAGES
from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from workflows.outcome import last_line
from workflows.retrain import EXIT_CODES, AttemptResult, retrain


def make_attempt(stdout: IO[str], config: RunConfig, name: str, until: str, *, as_json: bool, as_job: bool) -> int:
    """Makes an attempt, prints what became of it, and returns the exit code.

    Args:
        as_job: print the exit code as the last line and return 0 where nothing failed, because Ray calls every other code a failure.

    Raises:
        ConfigError: if there is no such stage.
    """
    stages = {stage: stage for stage in STAGES}
    if until not in stages:
        raise ConfigError(f"--until {until} is no stage; use one of {', '.join(STAGES)}")
    told = retrain(config, name, until=stages[until])
    stdout.write(json.dumps(to_json(told, name), indent=2) + "\n" if as_json else _line(told, name))
    code = EXIT_CODES[told.outcome]
    if not as_job:
        return code
    stdout.write(last_line(code))
    return 0 if told.outcome in ("promoted", "kept", "skipped") else code


def _line(told: AttemptResult, name: str) -> str:
    if told.headline:
        return told.headline + "\n"
    number = f" #{told.attempt.number}" if told.attempt else ""
    return f"{name}{number}: {told.outcome}: {told.reason}\n"


def to_json(told: AttemptResult, name: str) -> dict[str, object]:
    """Returns what became of an attempt, for a script."""
    attempt = told.attempt
    return {
        "outcome": told.outcome,
        "reason": told.reason,
        "name": name,
        "attempt": attempt.number if attempt else None,
        "run_name": attempt.run_name if attempt else None,
        "mlflow_run_id": attempt.mlflow_run_id if attempt else None,
        "mlflow_uri": attempt.mlflow_uri if attempt else None,
        "model": attempt.model if attempt else None,
        "report": attempt.report if attempt else None,
        "summary": told.summary,
        "stages": {stage: {"skipped": report.skipped, "seconds": round(report.seconds, 3)} for stage, report in told.stages.items()},
    }
