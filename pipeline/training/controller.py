"""What Ray Train's controller tells of workers that failed."""

from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback

from cluster.key_value_store import KeyValueStore
from pipeline.training.heartbeat import REASON

_MOST = 300


class FailureObserver(UserCallback):
    """Puts on the key-value store why workers failed, for the next start to write down; runs in the controller's process."""

    def __init__(self, store: KeyValueStore) -> None:
        """Writes to a key-value store."""
        self._store = store

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Notes the first worker that died, or else the first that raised, unless a reason is known already."""
        try:
            if not self._store.get(REASON):
                self._store.put(REASON, describe_failures(worker_exceptions))
        except Exception:  # whatever it is, a note is not worth the run: Ray would end it
            return


def describe_failures(failures: dict[int, Exception]) -> str:
    """Returns which workers died, or where none did, what the first one raised; those that live raise when their peer is gone."""
    causes = {rank: _cause(error) for rank, error in sorted(failures.items())}
    died = [str(rank) for rank, cause in causes.items() if isinstance(cause, RayActorError)]
    if died:
        return f"worker{'s' if len(died) > 1 else ''} {', '.join(died)} died: process or node was lost"
    rank, cause = next(iter(causes.items()))
    return f"worker {rank} raised {type(cause).__name__}: {' '.join(str(cause).split())}"[:_MOST]


def _cause(error: Exception) -> BaseException:
    """Returns what happened to a worker, out of what Ray wraps it in."""
    return getattr(error, "health_check_failure", None) or getattr(error, "cause", None) or error.__cause__ or error
