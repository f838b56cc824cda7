"""Times `ddpm`'s preprocess stage beside a bare process pool and Hugging Face datasets, interleaved, and prints a Markdown table of medians.

    pip install -e ".[benchmark]"
    python benchmarks/preprocess.py [--cifar FOLDER] [--count 20000] [--photos 4000] [--rounds 5] [--workers CORES] [--without-datasets]

Two corpora: small JPEG files from a folder (made 32 pixels a side, which those of CIFAR-10 are), and photographs drawn here, 512 to 1024
pixels a side (made 64). Every measurement is a process of its own with empty caches; its imports are told apart as `start`. What is timed
after that:

ddpm      the whole stage: list, decode, hash, find duplicates, write chunks, shards and manifest. Where the work is large enough for Ray Data,
          Ray and its workers start in that time.
pool      the limit: multiprocessing.Pool over the same `decode`, given the list of files; the pixels stay in memory, nothing is written.
datasets  Dataset.from_dict of the paths, then `map(batched=True, num_proc=WORKERS)` with the usual Pillow code into an Arrow file, the
          pixels as an Array3D column or as plain bytes: both are measured, and the faster counts. Tried and slower: batches of 16, 64
          and 1000 for 256, load_dataset("imagefolder") (seven times the CPU on small files), an Image column (PNG, twice).

`steady` is the slope between a quarter of the images and all of them: the rate when starting costs nothing. CPU is that of all processes
together in the timed part: it changes less than the time does when others use the machine.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image, ImageDraw, ImageOps, features

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from components.data.images import decode, prepare_process
from components.spaces.pixels import PixelSpace

POOL_PARTS, POOL_FILES = 16, 128
DATASETS_BATCH, DATASETS_WRITER_BATCH = 256, 1000
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
GREY_TOLERANCE = 0.5
CLOUDS_SIDE = 3072


@dataclass(frozen=True)
class Corpus:
    """Images in a folder, and a quarter of them in another.

    Attributes:
        size: height and width that they are resized to, pixels.
    """

    name: str
    whole: Path
    quarter: Path
    size: int


@dataclass(frozen=True)
class Measurement:
    """One contender, once, over one folder.

    Attributes:
        images: files that were read.
        grey: mean of all pixels, so that a contender that makes something else is noticed.
        start: seconds before the work: imports, and Ray.
        wall: seconds of the work.
        cpu: CPU seconds of the work, all processes together.
    """

    images: int
    grey: float
    start: float
    wall: float
    cpu: float


class Stopwatch:
    """Wall and CPU seconds of a block, those of all processes below this one included."""

    wall = cpu = 0.0

    def __enter__(self) -> "Stopwatch":
        self._cpu, self._began = cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._began, cpu_seconds() - self._cpu


def cpu_seconds() -> float:
    """Returns the CPU time of this process and of all below it, the ended ones included."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.Error:
            continue
    return total


def files_below(folder: Path) -> list[str]:
    """Returns the image files of a folder, sorted."""
    return sorted(str(path) for path in folder.rglob("*.jpg"))


def run_ddpm(folder: Path, size: int, workers: int, scratch: Path) -> Measurement:
    """Runs the stage as `ddpm preprocess` does."""
    with Stopwatch() as start:
        from cluster.config import ClusterConfig
        from cluster.connect import disconnect
        from components.ingest.sources import DataConfig
        from components.storage import Location
        from pipeline.context import Reporter, StageContext
        from pipeline.preprocess import list_source, preprocess

        cluster, storage = ClusterConfig(storage=str(scratch)), Location.of(scratch)
        os.cpu_count = lambda: workers  # so many decoders there are, and so many CPUs is a Ray on this machine given
    config = DataConfig(source=str(folder), image_size=size)
    context = StageContext(storage, storage / "stage", "inputs", "benchmark", cluster, Reporter())
    with Stopwatch() as work:
        receipt = preprocess(config, list_source(config, storage), context=context)
    disconnect()
    return Measurement(receipt.num_listed, _grey_of_shards(receipt.path), start.wall, work.wall, work.cpu)


def _grey_of_shards(folder: str) -> float:
    from components.data.reader import RowReader
    from components.data.shards import read_manifest
    from components.storage import Location

    location = Location.of(folder)
    manifest = read_manifest(location)
    return sum(float(pixels.sum()) for pixels in RowReader(location, manifest).batches(1024)) / (manifest.num_train * manifest.space.row_bytes)


