"""Several models side by side: drawn from the same seeds by the same recipe, measured in one unit, against one dataset."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydantic import BaseModel, ConfigDict

from components.data.shards import read_manifest
from components.diffusion.recipe import Recipe
from components.storage import Location
from pipeline.artifacts import Metric, PairedTest, ShardSet
from pipeline.context import StageContext
from pipeline.measurement.config import EvaluateConfig
from pipeline.measurement.evaluator import Evaluator, as_metric, open_evaluator
from pipeline.measurement.measure import SampleFeatures, measure_distance, measure_floor, paired_test
from pipeline.measurement.sample_store import SampleSet

GRID_IMAGES = 16


@dataclass(frozen=True)
class ComparedModel:
    """A model that is compared.

    Attributes:
        name: how the table calls it.
        checkpoint: its folder, where every node can read it.
        weights: which of its averages.
    """

    name: str
    checkpoint: Location
    weights: str = "ema"


class Result(BaseModel):
    """One model by one recipe."""

    model_config = ConfigDict(frozen=True)

    model: str
    recipe: str
    sampler: str
    steps: int
    metric: Metric
    guards: tuple[Metric, ...]
    against_first: PairedTest | None
    """The paired test against the first model by the same recipe; None for that one itself."""

    @property
    def verdict(self) -> str:
        """What the interval of 95 % says, in a word or two."""
        if self.against_first is None:
            return ""
        test = self.against_first
        reach = 1.96 * test.standard_error
        return "better" if test.difference + reach < 0 else "worse" if test.difference - reach > 0 else "no difference beyond chance"


@dataclass(frozen=True)
class Comparison:
    """All results, and what the models draw.

    Attributes:
        pixels: pictures (N, C, H, W) of what each model draws by the first recipe, from the same seeds.
        floor: what real images score, None where there are too few.
    """

    results: tuple[Result, ...]
    pixels: tuple[np.ndarray, ...]
    floor: float | None


def compare(entrants: Sequence[ComparedModel], recipes: Sequence[Recipe], config: EvaluateConfig, dataset: Location, *, context: StageContext) -> Comparison:
    """Measures every model by every recipe.

    Raises:
        DataError: if a checkpoint, the dataset or a file of weights is not whole, or a model makes other images than the dataset's.
    """
    shards = shard_set_of(dataset)
    with open_evaluator(config, shards, context) as evaluator:
        recipes = [replace(recipe, precision=evaluator.config.recipe.precision) for recipe in recipes]
        evaluator.reference()
        results = [result for recipe in recipes for result in _by_recipe(evaluator, entrants, recipe)]
        space = evaluator.manifest.space
        seeds = range(GRID_IMAGES if space.one_tile_per_row else space.rows_in_a_picture)
        pixels = tuple(space.tiles(evaluator.pixels(_samples(evaluator, entrant, recipes[0]), seeds)) for entrant in entrants)
        floor = measure_floor(evaluator.real_features(0, "train"), evaluator.holdout(0), config.num_samples)
    return Comparison(tuple(results), pixels, None if floor is None else floor.value)


def _by_recipe(evaluator: Evaluator, entrants: Sequence[ComparedModel], recipe: Recipe) -> list[Result]:
    reference, unit = evaluator.reference()
    unit = unit.model_copy(update={"sampler": recipe.describe(), "steps": recipe.steps})
    drawn = []
    for entrant in entrants:
        evaluator.context.reporter.line(f"  {entrant.name}: {unit.drawn_by}")
        samples = _samples(evaluator, entrant, recipe)
        evaluator.draw(samples, evaluator.config.seeds)
        drawn.append(samples)
    sampled = [SampleFeatures(samples.folder, evaluator.actor_pool.identities[0], evaluator.config.seeds) for samples in drawn]
    results = []
    for entrant, samples, mine in zip(entrants, drawn, sampled, strict=True):
        distance = measure_distance(mine, reference)
        results.append(
            Result(
                model=entrant.name,
                recipe=unit.drawn_by,
                sampler=recipe.sampler,
                steps=recipe.steps,
                metric=as_metric(distance, unit),
                guards=tuple(_with_recipe(metric, recipe) for metric in evaluator.guards(samples)),
                against_first=None if mine is sampled[0] else paired_test(mine, sampled[0], reference),
            )
        )
    return results


def _with_recipe(metric: Metric, recipe: Recipe) -> Metric:
    return metric.model_copy(update={"unit": metric.unit.model_copy(update={"sampler": recipe.describe(), "steps": recipe.steps})})


def _samples(evaluator: Evaluator, entrant: ComparedModel, recipe: Recipe) -> SampleSet:
    return evaluator.samples_of(entrant.checkpoint, entrant.weights, recipe)


def shard_set_of(dataset: Location) -> ShardSet:
    """Returns a dataset as the preprocess stage would hand it on.

    Raises:
        DataError: if there is no dataset in the folder.
    """
    manifest = read_manifest(dataset)
    return ShardSet.of(dataset, manifest, inputs=manifest.digest)
