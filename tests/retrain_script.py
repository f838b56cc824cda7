"""Obeys the contract of `ddpm retrain` in milliseconds, and keeps a journal of when it was in which stage; for tests of schedules.

    python retrain_script.py FOLDER [--until STAGE] --json

Each finished stage leaves a file, so that a stage is found again, as in the real command. What FOLDER/behaviour.json says is done:
{"outcome": ..., "seconds": {STAGE: ...}, "codes": {STAGE: [...]}}; a code that is not 0 is the exit code of that stage's next call.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STAGES = ("preprocess", "train", "evaluate", "register")
CODES = {"promoted": 0, "kept": 10, "skipped": 11, "stopped": 12}


def main(folder: Path, until: str) -> int:
    file = folder / "behaviour.json"
    behaviour = json.loads(file.read_text()) if file.is_file() else {}
    signal.signal(signal.SIGTERM, lambda *_: _leave(folder, until))
    for stage in STAGES[: STAGES.index(until) + 1]:
        done = folder / f"{stage}.done"
        if done.exists():
            continue
        _write(folder, "begin", stage)
        print(f"doing {stage}", file=sys.stderr, flush=True)
        time.sleep(behaviour.get("seconds", {}).get(stage, 0))
        code = _next_code(folder, behaviour, stage)
        _write(folder, "end", stage)
        if code:
            print(f"{stage} fails with {code}", file=sys.stderr)
            return code
        done.touch()
    if until != "register":
        return _say(folder, "open")
    for stage in STAGES:
        (folder / f"{stage}.done").unlink()
    _write(folder, "attempt", behaviour.get("outcome", "kept"))
    return _say(folder, behaviour.get("outcome", "kept"))


def _next_code(folder: Path, behaviour: dict, stage: str) -> int:
    codes = behaviour.get("codes", {}).get(stage, [])
    code = codes.pop(0) if codes else 0
    (folder / "behaviour.json").write_text(json.dumps(behaviour))
    if code in (11, 12):
        _say(folder, {11: "skipped", 12: "stopped"}[code])
    return code


def _say(folder: Path, outcome: str) -> int:
    summary = folder / "summary.md"
    summary.write_text(f"# Summary\n\n{outcome} by a script\n")
    facts = {"outcome": outcome, "reason": f"{outcome} by a script", "name": "script", "attempt": 1, "run_name": "script-1", "mlflow_run_id": "abc"}
    rest = {"mlflow_uri": "http://127.0.0.1:5000", "model": "models:/script/3", "report": None, "summary": str(summary), "stages": {}}
    print(json.dumps(facts | rest))
    return CODES.get(outcome, 0)


def _write(folder: Path, what: str, stage: str) -> None:
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps({"what": what, "stage": stage, "at": time.time(), "pid": os.getpid()}) + "\n")


def _leave(folder: Path, stage: str) -> None:
    _write(folder, "interrupted", stage)
    sys.exit(75)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[sys.argv.index("--until") + 1] if "--until" in sys.argv else "register"))