def run_pool(folder: Path, size: int, workers: int, scratch: Path) -> Measurement:
    """Decodes and resizes in a pool of processes, and keeps the pixels there."""
    del scratch
    files, recipe = files_below(folder), PixelSpace(image_size=size)
    length = max(1, min(POOL_FILES, len(files) // (POOL_PARTS * workers)))
    parts = [files[first : first + length] for first in range(0, len(files), length)]
    with Stopwatch() as work, Pool(workers, prepare_process) as pool:
        sums = list(pool.imap_unordered(partial(_decode_part, recipe=recipe), parts))
        pool.close()
        pool.join()
    return Measurement(len(files), sum(sums) / (len(files) * recipe.row_bytes), 0.0, work.wall, work.cpu)


def _decode_part(files: list[str], recipe: PixelSpace) -> int:
    pixels = np.empty((len(files), *recipe.shape), np.uint8)
    for place, file in enumerate(files):
        pixels[place] = decode(Path(file).read_bytes(), recipe)
    return int(pixels.sum())


def run_datasets(folder: Path, size: int, workers: int, scratch: Path, column: str) -> Measurement:
    """Maps the usual Pillow code over an image column, into an Arrow file."""
    with Stopwatch() as start:
        datasets: Any = importlib.import_module("datasets")  # by name, as it is no dependency of the project
    with Stopwatch() as work:
        feature = datasets.Array3D((size, size, 3), "uint8") if column == "array" else datasets.Value("binary")
        images = datasets.Dataset.from_dict({"image": files_below(folder)}).cast_column("image", datasets.Image(mode="RGB"))
        mapped = images.map(
            partial(_to_pixels, size=size, column=column),
            batched=True,
            batch_size=DATASETS_BATCH,
            writer_batch_size=DATASETS_WRITER_BATCH,
            num_proc=workers,
            remove_columns=["image"],
            features=datasets.Features({"pixels": feature}),
            cache_file_name=str(scratch / "mapped.arrow"),
            load_from_cache_file=False,
        )
    return Measurement(len(mapped), _grey_of_rows(mapped, column), start.wall, work.wall, work.cpu)


def _to_pixels(batch: dict[str, list[Image.Image]], size: int, column: str) -> dict[str, list[Any]]:
    # datasets has turned the images as EXIF says, and converted them to RGB.
    small = [ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC) for image in batch["image"]]
    return {"pixels": [np.asarray(image) if column == "array" else image.tobytes() for image in small]}


def _grey_of_rows(mapped: Any, column: str) -> float:
    rows = mapped.with_format("numpy") if column == "array" else mapped
    total = size = 0
    for first in range(0, len(mapped), 1024):
        pixels = rows[first : first + 1024]["pixels"]
        values = np.asarray(pixels) if column == "array" else np.frombuffer(b"".join(pixels), np.uint8)
        total, size = total + int(values.sum()), size + values.size
    return total / size


CONTENDERS: dict[str, Callable[[Path, int, int, Path], Measurement]] = {
    "ddpm": run_ddpm,
    "pool": run_pool,
    "datasets, array": partial(run_datasets, column="array"),
    "datasets, bytes": partial(run_datasets, column="bytes"),
}


def measure(rival: str, folder: Path, size: int, workers: int) -> Measurement:
    """Runs a contender in a process of its own, with nothing cached."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        environment = {**os.environ, **OFFLINE, "HF_HOME": scratch, "PYTHONPATH": str(ROOT), "TMPDIR": tempfile.gettempdir()}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of Ray's processes compiles again what it imports
        arguments = ["--contender", rival, str(folder), str(size), str(workers), scratch]
        command = [sys.executable, str(Path(__file__).resolve()), *arguments]
        # From the root, for Ray's workers import from the current folder before any other.
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{rival} failed over {folder}: {done.stderr[-4000:]}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def copy_some(source: Path, target: Path, count: int) -> None:
    """Copies `count` of the images below a folder, evenly spread over its listing."""
    files = files_below(source)
    if len(files) < count:
        raise SystemExit(f"{source} holds {len(files)} .jpg files; name a folder of at least --count {count}")
    for file in (files[number * len(files) // count] for number in range(count)):
        copy = target / Path(file).relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def write_photographs(target: Path, count: int) -> None:
    """Draws photographs, the same ones each time."""
    target.mkdir(parents=True)
    with Pool() as pool:
        pool.map(partial(_write_photograph, target=target), range(count))


def _write_photograph(number: int, target: Path) -> None:
    """Writes a JPEG: gradients, noise of many octaves and some shapes; one in three upright, one in four turned by EXIF."""
    rng = np.random.default_rng(number)
    width, height = (int(side) for side in sorted(rng.integers(512, 1025, 2), reverse=number % 3 != 0))
    left, top = (int(value) for value in rng.integers(0, CLOUDS_SIDE - 1024, 2))
    canvas = Image.fromarray(np.roll(_clouds()[top : top + height, left : left + width], int(rng.integers(3)), axis=2))
    draw = ImageDraw.Draw(canvas)
    for _ in range(12):
        left, top, long = (int(value) for value in rng.integers(0, 900, 3))
        shape = draw.ellipse if rng.integers(2) else draw.rectangle
        shape((left, top, left + long // 3, top + long // 4), fill=tuple(int(value) for value in rng.integers(0, 256, 3)))
    grain = 5 * rng.standard_normal((height, width, 1), np.float32)
    pixels = (np.asarray(canvas) + grain).clip(0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = int(rng.choice([3, 6, 8])) if number % 4 == 0 else 1
    Image.fromarray(pixels).save(target / f"{number:06d}.jpg", quality=int(rng.integers(85, 96)), exif=exif)


@lru_cache
def _clouds() -> np.ndarray:
    """Returns smooth noise (CLOUDS_SIDE, CLOUDS_SIDE, 3) uint8 whose amplitude falls with its frequency, as that of photographs does."""
    rng, values = np.random.default_rng(0), np.full((CLOUDS_SIDE, CLOUDS_SIDE, 3), 128, np.float32)
    for octave in range(2, 11):
        coarse = rng.normal(0, 160 / 1.8**octave, (2**octave, 2**octave, 3)).astype(np.float32)
        for channel in range(3):
            values[:, :, channel] += np.asarray(Image.fromarray(coarse[:, :, channel]).resize((CLOUDS_SIDE, CLOUDS_SIDE), Image.Resampling.BICUBIC))
    return values.clip(0, 255).astype(np.uint8)


def make_corpora(options: argparse.Namespace, folder: Path) -> list[Corpus]:
    """Writes the images to measure on, and a quarter of each corpus beside it."""
    corpora = []
    if options.cifar:
        copy_some(options.cifar, folder / "small", options.count)
        corpora.append(Corpus("small files", folder / "small", folder / "small-quarter", 32))
    if options.photos:
        write_photographs(folder / "photographs", options.photos)
        corpora.append(Corpus("photographs", folder / "photographs", folder / "photographs-quarter", 64))
    for corpus in corpora:
        copy_some(corpus.whole, corpus.quarter, len(files_below(corpus.whole)) // 4)
    return corpora


def compare(corpus: Corpus, contenders: Sequence[str], rounds: int, workers: int) -> list[str]:
    """Measures the contenders in turn; returns lines of the table."""
    whole: dict[str, list[Measurement]] = {name: [] for name in contenders}
    quarter: dict[str, list[Measurement]] = {name: [] for name in contenders}
    for name in contenders:  # warms the disk's cache up, and compiles
        measure(name, corpus.quarter, corpus.size, workers)
    for number in range(rounds):
        for name in contenders:
            quarter[name].append(measure(name, corpus.quarter, corpus.size, workers))
            whole[name].append(measure(name, corpus.whole, corpus.size, workers))
            print(f"{corpus.name}, round {number + 1} of {rounds}: {name} {whole[name][-1]}", file=sys.stderr, flush=True)
    greys = [runs[0].grey for runs in whole.values()]
    if max(greys) - min(greys) > GREY_TOLERANCE:
        raise RuntimeError(f"the contenders differ in what they make of {corpus.name}: mean grey values {greys}")
    return [_line(corpus, name, whole[name], quarter[name], _median(whole["pool"], "wall")) for name in contenders]


def _line(corpus: Corpus, name: str, whole: Sequence[Measurement], quarter: Sequence[Measurement], limit: float) -> str:
    images, wall, cpu, start = whole[0].images, _median(whole, "wall"), _median(whole, "cpu"), _median(whole, "start")
    more = images - quarter[0].images
    slope, cpu_slope = wall - _median(quarter, "wall"), cpu - _median(quarter, "cpu")
    steady = f"{more / slope:.0f}" if slope > 0 else "-"
    cells = [f"{images / wall:.0f}", f"{limit / wall:.2f}", f"{cpu / images * 1000:.2f} ms", steady, f"{cpu_slope / more * 1000:.2f} ms"]
    return f"| {' | '.join([f'{images} {corpus.name}', name, *cells, f'{wall:.2f} s', f'{start:.2f} s'])} |"


def _median(runs: Sequence[Measurement], what: str) -> float:
    return statistics.median(getattr(run, what) for run in runs)


def describe_machine(workers: int) -> str:
    """Returns what the numbers depend on besides the code."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    vectors = "AVX512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX"
    versions = {name: _version(name) for name in ("pillow", "datasets", "ray", "pyarrow", "numpy")}
    turbo = features.version("libjpeg_turbo") or "none"
    parts = [f"{workers} workers", f"{os.cpu_count()} cores", f"{platform.machine()} {vectors}", f"Python {platform.python_version()}"]
    return ", ".join([*parts, f"libjpeg-turbo {turbo}", *(f"{name} {version}" for name, version in versions.items())])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def parse() -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="folder of small .jpg files")
    for name, default in (("--count", 20_000), ("--photos", 4000), ("--rounds", 5), ("--workers", os.cpu_count() or 1)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--without-datasets", action="store_true")
    parser.add_argument("--contender", nargs=5, help=argparse.SUPPRESS)  # what `measure` starts
    return parser.parse_args()


def main() -> None:
    """Runs the rounds and prints the table; or, as a child, runs one contender and prints its measurement."""
    options = parse()
    if options.rival:
        name, folder, size, workers, scratch = options.rival
        print(json.dumps(asdict(CONTENDERS[name](Path(folder), int(size), int(workers), Path(scratch)))))
        return
    contenders = [name for name in CONTENDERS if not (options.without_datasets and name.startswith("datasets"))]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        corpora = make_corpora(options, Path(folder))
        lines = [line for corpus in corpora for line in compare(corpus, contenders, options.rounds, options.workers)]
    print(f"{describe_machine(options.workers)}; medians of {options.rounds} rounds\n")
    heads = ("images", "contender", "images/s", "of the pool", "CPU an image", "steady images/s", "steady CPU an image", "work", "start")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
