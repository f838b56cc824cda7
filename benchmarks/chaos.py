"""Kills one training again and again at seeded random moments, damages its checkpoints, and compares it with an undisturbed one.

    python benchmarks/chaos.py [--preset digits] [--kills 20] [--damages 4] [--others 6] [--steps 1500] [--seed 0] [section.key=value ...]

Kills hit a training worker, or the driver with all its processes, by turns. Damage is done to the newest checkpoint where the driver is dead:
its weights are cut short, or one bit of them is turned. The others: a worker that is stopped for good (SIGSTOP), the command asked to end (SIGTERM), and
Ray's head killed. After each the same command is run again. Prints a table in Markdown: seconds to the next
step are from the fault to the first new point of the loss curve, starting Ray, importing torch and repeating steps included. Exit code 1 where
the numbers differ.
"""

import argparse
import os
import platform
import shutil
import signal
import statistics
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from components.model.retention import damage_of, damaged_checkpoints
from pipeline.config import load_config
from pipeline.context import Reporter
from workflows.faults import DAMAGES, HARDSHIPS, KILLS, Fault, InjectedFault, Kind, Trial, new_folder, plan_faults
from workflows.preset_files import find_preset
from workflows.verify_resume import Verdict, contrast, describe, scaled_down

HANG_S = 10
Counts = Sequence[tuple[tuple[Kind, ...], int]]


def main() -> None:
    """Runs both trainings and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--kills", 20), ("--damages", 4), ("--others", 6), ("--steps", 1500), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    preset = find_preset(options.preset).resolve()
    settings = [*scaled_down(options.steps, options.kills + options.others), f"train.hang_timeout_s={HANG_S}", *options.settings]
    workers = load_config(preset, settings).cluster.num_workers
    folder = new_folder()
    # Asked to end, it ends the training that it watches too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    verdict = contrast(folder, str(preset), settings, plan(counts(options), options.steps, options.seed), Reporter())
    set_aside = damage_told(Trial(str(preset), (), folder / "b"))
    print(f"{options.preset}, {options.steps} steps, {workers} workers, {os.cpu_count()} cores of {platform.machine()}, torch {torch.__version__},")
    print(f"load {psutil.getloadavg()[1]:.1f}, seed {options.seed}\n")
    print(table(verdict.disturbed.struck, plan_counts(counts(options))))
    print(describe(verdict))
    print("\n".join(["checkpoints set aside:", *set_aside]))
    if not (verdict.equal and all_set_aside(verdict, set_aside)):
        sys.exit(f"not equal; both trainings lie in {folder}")
    shutil.rmtree(folder)


def counts(options: argparse.Namespace) -> Counts:
    """Returns how many of each sort of faults are wanted."""
    return ((KILLS, options.kills), (DAMAGES, options.damages), (HARDSHIPS, options.others))


def plan(wanted: Counts, steps: int, seed: int) -> list[Fault]:
    """Returns the faults of all sorts, the earliest first."""
    faults = [plan_faults(kinds, total, steps, seed + number) for number, (kinds, total) in enumerate(wanted)]
    return sorted(chain.from_iterable(faults), key=lambda fault: fault.step)


def plan_counts(wanted: Counts) -> dict[str, int]:
    """Returns how often each fault is wanted."""
    return {kind: len(range(number, total, len(kinds))) for kinds, total in wanted for number, kind in enumerate(kinds)}


def damage_told(trial: Trial) -> list[str]:
    """Returns which checkpoints the training set aside, and why."""
    folder = trial.training_folder()
    return [f"{path.name}: {damage_of(path)}" for path in damaged_checkpoints(folder)] if folder else []


def table(struck: Sequence[InjectedFault], wanted: dict[str, int]) -> str:
    """Returns the table in Markdown."""
    lines = ["| fault | tried | recovered | seconds to the next step: median | worst |", "|---|---|---|---|---|"]
    for kind, count in wanted.items():
        waits = [one.recovered_s for one in struck if one.kind == kind and one.recovered_s is not None]
        tried = sum(one.kind == kind for one in struck)
        times = f"{statistics.median(waits):.1f} | {max(waits):.1f}" if waits else "- | -"
        lines.append(f"| {kind} | {tried} of {count} | {len(waits)} | {times} |")
    return "\n".join(lines) + "\n"


def all_set_aside(verdict: Verdict, set_aside: Sequence[str]) -> bool:
    """Tells whether each damaged checkpoint was set aside."""
    return all(any(one.hit in line for line in set_aside) for one in verdict.disturbed.struck if one.hit.startswith("step_"))


if __name__ == "__main__":
    main()
