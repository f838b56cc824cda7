"""The gate, asked about a version that is in the registry already."""

import json
from typing import TYPE_CHECKING

from pydantic import ValidationError

from cluster.config import ClusterConfig
from components.data.catalog import find_dataset
from components.errors import DataError
from components.storage import Location
from pipeline.artifacts import ChampionTest, Metric
from pipeline.context import Reporter, StageContext
from pipeline.errors import ConfigError, RegistryError
from pipeline.measurement.compare import shard_set_of
from pipeline.measurement.config import EvaluateConfig
from pipeline.measurement.extractors import check_files
from pipeline.measurement.paired_test import Rival, compare_with_champion
from pipeline.ray_session import ray_session
from pipeline.registry.decide import Champion, Decision, decide, why_not_compared
from pipeline.registry.gate import Judge
from pipeline.registry.versions import GAIN_TAG, SAMPLES_TAG, SETTINGS_TAG, fetch_checkpoint, read_champion, read_metric
from pipeline.tracking import Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def judge_of(version: "ModelVersion", tracking: Tracking, storage: Location, reporter: Reporter) -> Judge:
    """Returns the gate for a registered version: on kept samples where they are there, else both are drawn again.

    Raises:
        RegistryError: if the version carries no number.
    """
    metric = read_metric(version.tags)
    if metric is None:
        raise RegistryError(f"version={version.version} of {version.name} carries no metric to compare by; --force --why REASON moves the alias all the same")
    gain = float(version.tags.get(GAIN_TAG, 0.0))

    def judge(number: int | None) -> tuple[Decision, ChampionTest | None]:
        champion = None if number is None else read_champion(tracking, version.name, number)
        found: ChampionTest | str | None = None
        if champion is not None and not why_not_compared(metric, champion):
            found = _contest(version, metric, champion, gain, tracking, storage, reporter)
        decision = decide(metric, champion, found, gain, copies=version.tags.get("memorisation.copies") == "True")
        return decision, found if isinstance(found, ChampionTest) else None

    return judge


def _contest(
    version: "ModelVersion", metric: Metric, champion: Champion, min_gain: float, tracking: Tracking, storage: Location, reporter: Reporter
) -> ChampionTest | str:
    """Returns the paired test of a version with a champion of the same unit, or why there is none."""
    number = int(version.version)
    try:
        settings = EvaluateConfig.model_validate_json(version.tags.get(SETTINGS_TAG, ""))
        check_files(settings)
        dataset = find_dataset(version.tags["dataset.digest"], storage)
        cluster = ClusterConfig(storage=str(storage))
        with ray_session(cluster, storage, "promote", reporter.line):
            return compare_with_champion(
                settings,
                metric.unit,
                _contender(f"v{number}", version.name, number, version.tags.get(SAMPLES_TAG), tracking, storage),
                _contender(f"champion v{champion.version}", version.name, champion.version, champion.samples, tracking, storage),
                shard_set_of(dataset.folder),
                min_gain=min_gain,
                version=champion.version,
                context=StageContext(storage, storage / "promote" / f"{number}", str(number), "promote", cluster, reporter),
            )
    except (DataError, RegistryError, ConfigError, KeyError, json.JSONDecodeError) as error:
        return str(error)
    except ValidationError:
        return f"v{number} does not say by which settings it was measured"


def _contender(label: str, name: str, number: int, samples: str | None, tracking: Tracking, storage: Location) -> Rival:
    return Rival(label, samples or "", lambda: (fetch_checkpoint(tracking, f"models:/{name}/{number}", storage), "ema"))
