"""`ddpm compare`: models side by side, and `ddpm reference`: a dataset's statistics as a file."""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from cluster.config import ClusterConfig
from components.charts import StepsPoint, save_steps_chart
from components.counts import counted
from components.data.catalog import find_dataset
from components.diffusion.recipe import Recipe
from components.figures import Strip, contact_sheet
from components.model.spec import read_spec
from components.report.page import format_estimate, write_report
from components.report.records import Compared, Estimate, Picture, Report, Section, Verdict
from components.report.records import Comparison as Side
from components.scratch import scratch
from components.storage import Location
from pipeline.config import load_sections
from pipeline.context import Reporter, StageContext
from pipeline.errors import ConfigError
from pipeline.measurement.compare import ComparedModel, Comparison, Result, compare, shard_set_of
from pipeline.measurement.config import EvaluateConfig
from pipeline.measurement.evaluator import open_evaluator
from pipeline.measurement.extractors import check_extractor, check_files
from pipeline.measurement.pictures import unit_of
from pipeline.preflight import check_storage
from pipeline.ray_session import ray_session
from pipeline.registry.versions import SETTINGS_TAG, fetch_checkpoint, find_model
from pipeline.tracking import Tracking, connect

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


MIN_ROWS = 2


@dataclass(frozen=True)
class Wanted:
    """What a person asks `ddpm compare` for.

    Attributes:
        settings: of the evaluate section, `key=value`, laid on those of the first registered model.
        samplers, steps: every pair of them is measured; none means the settings'.
    """

    models: Sequence[str]
    dataset: str | None
    samplers: Sequence[str]
    steps: Sequence[int]
    settings: Sequence[str]
    out: Path
    storage: str


@dataclass(frozen=True)
class Found:
    """A model that a person named: where its checkpoint lies, and its version where the registry has one."""

    entrant: ComparedModel
    version: "ModelVersion | None"


def compare_models(wanted: Wanted) -> tuple[Comparison, Path]:
    """Measures models side by side, writes a page and a picture, and returns what was found and where the page is.

    Raises:
        ConfigError: if a setting is wrong, or there is no dataset to measure against.
        DataError: if a checkpoint or the dataset is not whole.
        RegistryError: if the registry does not know a model.
    """
    storage = check_storage(wanted.storage)
    tracking = connect(storage, create=False) if any(model.startswith("models:/") for model in wanted.models) else None
    found = _named_apart([_find(model, tracking, storage) for model in wanted.models])
    first = next((each.version for each in found if each.version is not None), None)
    dataset = find_dataset(_dataset(wanted, first), storage)
    config, cluster = load_sections({"evaluate": _settings(first), "cluster": {"storage": wanted.storage}}, wanted.settings)
    recipes = _recipes(config, wanted, found)
    shards = shard_set_of(dataset.folder)
    check_files(config)
    check_extractor(config, shards, storage)
    context = _context(storage, cluster, "compare", wanted)
    with ray_session(cluster, storage, context.run_name, context.reporter.line):
        comparison = compare([each.entrant for each in found], recipes, config, dataset.folder, context=context)
    with scratch("compare") as staging:
        page = write_comparison(staging, comparison, [each.entrant.name for each in found])
        for run_id in {str(each.version.run_id) for each in found if each.version is not None}:
            if tracking is not None:
                tracking.log_files(run_id, Location.of(staging), f"compare/{context.inputs}")
        _hand_over(staging, wanted.out)
    return comparison, wanted.out / page.name


def _hand_over(staging: Path, out: Path) -> None:
    try:
        out.mkdir(exist_ok=True)
        for file in staging.iterdir():
            shutil.copyfile(file, out / file.name)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}); name a folder with write permission") from error


def _named_apart(found: Sequence[Found]) -> list[Found]:
    """Returns models with a number behind names that come twice."""
    names = [each.entrant.name for each in found]
    apart = [f"{name} ({names[:place].count(name) + 1})" if names[:place].count(name) else name for place, name in enumerate(names)]
    return [replace(each, entrant=replace(each.entrant, name=name)) for each, name in zip(found, apart, strict=True)]


