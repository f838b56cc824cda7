"""A month of nightly retraining in minutes: how the storage grows with and without retention, as a table and a picture.

    python benchmarks/month.py [--nights 30] [--keep-versions 3] [--new 20] [--out month.png]

Each night some of the built-in digits arrive as PNG files and `ddpm retrain` makes an attempt with a small network. The nights of both are taken by turns.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import TINY, write_digits

from components.storage import Location

WITH, WITHOUT = "with retention", "without"


def main() -> None:
    """Runs the month and prints bytes by kind of thing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--nights", 30), ("--keep-versions", 3), ("--new", 20)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--out", default="month.png")
    options = parser.parse_args()
    sizes: dict[str, list[int]] = {WITH: [], WITHOUT: []}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        for night in range(options.nights):
            write_digits(Path(work) / "source", 150 + night * options.new if night else 0, 150 + (night + 1) * options.new)
            for kind, found in sizes.items():
                retention = [f"retrain.keep_versions={options.keep_versions}", "retrain.keep_days=0"] if kind == WITH else []
                found.append(_attempt(Path(work), kind, retention))
            print(f"night {night + 1}: {sizes[WITH][-1] / 1e6:.1f} MB {WITH}, {sizes[WITHOUT][-1] / 1e6:.1f} MB {WITHOUT}", flush=True)
    print(f"\n{options.nights} nights each in {time.monotonic() - started:.0f} s")
    _draw(Path(options.out), sizes)


def _draw(file: Path, sizes: dict[str, list[int]]) -> None:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, found in sizes.items():
        axes.plot(range(1, len(found) + 1), [size / 1e6 for size in found], label=kind)
    axes.set(xlabel="night", ylabel="MB below the storage root", ylim=(0, None))
    axes.legend()
    figure.savefig(file, dpi=120)


def _attempt(work: Path, kind: str, retention: list[str]) -> int:
    """Makes a night's attempt; returns the bytes below the storage root behind it."""
    storage = work / kind.split(maxsplit=1)[0]
    settings = [f"data.source={work / 'source'}", f"cluster.storage={storage}", "registry.model_name=month", *retention]
    done = subprocess.run(
        [sys.executable, "-m", "workflows", "retrain", "digits", *TINY, *settings, "--name", "month"], capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 10):
        raise SystemExit(done.stderr)
    return sum(size for _, size, _ in Location.of(storage).tree())


if __name__ == "__main__":
    main()
