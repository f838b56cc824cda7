"""`ddpm data forget` and its relatives: what learned from an image, and keeping it out of every dataset from now on."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from components.counts import counted
from components.data.catalog import Catalog, Dataset
from components.data.shards import read_rows
from components.errors import DataError
from components.ingest.forgotten import is_sha256, write_tombstone
from components.model.manifest import sha256_of
from components.storage import Location
from pipeline.config import load_config
from pipeline.housekeeping.records import Records
from pipeline.registry.lineage import Learned, learned_from, tag_forgotten
from workflows.options import run_name_of
from workflows.preset_files import find_preset
from workflows.retrain import retrain

if TYPE_CHECKING:
    from pipeline.tracking import Tracking


@dataclass(frozen=True)
class Forgotten:
    """What came of it.

    Attributes:
        hashes: SHA-256 of the images, with the paths by which they were known.
        fresh: those that were not forgotten before.
        datasets: that hold any of them, each with how many of its rows.
        runs: names of those that trained on such a dataset.
        learned: versions that learned from them.
    """

    hashes: dict[str, set[str]]
    fresh: set[str] = field(default_factory=set)
    datasets: tuple[tuple[Dataset, int], ...] = ()
    runs: tuple[str, ...] = ()
    learned: tuple[Learned, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Returns what a script needs."""
        return {
            "forgotten": {sha256: sorted(paths) for sha256, paths in self.hashes.items()},
            "new": sorted(self.fresh),
            "datasets": [
                {"name": dataset.name, "digest": dataset.manifest.digest, "source": dataset.manifest.source, "rows": rows} for dataset, rows in self.datasets
            ],
            "runs": list(self.runs),
            "versions": [one.to_json() for one in self.learned],
        }

    def lines(self) -> Iterator[str]:
        """Yields it for a person."""
        yield f"{counted(len(self.hashes), 'image')} to forget, {len(self.fresh)} of them for the first time; no dataset made from now on holds them"
        for dataset, rows in self.datasets:
            yield f"  in dataset {dataset.name} ({dataset.manifest.source}): {counted(rows, 'row')}"
        yield from (f"  run {run} trained on them" for run in self.runs)
        for one in self.learned:
            aliases = f" ({', '.join(one.version.aliases)})" if one.version.aliases else ""
            yield f"  {one.version.name} version {one.version.version}{aliases} learned from them: {one.how}; it is tagged"
        if self.learned:
            yield "run or retrain makes the next dataset without them; train.init_from or retrain.start of a tagged version would carry on what it learned"


def forget(storage: Location, tracking: "Tracking | None", addresses: Sequence[str], why: str) -> Forgotten:
    """Keeps images out of all datasets from now on, and notes on every version that learned from them that it did.

    Args:
        addresses: SHA-256 of encoded images, paths as a dataset's list of rows has them, or files of this machine.

    Raises:
        DataError: if an address is none of these; then nothing is changed.
    """
    datasets = Catalog.of(storage).datasets
    rows = [(dataset, read_rows(dataset.folder, dataset.manifest, ["source", "sha256"])) for dataset in datasets]
    hashes: dict[str, set[str]] = {}
    for address in addresses:
        found = _hashes_of(address, rows)
        if not found:
            raise DataError(f"{address} is no SHA-256, no file here, and no row of a dataset below {storage}; write it as the list of rows has it")
        for sha256 in found:
            hashes.setdefault(sha256, set()).update(set() if is_sha256(address) else {address})
    known = pc.SetLookupOptions(pa.array([bytes.fromhex(sha256) for sha256 in hashes], pa.binary(32)))
    holding = []
    for dataset, table in rows:
        mask = pc.call_function("is_in", [table["sha256"]], known)
        count = int(pc.call_function("sum", [mask]).as_py() or 0)
        if count:
            holding.append((dataset, count))
            for sha256, path in zip(table["sha256"].filter(mask).to_pylist(), table["source"].filter(mask).to_pylist(), strict=True):
                hashes[sha256.hex()].add(path)
    # Versions first: an image that has its tombstone was looked for in all of them.
    digests = {dataset.manifest.digest: f"dataset {dataset.name}" for dataset, _ in holding}
    learned = tuple(learned_from(tracking, digests)) if tracking is not None and digests else ()
    if tracking is not None:
        tag_forgotten(tracking, learned, hashes, why)
    fresh = {sha256 for sha256, paths in hashes.items() if write_tombstone(storage, sha256, tuple(sorted(paths)), why)}
    return Forgotten(hashes, fresh, tuple(holding), tuple(_runs(storage, set(digests))), learned)


def retrain_without(preset: str, overrides: Sequence[str], name: str | None) -> str:
    """Retrains from fresh weights, whatever is new, and returns what became of it.

    Raises:
        ConfigError, DataError, ClusterError, RegistryError: where a person must mend something.
    """
    path = find_preset(preset)
    config = load_config(path, [*overrides, "retrain.start=scratch", "retrain.min_new_images=0"])
    told = retrain(config, run_name_of(name, path))
    return f"retrained: {told.outcome}, {told.reason}"


def _hashes_of(address: str, rows: "list[tuple[Dataset, pa.Table]]") -> set[str]:
    if is_sha256(address.lower()):
        return {address.lower()}
    found = set()
    for _, table in rows:
        mask = pc.call_function("equal", [table["source"], pa.scalar(address)])
        found |= {sha256.hex() for sha256 in table["sha256"].filter(mask).to_pylist() if sha256 is not None}
    with suppress(OSError):
        path = Path(address).expanduser()
        if path.is_file():
            found.add(sha256_of(path))
    return found


def _runs(storage: Location, digests: set[str]) -> Iterator[str]:
    for run in Records.of(storage).runs:
        if any(training.receipt is not None and training.receipt.dataset_digest in digests for training in run.trainings):
            yield run.name
