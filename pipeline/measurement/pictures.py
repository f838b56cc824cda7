"""What a person looks at after an evaluation: grids, curves, pairs, and one page with all of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from components.charts import save_loss_curve, save_timestep_losses
from components.counts import counted
from components.data.reader import RowReader
from components.data.shards import Split, read_manifest
from components.figures import closest_pairs, grid, interpolation_sheet
from components.model.spec import read_spec
from components.process import Moment, all_schedules, forward_picture, gif_bytes, reverse_frames, save_schedules
from components.report.page import write_report
from components.report.records import Estimate, Number, Picture, Report, Section, Verdict
from components.scratch import scratch
from components.spaces.space import Space
from components.storage import Location
from pipeline.artifacts import Evaluation, Metric, MetricUnit, ShardSet, TrainedModel
from pipeline.measurement.evaluator import Evaluator, Numbers
from pipeline.measurement.sample_store import RealSet, SampleSet
from pipeline.tracking import git_commit
from pipeline.training.metrics_log import read_metrics

GRID_COLUMNS = 12
ANIMATION_SEEDS, ANIMATION_COLUMNS, ANIMATION_FRAMES = range(16), 4, 40
FORWARD_IMAGES = 4
PAIRS, PAIR_STEPS = ((0, 1), (2, 3), (4, 5), (6, 7)), 9
LOSS_TIMESTEPS, ROWS_AT_ONCE = 20, 64
MOST_PAIRS = 16
BETWEEN = "Spherical interpolation of the starting noise, each image from the same network."
SEEDS_AT_ONCE, ROWS_IN_A_PART = 4, 500
FILES = {
    "grid": "grid.png",
    "animation": "denoising.gif",
    "forward": "forward.png",
    "schedule": "schedule.png",
    "interpolation": "interpolation.png",
    "loss_curve": "loss.png",
    "timesteps": "timesteps.png",
    "copies": "neighbours.png",
}


@dataclass(frozen=True)
class Pictures:
    """What was drawn, by name: the content of the files of FILES that there are."""

    folder: Location
    contents: dict[str, bytes]

    def address(self, name: str) -> str:
        """Returns where a picture lies."""
        return str(self.folder / FILES[name])


def seeds_shown(space: Space) -> range:
    """Returns the seeds of the samples that a person sees: the same for every model, so that changes from one version to the next show."""
    return range(space.rows_in_a_picture)


def draw_pictures(evaluator: Evaluator, samples: SampleSet, numbers: Numbers, model: TrainedModel, pixels: Location) -> Pictures:
    """Draws what the page shows and writes it to the stage's folder; where few samples are measured, fewer are drawn to be looked at.

    Args:
        pixels: folder with the pixels of samples, as far as they were drawn.
    """
    folder, few = evaluator.context.folder, evaluator.config.num_samples
    space = evaluator.manifest.space
    images = evaluator.pixels(samples, seeds_shown(space)[:few], evaluator.config.seeds, pixels)
    if samples.originals is not None:
        return _draw_reconstructions(evaluator, samples, images, numbers, model, pixels)
    frames = _draw_animation(evaluator, samples, (ANIMATION_SEEDS if space.one_tile_per_row else seeds_shown(space))[:few])
    pairs = PAIRS[: max(1, few // 2)]
    between = _draw_between(evaluator, samples, pairs) if space.one_tile_per_row else None
    with scratch("pictures") as staging:
        paths = {name: staging / file for name, file in FILES.items()}
        grid(space.tiles(images), GRID_COLUMNS).save(paths["grid"])
        paths["animation"].write_bytes(gif_bytes(reverse_frames(space, frames, ANIMATION_COLUMNS)))
        _draw_forward(evaluator, samples, paths["forward"], paths["schedule"])
        if between is not None:
            tiles = space.tiles(between.reshape(-1, *space.shape))
            sheet = interpolation_sheet(tiles.reshape(*between.shape[:2], *tiles.shape[1:]), pairs, BETWEEN)
            sheet.save(paths["interpolation"])
        _draw_loss(model, paths["loss_curve"])
        _draw_timesteps(evaluator, samples, paths["timesteps"])
        _draw_copies(evaluator, samples, numbers, paths["copies"], pixels)
        folder.upload(staging)
        return Pictures(folder, {name: path.read_bytes() for name, path in paths.items() if path.is_file()})


def _draw_reconstructions(evaluator: Evaluator, samples: SampleSet, images: np.ndarray, numbers: Numbers, model: TrainedModel, pixels: Location) -> Pictures:
    """Draws what an autoencoder is looked at by: originals, and below each row of them what became of it."""
    assert samples.originals is not None
    reader = RowReader(Location.of(evaluator.shards.path), evaluator.manifest, samples.originals.split)
    space, folder = evaluator.manifest.space, evaluator.context.folder
    originals, rows = reader.rows(np.arange(len(images)) % len(reader)), range(0, len(images), GRID_COLUMNS)
    tiles = [part for first in rows for values in (originals, images) for part in values[first : first + GRID_COLUMNS]]
    with scratch("pictures") as staging:
        paths = {name: staging / file for name, file in FILES.items()}
        grid(space.tiles(np.stack(tiles)), min(GRID_COLUMNS, len(images))).save(paths["grid"])
        _draw_loss(model, paths["loss_curve"])
        _draw_copies(evaluator, samples, numbers, paths["copies"], pixels)
        folder.upload(staging)
        return Pictures(folder, {name: path.read_bytes() for name, path in paths.items() if path.is_file()})


def _draw_loss(model: TrainedModel, path: Path) -> None:
    """Draws the loss curves of a training, if it has any."""
    lines = [line for line in read_metrics(Location.of(model.folder)) if "train/loss" in line.metrics]
    held_out = [(line.step, line.metrics["validation/loss"]) for line in lines if "validation/loss" in line.metrics]
    if lines:
        save_loss_curve(path, [line.step for line in lines], [line.metrics["train/loss"] for line in lines], held_out)


def _draw_forward(evaluator: Evaluator, samples: SampleSet, forward: Path, schedules: Path) -> None:
    """Draws what the noise of the model's process does to some rows to train on, and its schedule among the others."""
    from components.diffusion.process import make_process

    folder, diffusion = Location.of(evaluator.trained_on.path), read_spec(Location.of(samples.checkpoint)).diffusion
    manifest = read_manifest(folder)
    space, count = manifest.space.opened(folder), manifest.num_train
    numbers = np.linspace(0, count - 1, min(count, FORWARD_IMAGES if space.one_tile_per_row else space.rows_in_a_picture)).round().astype(int)
    rows = RowReader(folder, manifest).rows(numbers)
    forward_picture(space, make_process(diffusion), rows, diffusion.describe()).save(forward)
    save_schedules(schedules, all_schedules(diffusion.num_steps))


