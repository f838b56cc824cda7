"""A dataset of images and an autoencoder in, a dataset of latents out: shard by shard, each once for all versions of the dataset that hold it.

latents/SOURCE/AUTOENCODER/     what one autoencoder makes of one source
    shards/CONTENT.parquet      means and standard deviations, label, source; never changed, shared by versions
    encoded/PIXELS.json         which of them a shard of pixels became
    VERSION/                    a dataset as in components/data/shards.py, row by row that of the same name in datasets/SOURCE
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

from pydantic import ValidationError

from components.autoencoder.store import AutoencoderFiles, find_autoencoder, keep_autoencoder
from components.counts import counted
from components.data.reader import RowReader
from components.data.shards import (
    MANIFEST,
    QUARANTINE,
    SHARDS,
    Manifest,
    Shard,
    check_whole,
    column_rows,
    read_checked_shard,
    read_manifest,
    shard_location,
    shard_table,
    write_manifest,
    write_shard,
)
from components.errors import DataError
from components.spaces.latents import LatentSpace
from components.spaces.pixels import PixelSpace
from components.storage import Location
from pipeline.artifacts import ShardSet
from pipeline.config import digest_of
from pipeline.context import StageContext
from pipeline.lease import alone
from pipeline.parallel_map import Row, Work, parallel_map

LATENTS, ENCODED, WORK = "latents", "encoded", "work"
ROWS_AT_ONCE = 1 << 12


def space_of(shards: ShardSet, autoencoder: AutoencoderFiles, *, mirrors: bool, copies: tuple[int, int] = (0, 0)) -> LatentSpace:
    """Returns the space of a dataset's latents, not yet scaled.

    Args:
        mirrors: whether mirrored images are encoded, too.
        copies: how many shifted copies of each image are, and by how many pixels they are shifted at most.

    Raises:
        DataError: if the autoencoder does not take such images.
    """
    if not isinstance(shards.space, PixelSpace):
        raise DataError(f"data.autoencoder takes images, and {shards.source} holds {shards.space.noun}s; leave it out")
    latent = autoencoder.latent_shape(shards.space.shape)
    return LatentSpace(pixels=shards.space, autoencoder=autoencoder.digest, latent=latent, mirrors=mirrors, copies=copies[0], jitter=copies[1])


def encode(shards: ShardSet, space: LatentSpace, autoencoder: AutoencoderFiles, *, context: StageContext, anew: bool) -> ShardSet:
    """Encodes the images of a dataset that were not encoded before, and returns the receipt of the latents.

    Args:
        space: of `space_of`.
        anew: encode all of them.

    Raises:
        DataError: if dataset or autoencoder is not whole.
    """
    pixels = Location.of(shards.path)
    keep_autoencoder(autoencoder, context.storage)
    held = ("-mirrors" if space.mirrors else "") + (f"-{space.copies}x{space.jitter}" if space.copies else "")
    folder = context.storage / LATENTS / pixels.parent.name / (space.autoencoder + held)
    with alone(folder / ".lock", context.reporter, "encodes this source"):
        return _Encoding(read_manifest(pixels), pixels, folder, space, context).run(anew)


@dataclass(frozen=True)
class Task:
    """What a worker needs to know; everything is found from there."""

    pixels: str
    folder: str
    space: str
    use_gpu: bool


class _Encoding:
    """The encoding of one dataset. Killed at any point and begun again it goes on with the shards that are done, and ends with the same files."""

    def __init__(self, manifest: Manifest, pixels: Location, folder: Location, space: LatentSpace, context: StageContext) -> None:
        self.manifest, self.pixels, self.folder, self.space, self.context = manifest, pixels, folder, space, context

    def run(self, anew: bool) -> ShardSet:
        if anew:
            (self.folder / ENCODED).remove_tree()
        found = {} if anew else self._found()
        todo = [shard for shard in self.manifest.shards if shard.name not in found]
        images = sum(shard.rows for shard in todo)
        if todo and found:
            self.context.reporter.line(f"  {self.manifest.num_rows - images} of {counted(self.manifest.num_rows, 'image')} are encoded; {images} to encode")
        found |= self._encode(todo, images)
        return self._conclude(found, images)

    def _found(self) -> dict[str, Shard]:
        """Returns what shards of pixels became, as far as it is there."""
        there, records = (self.folder / SHARDS).files(), (self.folder / ENCODED).files()
        found = {}
        for shard in self.manifest.shards:
            with contextlib.suppress(OSError, ValidationError):
                record = _read_record(self.folder, shard.name) if f"{shard.name}.json" in records else None
                if record is not None and there.get(record.name) == record.bytes:
                    found[shard.name] = record
        return found

    def _encode(self, todo: list[Shard], images: int) -> dict[str, Shard]:
        if not todo:
            return {}
        use_gpu = _has_gpu() if self.context.cluster.accelerator != "cpu" else False
        task = Task(str(self.pixels), str(self.folder), self.space.model_dump_json(), use_gpu)
        work = Work(partial(_encode_rows, task=task), _codec.cache_clear, use_gpu=use_gpu)
        rows: list[Row] = [{"shard": shard.name, "split": shard.split} for shard in todo]
        numbers = {shard.name: shard.rows for shard in todo}
        found = {}
        with (
            self.context.reporter.progress("encoding", images, "images") as advance,
            _threads_kept(),
            contextlib.closing(parallel_map(rows, work, self.context.cluster)) as done,
        ):
            for row in done:
                found[row["shard"]] = _read_record(self.folder, row["shard"])
                advance(numbers[row["shard"]])
        return found

    def _conclude(self, found: dict[str, Shard], encoded: int) -> ShardSet:
        """Writes the dataset: the manifest of the pixels, of other shards."""
        version, staging = self.folder / self.pixels.name, self.folder / WORK
        shards = tuple(found[shard.name].model_copy(update={"split": shard.split}) for shard in self.manifest.shards)
        for name in (self.manifest.rows_file, QUARANTINE):
            (version / name).write_bytes((self.pixels / name).read_bytes(), staging=staging)
        digest = digest_of(self.manifest.digest, self.space.definition())
        manifest = self.manifest.model_copy(update={"digest": digest, "definition": "latents v1", "space": self.space, "shards": shards})
        with self.context.reporter.part("measuring the scale of latents"):
            space = self.space.fitted(lambda: RowReader(version, manifest).batches(ROWS_AT_ONCE))
        manifest = manifest.model_copy(update={"space": space})
        write_manifest(version, manifest, staging)
        staging.remove_tree()
        return ShardSet.of(version, manifest, inputs=self.context.inputs, num_opened=encoded, num_decoded=encoded)


def _read_record(folder: Location, pixels: str) -> Shard:
    return Shard.model_validate_json((folder / ENCODED / f"{pixels}.json").read_text())


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    """Gives this process its number of torch threads back, which encoding sets to one: sums of several are added up in another order."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _encode_rows(rows: Iterable[Row], task: Task) -> Iterator[Row]:
    import torch

    torch.set_num_threads(1)
    for row in rows:
        _encode_shard(row["shard"], row["split"], task)
        yield {"shard": row["shard"]}


