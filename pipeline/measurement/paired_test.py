"""Candidate against champion, on the same seeds: the paired test that the gate decides by."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from components.data.shards import Split
from components.errors import DataError
from components.storage import Location
from pipeline.artifacts import ChampionTest, MetricUnit, PairedTest, ShardSet
from pipeline.context import StageContext
from pipeline.measurement.config import EvaluateConfig
from pipeline.measurement.evaluator import RECONSTRUCTION, open_evaluator
from pipeline.measurement.measure import SampleFeatures, paired_test
from pipeline.measurement.reference_statistics import read_kept, reference_file
from pipeline.measurement.sample_store import Identity

FRESH_SEEDS = 2**61


@dataclass(frozen=True)
class Rival:
    """A model beside the champion.

    Attributes:
        name: how the log calls it.
        samples: folder of its samples' features.
        fetch: returns the folder of its checkpoint, and which of its averages; called only where something is to be drawn.
    """

    name: str
    samples: str
    fetch: Callable[[], tuple[Location, str]]


def compare_with_champion(
    config: EvaluateConfig,
    unit: MetricUnit,
    candidate: Rival,
    champion: Rival,
    shards: ShardSet,
    *,
    min_gain: float,
    version: int,
    context: StageContext,
) -> ChampionTest:
    """Returns the paired test of a candidate against a champion, both in one unit, and its confirmation on fresh seeds.

    The confirmation is drawn only where the first test says better: one lucky block of seeds among many challengers promotes nobody.

    Args:
        unit: of the candidate's number.
        version: the champion's.

    Raises:
        DataError: if a checkpoint or the reference cannot be read.
    """
    config = config.model_copy(update={"precision": unit.precision})
    test = _kept_test(config, unit, candidate, champion, context)
    if test is not None and not test.upper < -min_gain:
        return ChampionTest(champion_version=version, test=test, confirmation=None)
    with open_evaluator(config, shards, context) as opened:
        evaluator = replace(opened, reconstructs=unit.sampler == RECONSTRUCTION)
        reference, _ = evaluator.reference()
        ours, theirs = evaluator.samples_of(*candidate.fetch()), evaluator.samples_of(*champion.fetch())
        identity = evaluator.actor_pool.identities[0]

        def test_on(seeds: range) -> PairedTest:
            for name, samples in ((candidate.name, ours), (champion.name, theirs)):
                context.reporter.line(f"  {name} on seeds {seeds.start} to {seeds.stop - 1}")
                evaluator.draw(samples, seeds)
            return paired_test(SampleFeatures(ours.folder, identity, seeds), SampleFeatures(theirs.folder, identity, seeds), reference)

        test = test or test_on(config.seeds)
        better = test.upper < -min_gain
        fresh = _fresh_seeds(ours.folder.name, config.num_samples)
        return ChampionTest(champion_version=version, test=test, confirmation=test_on(fresh) if better else None)


def _fresh_seeds(key: str, count: int) -> range:
    """Returns a block of seeds of a candidate's own, so that no challenger is confirmed on seeds that another was chosen by.

    Args:
        key: hexadecimal name of its samples.
    """
    first = FRESH_SEEDS + int(key[:8], 16) * 2**28
    return range(first, first + count)


def _kept_test(config: EvaluateConfig, unit: MetricUnit, candidate: Rival, champion: Rival, context: StageContext) -> PairedTest | None:
    """Returns the test on what both have kept from their evaluations, None where something is gone."""
    identity = Identity(unit.extractor, unit.extractor_digest, unit.preprocessing)
    split: Split = "holdout" if unit.reference_split == "holdout" else "train"
    file = Location.of(config.reference) if config.reference else reference_file(context.storage, unit.reference_digest, split, identity)
    sampled = [SampleFeatures(Location.of(folder), identity, config.seeds) for folder in (candidate.samples, champion.samples)]
    if not file.is_file() or not all(each.is_there() for each in sampled):
        return None
    try:
        return paired_test(sampled[0], sampled[1], read_kept(file, identity))
    except DataError:
        return None
