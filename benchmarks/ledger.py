"""Measures what the driver of the preprocess stage takes for a listing of N files, apart from opening them, and the slope per file.

    python benchmarks/ledger.py [--files 500000 1000000 2000000]

Each size runs in a process of its own: a first run, in which every file is new, and one a night later, in which one file in a thousand is.
Outcomes are made up (hashes by NumPy), so that what is measured is the listing, the ledger, the plan of the shards and the list of rows.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from components.data.shards import parquet_bytes
from components.ingest.chunks import cut, packings
from components.ingest.ledger import NOTHING_KNOWN, OUTCOME_SCHEMA, placed, recall, rows_digest, settle, splits_of, to_pack
from components.ingest.listing import Item, Listing, ListingBuilder
from components.spaces.pixels import PixelSpace

RECIPE = PixelSpace(image_size=64)
ROWS_PER_SHARD = (16 << 20) // RECIPE.row_bytes


def a_listing(count: int, added: int = 0) -> Listing:
    """Returns files in a thousand folders; those that are added lie between the others."""
    builder = ListingBuilder()
    for number in range(count):
        builder.add(Item(f"class-{number % 1000:03d}/photograph-{number:09d}.jpg", f"class-{number % 1000:03d}", 100_000, "1700000000000000000"))
    for number in range(added):
        builder.add(Item(f"class-{number % 1000:03d}/photograph-{number:09d}-b.jpg", f"class-{number % 1000:03d}", 100_000, "1800000000000000000"))
    return builder.build({})


def made_up(count: int, seed: int) -> pa.Table:
    """Returns outcomes as chunks of 512 files would give them."""
    rng = np.random.default_rng(seed)
    hashes = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), count, [None, pa.py_buffer(rng.bytes(32 * count))])
    pixels = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), count, [None, pa.py_buffer(rng.bytes(16 * count))])
    chunks = pa.array([f"chunk-{number:06d}.parquet" for number in range(-(-count // 512))]).take(pa.array(np.arange(count) // 512))
    nothing = pa.nulls(count, pa.string())
    sizes = pa.array(np.full(count, 100_000))
    return pa.table([sizes, hashes, pixels, nothing, nothing, chunks, pa.array(np.arange(count) % 512, pa.int32())], schema=OUTCOME_SCHEMA)


def one_run(listing: Listing, ledger: pa.Table, shards: dict[str, int], seed: int) -> tuple[pa.Table, dict[str, int]]:
    """Does all that the driver does; returns the new ledger and its shards."""
    listing.digest()
    recalled = recall(listing.table, ledger, shards, keep_duplicates=False)
    todo = int(recalled.todo.sum())
    cut(listing.table["size"].to_numpy()[recalled.todo], RECIPE)
    settled = settle(listing.table, ledger, recalled, made_up(todo, seed), np.zeros(todo, bool), keep_duplicates=False)
    held_out = splits_of(settled, 0.02)
    groups = to_pack(settled, held_out, shards, ROWS_PER_SHARD)
    for _ in packings(settled, groups):
        pass
    names = [f"shard-{seed}-{number:06d}" for number in range(len(groups))]
    settled = placed(settled, groups, names)
    rows_digest("", settled, held_out)
    parquet_bytes(settled)
    return settled, shards | {name: len(group.lines) for name, group in zip(names, groups, strict=True)}


def measure(count: int) -> None:
    """Prints seconds of both runs and the peak memory of this process."""
    started = time.perf_counter()
    ledger, shards = one_run(a_listing(count), NOTHING_KNOWN, {}, 0)
    first = time.perf_counter()
    one_run(a_listing(count, count // 1000), ledger, shards, 1)
    night = time.perf_counter()
    print(first - started, night - first, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    """Runs every size and prints the table and the slopes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[500_000, 1_000_000, 2_000_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        measure(options.one)
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, pyarrow {pa.__version__}")
    results = []
    for count in options.files:
        output = subprocess.run([sys.executable, __file__, "--one", str(count)], capture_output=True, text=True, check=True).stdout
        results.append((count, *map(float, output.split())))
        print(f"{count:>10} files: first run {results[-1][1]:6.1f} s, a night later {results[-1][2]:6.1f} s, peak {results[-1][3] / 1e9:.2f} GB")
    counts, *columns = zip(*results, strict=True)
    if len(counts) > 1:
        first, night, memory = (np.polyfit(counts, column, 1)[0] for column in columns)
        print(f"slope per million files: {first * 1e6:.1f} s, {night * 1e6:.1f} s, {memory * 1e6 / 1e9:.2f} GB; 10 million: {memory * 1e7 / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
