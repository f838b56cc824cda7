"""What was trained last: the dataset that new images are counted from, and the settings that changed or not."""

from dataclasses import dataclass

from components.data.catalog import Dataset, find_dataset
from components.errors import DataError
from components.storage import Location
from pipeline.registry.versions import CHAMPION, alias_of
from pipeline.retraining.attempts import Attempt
from pipeline.tracking import Tracking, translated


@dataclass(frozen=True)
class Latest:
    """The last training that came to a decision.

    Attributes:
        what: how a person calls it.
        settings: digest of its settings; None where they are not known to be the present ones.
        digest: of its dataset.
        dataset: where that lies; None where it is gone.
        images_per_second: how fast it trained, with how many workers.
    """

    what: str
    settings: str | None
    digest: str
    dataset: Dataset | None
    images_per_second: float | None
    num_workers: int | None


def find_latest(attempts: list[Attempt], *, model_name: str, config_digest: str, settings: str, tracking: Tracking, storage: Location) -> Latest | None:
    """Returns the last attempt that was decided, or the champion that `ddpm run` made; None before the first.

    Args:
        config_digest: of a run by the present settings, as versions carry it.
        settings: the present settings of retraining.
    """
    done = next((attempt for attempt in reversed(attempts) if attempt.was_trained), None)
    if done is not None:
        dataset = _there(done.dataset, storage)
        return Latest(f"attempt {done.number} ({done.outcome})", done.settings, done.dataset_digest, dataset, done.images_per_second, done.num_workers)
    with translated(tracking.uri):
        number = alias_of(tracking, model_name, CHAMPION)
        if number is None:
            return None
        version = tracking.client.get_model_version(model_name, str(number))
        metrics = tracking.client.get_run(version.run_id).data.metrics if version.run_id and tracking.has_run(version.run_id) else {}
    digest = version.tags.get("dataset.digest", "")
    same = version.tags.get("config.digest") == config_digest
    return Latest(f"champion v{number} was trained", settings if same else None, digest, _there(digest, storage), metrics.get("perf/images_per_second"), None)


def _there(address: str, storage: Location) -> Dataset | None:
    try:
        return find_dataset(address, storage)
    except DataError:
        return None