def _find(model: str, tracking: Tracking | None, storage: Location) -> Found:
    if tracking is None or not model.startswith("models:/"):
        return Found(ComparedModel(model, Location.of(model)), None)
    version = find_model(tracking, model)
    return Found(ComparedModel(f"{version.name} v{version.version}", fetch_checkpoint(tracking, model, storage)), version)


def _dataset(wanted: Wanted, first: "ModelVersion | None") -> str:
    known = wanted.dataset or (first.tags.get("dataset.digest") if first is not None else None)
    if known is None:
        raise ConfigError("--dataset is missing, and no model names one; name a dataset of `ddpm data list`")
    return known


def _settings(first: "ModelVersion | None") -> dict[str, object]:
    """Returns the settings that a version was measured by, so that it is measured alike; the defaults where it says nothing."""
    if first is None:
        return {}
    try:
        # Before there was a choice of arithmetic it was float32, and settings did not say so.
        settings = EvaluateConfig.model_validate({"precision": "float32"} | json.loads(first.tags[SETTINGS_TAG]))
    except (KeyError, ValueError, TypeError):
        settings = EvaluateConfig()
    return settings.model_dump(mode="json", exclude_defaults=True, exclude={"keep_samples", "election_samples"})


def _recipes(config: EvaluateConfig, wanted: Wanted, found: Sequence[Found]) -> list[Recipe]:
    """Returns every pair of sampler and number of steps, checked against every model."""
    specs = [read_spec(each.entrant.checkpoint) for each in found]
    recipes = []
    for sampler, steps in product(wanted.samplers or [config.sampler], wanted.steps or [config.steps]):
        settings = config.model_dump(mode="json") | {"sampler": sampler, "steps": steps}
        try:
            recipe = EvaluateConfig.model_validate(settings).recipe
            for spec, each in zip(specs, found, strict=True):
                recipe.check_process(spec.diffusion)
                if recipe.guidance != 1 and spec.null_label is None:
                    raise ConfigError(
                        f"evaluate.guidance={recipe.guidance} needs conditional models, and {each.entrant.name} is none; use --set evaluate.guidance=1"
                    )
        except ValidationError as error:
            raise ConfigError(f"--samplers {sampler} --steps {steps}: {error.errors()[0]['msg']}") from error
        except ValueError as error:
            raise ConfigError(f"--{error}") from error
        recipes.append(recipe)
    return recipes


def _context(storage: Location, cluster: ClusterConfig, name: str, wanted: object) -> StageContext:
    inputs = hashlib.sha256(repr(wanted).encode()).hexdigest()[:12]
    return StageContext(storage, storage / name / inputs, inputs, name, cluster, Reporter())


def write_comparison(folder: Path, comparison: Comparison, names: Sequence[str]) -> Path:
    """Writes the page and the pictures of a comparison; returns the page's path."""
    first = comparison.results[: len(names)]
    strips = [Strip(name, f"{result.metric.value:.4g}", pixels) for name, result, pixels in zip(names, first, comparison.pixels, strict=True)]
    headings = [str(seed) for seed in range(len(comparison.pixels[0]))]
    contact_sheet(strips, "The same seeds", first[0].recipe, headings).save(folder / "samples.png")
    pictures = [
        Picture((folder / "samples.png").read_bytes(), "samples of every model", "The same seeds by every model.", "What changes is the models' doing.")
    ]
    pictures += [_steps_chart(folder, comparison, name) for name in names if len(_of(comparison, name)) > 1]
    write_report(folder / "compare.html", _report(comparison, names, pictures))
    return folder / "compare.html"


def _of(comparison: Comparison, name: str) -> list[Result]:
    return [result for result in comparison.results if result.model == name]


def _steps_chart(folder: Path, comparison: Comparison, name: str) -> Picture:
    results = _of(comparison, name)
    points = [StepsPoint(result.sampler, result.steps, result.metric.value, result.metric.standard_error or 0.0) for result in results]
    path = folder / f"steps-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.png"
    save_steps_chart(path, points, results[0].metric.name, comparison.floor)
    return Picture(path.read_bytes(), f"distance against steps of {name}", f"{name}: distance against the number of steps.", "Lower is better.", is_chart=True)