def _encode_shard(name: str, split: str, task: Task) -> None:
    pixels, folder, space = Location.of(task.pixels), Location.of(task.folder), LatentSpace.model_validate_json(task.space)
    encode, staging = _codec(space.autoencoder, task.folder, "cuda" if task.use_gpu else "cpu").encode, folder / WORK
    table = read_checked_shard(shard_location(pixels, name))
    images = column_rows(table.column(space.pixels.column), space.pixels)
    made = shard_table(space, space.encoded(images, encode), table.column("label").combine_chunks(), table.column("source").combine_chunks())
    shard = write_shard(folder / SHARDS, made, space, "holdout" if split == "holdout" else "train", staging)
    (folder / ENCODED / f"{name}.json").write_text(shard.model_dump_json() + "\n", staging=staging)


@lru_cache(maxsize=1)
def _codec(digest: str, near: str, device: str):  # noqa: ANN202 - its type loads torch
    from components.autoencoder.codec import load_codec

    return load_codec(find_autoencoder(digest, Location.of(near)), device)


def is_intact(receipt: ShardSet) -> bool:
    """Tells whether the latents that a receipt describes are still there, whole and unchanged in digest."""
    folder = Location.of(receipt.path)
    try:
        manifest = read_manifest(folder)
        check_whole(folder, manifest)
    except DataError:
        return False
    return manifest.digest == receipt.digest and (folder / MANIFEST).is_file()