def _draw_animation(evaluator: Evaluator, samples: SampleSet, seeds: range) -> list[Moment]:
    """Returns what some steps see while seeds are drawn."""
    size = SEEDS_AT_ONCE if evaluator.manifest.space.one_tile_per_row else ROWS_IN_A_PART
    parts = [list(seeds[first : first + size]) for first in range(0, len(seeds), size)]
    found = []
    with evaluator.context.reporter.progress("drawing an animation", len(seeds), f"{evaluator.manifest.space.noun}s") as advance:
        for part, frames in zip(parts, evaluator.actor_pool.map("animation", ((samples, part, ANIMATION_FRAMES) for part in parts)), strict=True):
            found.append(frames)
            advance(len(part))
    whole = [(moments[0], [moment.x_t for moment in moments], [moment.x_0 for moment in moments]) for moments in zip(*found, strict=True)]
    return [replace(moment, x_t=np.concatenate(x_t), x_0=np.concatenate(x_0)) for moment, x_t, x_0 in whole]


def _draw_between(evaluator: Evaluator, samples: SampleSet, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns images between pairs of seeds: pixels (len(pairs), PAIR_STEPS, C, H, W)."""
    found = []
    with evaluator.context.reporter.progress("drawing between seeds", len(pairs) * PAIR_STEPS, "images") as advance:
        for rows in evaluator.actor_pool.map("interpolate", ((samples, [pair], PAIR_STEPS) for pair in pairs)):
            found.append(rows)
            advance(PAIR_STEPS)
    return np.concatenate(found)


def _draw_timesteps(evaluator: Evaluator, samples: SampleSet, path: Path) -> None:
    """Draws the loss at single noise levels, on training and on held-out images: as many as samples are measured, up to `evaluate.loss_images`."""
    from components.diffusion.process import make_process

    noun = f"{evaluator.manifest.space.noun}s"
    splits: dict[str, Split] = {f"training {noun}": "train", f"held-out {noun}": "holdout"}
    process = make_process(read_spec(Location.of(samples.checkpoint)).diffusion)
    times = process.times(LOSS_TIMESTEPS)
    curves = {name: _losses(evaluator, samples, split, times) for name, split in splits.items() if evaluator.manifest.splits.get(split, 0)}
    save_timestep_losses(path, times, curves, process.config.process)


def _losses(evaluator: Evaluator, samples: SampleSet, split: Split, times: Sequence[float]) -> list[float]:
    """Returns the loss at some time steps; all actors work on it, and how many they are is no part of the result."""
    count = evaluator.manifest.splits[split]
    rows = np.linspace(0, count - 1, min(evaluator.config.loss_images, evaluator.config.num_samples, count)).round().astype(int).tolist()
    real = RealSet(evaluator.context.storage, evaluator.trained_on.path, split)
    pieces = [(index, first) for index in range(len(times)) for first in range(0, len(rows), ROWS_AT_ONCE)]
    work = ((samples, real, rows[first : first + ROWS_AT_ONCE], first, times[index]) for index, first in pieces)
    sums = np.zeros(len(times))
    what = "the loss at each noise level" if split == "train" else "the same on held-out images"
    with evaluator.context.reporter.progress(what, len(times) * len(rows), f"{evaluator.manifest.space.noun}s") as advance:
        for (index, first), loss in zip(pieces, evaluator.actor_pool.map("loss_at", work), strict=True):
            sums[index] += loss
            advance(len(rows[first : first + ROWS_AT_ONCE]))
    return (sums / len(rows)).tolist()


def _draw_copies(evaluator: Evaluator, samples: SampleSet, numbers: Numbers, path: Path, pixels: Location) -> None:
    """Draws the samples that are nearest to a training image, beside it."""
    space = evaluator.manifest.space
    if numbers.copies is None or not space.one_tile_per_row:
        return
    verdict, found = numbers.copies
    pairs = found[:MOST_PAIRS]
    seeds = [evaluator.config.first_seed + pair.sample for pair in pairs]
    ours = evaluator.pixels(samples, seeds, evaluator.config.seeds, pixels)
    theirs = RowReader(Location.of(evaluator.shards.path), evaluator.manifest).rows(np.asarray([pair.training_row for pair in pairs]))
    closest_pairs(space.tiles(ours), space.tiles(theirs), [pair.distance for pair in pairs], verdict.threshold).save(path)


def write_page(evaluation: Evaluation, model: TrainedModel, shards: ShardSet, pictures: Pictures) -> None:
    """Writes the evaluation's page: one file that holds everything."""
    metric = evaluation.metric
    report = Report(
        title=f"{Location.of(evaluation.folder).parent.parent.name}: evaluation",
        subtitle=f"{counted(evaluation.step, 'step', ',')} on {counted(shards.num_train, shards.space.noun, ',')} of {shards.source}; "
        f"{counted(metric.unit.num_samples, 'sample', ',')} by {metric.unit.drawn_by}",
        verdict=_verdict(evaluation, shards.space.noun),
        warnings=evaluation.warnings,
        numbers=[_deciding(evaluation), *map(as_number, (*evaluation.guards, *evaluation.scores))],
        sections=_sections(evaluation, pictures, shards.space),
        provenance={
            "dataset": shards.digest,
            "config": model.config_digest,
            "checkpoint": f"{Location.of(evaluation.checkpoint).name}, {evaluation.weights}",
            "weights SHA-256": evaluation.weights_sha256,
            "samples SHA-256": evaluation.samples_sha256,
            "commit": git_commit(),
        },
    )
    write_report(Location.of(evaluation.report), report)


def _deciding(evaluation: Evaluation) -> Number:
    note = f"without the bias of {counted(evaluation.metric.unit.num_samples, 'sample', ',')}, by the jackknife: {evaluation.jackknifed:.4g}"
    return replace(as_number(evaluation.metric), note=note)


def as_number(metric: Metric) -> Number:
    """Returns a metric as the page's table shows it."""
    estimate = Estimate(metric.value) if metric.standard_error is None else Estimate.of(metric.value, metric.standard_error)
    note = "" if metric.spread is None else f"standard deviation {metric.spread:.3g} over subsets"
    return Number(metric.name, estimate, unit_of(metric.unit), "lower" if metric.kind in ("frechet", "energy", "kernel") else "higher", note)


def unit_of(unit: MetricUnit) -> dict[str, str]:
    """Returns the parts of a unit as a page names them."""
    return {
        "extractor": f"{unit.features} ({unit.extractor_digest[:8]})",
        "preprocessing": unit.preprocessing,
        "reference": f"{unit.reference_split} of {unit.reference_digest[:16]}",
        "reference images": f"{unit.reference_count:,}" if unit.reference_count else "not said",
        "samples": f"{unit.num_samples:,} from seed {unit.first_seed}",
        "sampler": unit.drawn_by,
        "weights": unit.weights,
    }


def _verdict(evaluation: Evaluation, noun: str) -> Verdict:
    metric, floor = evaluation.metric, evaluation.floor
    text = f"{metric.name} = {metric.value:.4g}"
    if metric.standard_error is not None:
        text += f" ± {1.96 * metric.standard_error:.2g}"
    if floor is not None:
        spread = "" if floor.spread is None else f" ± {1.96 * floor.spread:.2g}"
        text += f"; {floor.count:,} real {noun}s score {floor.value:.4g}{spread} ({floor.measured})"
    if evaluation.bits_per_dimension is not None:
        text += f"; held-out {noun}s take at most {evaluation.bits_per_dimension:.4g} bits per dimension"
    copies = evaluation.memorisation
    if copies is not None:
        text += f"; {copies.verdict}"
    return Verdict(f"{text}.", "bad" if copies is not None and copies.copies else "neutral")


def _sections(evaluation: Evaluation, pictures: Pictures, space: Space) -> list[Section]:
    last = seeds_shown(space)[: evaluation.metric.unit.num_samples][-1]
    sections = [
        Section("Samples", f"Seeds from 0 to {last} for every model, so that pages can be laid side by side.", _shown(pictures, _SAMPLES)),
        Section("Process", "", _shown(pictures, _PROCESS)),
        Section("Training", "", _shown(pictures, _TRAINING)),
    ]
    if evaluation.memorisation is not None:
        copies = evaluation.memorisation
        verdict = (
            f"{copies.copy_rate:.2%} of {counted(copies.num_samples, 'sample', ',')} (99 % bounds {copies.lower:.2%} and {copies.upper:.2%}) are nearer to "
            f"one of {copies.num_searched:,} training images than {1 - copies.expected:.0%} of honest images are; about {copies.expected:.0%} is expected."
        )
        sections.append(
            Section(
                "Memorisation",
                f"Threshold taken of {copies.calibration}.",
                _shown(pictures, _COPIES),
                Verdict(verdict, "bad" if copies.copies else "neutral" if copies.suspicious else "good"),
            )
        )
    return sections


_SAMPLES = {
    "grid": ("Samples.", "One seed each, the same order on every page.", False),
    "animation": (
        "From noise to samples.",
        "x_t, and the network's estimate of x_0; points in the colour of where they end.",
        False,
    ),
    "interpolation": ("Between pairs of seeds.", "Neighbours should change gradually; a jump or a blur in the middle is a fault.", False),
}
_TRAINING = {
    "loss_curve": ("The loss over training steps.", "", True),
    "timesteps": ("The loss at single noise levels.", "Held-out images far above training images mean overfitting.", True),
}
_PROCESS = {
    "forward": ("What the noise of the process does to data.", "The same noise at every t, the signal-to-noise ratio beneath.", False),
    "schedule": ("The schedules that there are.", "This model's is named above.", True),
}
_COPIES = {"copies": ("The samples nearest to a training image, and that image.", "Equal pairs are copies; alike ones are the data's own regularity.", False)}


def _shown(pictures: Pictures, names: dict[str, tuple[str, str, bool]]) -> Sequence[Picture]:
    return [
        Picture(pictures.contents[name], shows.rstrip("."), shows, reading, is_chart)
        for name, (shows, reading, is_chart) in names.items()
        if name in pictures.contents
    ]