def _report(comparison: Comparison, names: Sequence[str], pictures: Sequence[Picture]) -> Report:
    """Returns the page: a table for every recipe, then the pictures."""
    recipes = list(dict.fromkeys(result.recipe for result in comparison.results))
    tables = []
    for recipe in recipes:
        results = [result for result in comparison.results if result.recipe == recipe]
        models = [
            Compared(
                result.model,
                Estimate.of(result.metric.value, result.metric.standard_error or 0.0),
                None if result.against_first is None else Estimate.of(result.against_first.difference, result.against_first.standard_error),
                None if result.against_first is None else Verdict(result.verdict, _TONES[result.verdict]),
            )
            for result in results
        ]
        tables.append(Side(f"{results[0].metric.name}, {recipe}", names[0], models, unit_of(results[0].metric.unit)))
    first = comparison.results[: len(names)]
    verdict = "; ".join(
        f"{result.model} {result.verdict} than {names[0]}" if result.verdict in ("better", "worse") else f"{result.model}: {result.verdict}"
        for result in first[1:]
    )
    floor = "" if comparison.floor is None else f"Real images score {comparison.floor:.4g}."
    section = Section("Pictures", "", pictures)
    return Report(" and ".join(names), Verdict(verdict or f"{names[0]} by {counted(len(recipes), 'recipe')}"), floor, comparisons=tables, sections=[section])


_TONES: dict[str, Literal["good", "bad", "neutral"]] = {"better": "good", "worse": "bad", "no difference beyond chance": "neutral"}


def print_comparison(out: IO[str], comparison: Comparison, page: Path) -> None:
    """Prints a line for every model and recipe."""
    console = Console(file=out, highlight=False, force_terminal=out.isatty(), width=None if out.isatty() else 140)
    title = f"{comparison.results[0].metric.name}, lower is better; intervals of 95 %"
    table = Table(title=title, title_justify="left")
    for column in ("model", "sampler", "value", "difference to the first", "verdict"):
        table.add_column(column, overflow="fold")
    for result in comparison.results:
        value = " ".join(format_estimate(Estimate.of(result.metric.value, result.metric.standard_error or 0.0)))
        test = result.against_first
        difference = "" if test is None else " ".join(format_estimate(Estimate.of(test.difference, test.standard_error), signed=True))
        table.add_row(result.model, result.recipe, value, difference, result.verdict)
    console.print(table)
    if comparison.floor is not None:
        console.print(f"real images score {comparison.floor:.4g}")
    console.print(f"page        {page}", soft_wrap=True, markup=False)


def to_json(comparison: Comparison, page: Path) -> str:
    """Returns a comparison as JSON."""
    results = [result.model_dump(mode="json") | {"name": result.metric.name, "verdict": result.verdict} for result in comparison.results]
    return json.dumps({"results": results, "floor": comparison.floor, "page": str(page)}, indent=2)


def write_statistics(dataset: str, out: Location, called: str, split: str, settings: Sequence[str], storage: str) -> str:
    """Writes a split's statistics by the extractor that decides as a file that others read; returns a line that says what they are.

    Args:
        called: what the person called the file.

    Raises:
        ConfigError: if a setting is wrong, or the file cannot be written.
        DataError: if there is no such dataset, or a file of weights is not whole.
    """
    if split not in ("train", "holdout"):
        raise ConfigError(f"--split {split} is unknown; use train or holdout")
    root = check_storage(storage)
    found = find_dataset(dataset, root)
    if found.manifest.splits.get(split, 0) < MIN_ROWS:
        raise ConfigError(f"--split {split} of dataset {found.name} has {found.manifest.splits.get(split, 0)} images; statistics need {MIN_ROWS}")
    config, cluster = load_sections({"cluster": {"storage": storage}}, settings)
    shards = shard_set_of(found.folder)
    check_files(config)
    check_extractor(config, shards, root)
    context = _context(root, cluster, "reference", (dataset, split))
    with ray_session(cluster, root, context.run_name, context.reporter.line), open_evaluator(config, shards, context) as evaluator:
        real_features = evaluator.real_features(0, "train" if split == "train" else "holdout")
    try:
        real_features.reference.save(out)
    except OSError as error:
        raise ConfigError(f"--out {called} cannot be written ({error.strerror}); name a file in a folder with write permission") from error
    name, count = real_features.identity.name, real_features.num_rows
    return f"{called}: mu and sigma of {name} over {counted(count, f'{split} image')} of dataset {found.manifest.digest}"
