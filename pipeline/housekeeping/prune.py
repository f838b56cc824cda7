"""Removing what nothing needs: each kind under the lock of those who work on it, looked at once more, and never half gone.

Killed at any point and called again it goes on: what makes a thing exist (a manifest, a receipt) goes first, and what is left is then needed by nobody.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from components.storage import Location
from pipeline.context import Reporter
from pipeline.errors import RegistryError
from pipeline.housekeeping.inventory import take_inventory
from pipeline.housekeeping.items import Inventory, Item, Kind, Retention
from pipeline.housekeeping.needs import DAY_S
from pipeline.lease import LeaseHeldError, alone, held
from pipeline.registry.browse import list_models
from pipeline.registry.gate import delete_version
from pipeline.registry.ledger import Ledger
from pipeline.registry.versions import has_version
from pipeline.tracking import NOT_THERE, Tracking, translated

PRUNE_LOCK = "prune"
_FIRST = ("manifest.json", "receipt.json", "state.json")
GC_TIMEOUT_S = 600
MOST_MODELS = 1000
_ORDER: tuple[tuple[Kind, ...], ...] = (("training",), ("run",), ("dataset", "latents"), ("shards",), ("autoencoder", "samples", "cache", "logs"))


@dataclass(frozen=True)
class Pruned:
    """What was removed.

    Attributes:
        left: what was to be removed, and turned out to be in use.
    """

    removed: tuple[Item, ...]
    left: tuple[Item, ...]
    bytes: int
    problems: tuple[str, ...]


def look(storage: Location, tracking: Tracking | None, retention: Retention, mine: frozenset[Location] = frozenset()) -> Inventory:
    """Returns what lies below a storage root, and who needs it.

    Args:
        tracking: of the registry; None where there is none yet.
        mine: locks that this process holds.
    """
    return take_inventory(storage, {} if tracking is None else list_models(tracking, None), retention, mine=mine)


def prune(storage: Location, tracking: Tracking | None, retention: Retention, reporter: Reporter) -> Pruned:
    """Removes what nothing needs.

    Raises:
        OSError: if the storage cannot be looked through.
        RegistryError: if the registry does not answer.
    """
    with alone(storage / "locks" / PRUNE_LOCK, reporter, "removes what is not needed"):
        return _Pruning(storage, tracking, retention, reporter).run()


class _Pruning:
    def __init__(self, storage: Location, tracking: Tracking | None, retention: Retention, reporter: Reporter) -> None:
        self.storage, self.tracking, self.retention, self.reporter = storage, tracking, retention, reporter
        self.removed: list[Item] = []
        self.left: list[Item] = []

    def run(self) -> Pruned:
        # Versions first, for what they need is free behind them; then runs, which need datasets; then datasets, which need shards.
        before = self._look()
        for item in before.spare:
            if item.kind == "version":
                self._remove_version(item)
        if self.tracking is not None:
            self._remove_models_of_gone_versions(self.tracking)
            if self.tracking.uri.startswith("sqlite:///"):
                self._collect_garbage()
        for kinds in _ORDER:
            self._remove_kinds(kinds)
        freed = sum(item.bytes for item in self.removed)
        return Pruned(tuple(self.removed), tuple(self.left), freed, before.problems)

    def _look(self, mine: frozenset[Location] = frozenset()) -> Inventory:
        return look(self.storage, self.tracking, self.retention, mine)

    def _remove_kinds(self, kinds: tuple[Kind, ...]) -> None:
        spare = [item for item in self._look().spare if item.kind in kinds]
        with ExitStack() as stack:
            mine = set()
            for lock in dict.fromkeys(item.lock for item in spare if item.lock is not None):
                with suppress(LeaseHeldError):
                    stack.enter_context(held(lock, wait=False))
                    mine.add(lock)
            # Somebody may have come to need it before the locks were taken; from here on nobody can.
            still = {(item.kind, item.name): set(item.places) for item in self._look(frozenset(mine)).spare}
            for item in spare:
                is_free = (item.lock is None or item.lock in mine) and set(item.places) <= still.get((item.kind, item.name), set())
                self._remove(item) if is_free else self.left.append(item)

    def _remove(self, item: Item) -> None:
        for place in item.places:
            remove(place)
        self.removed.append(item)

    def _remove_version(self, item: Item) -> None:
        assert self.tracking is not None
        name, _, number = item.name.rpartition("/")
        client = self.tracking.client
        with translated(self.tracking.uri):
            version = client.get_model_version(name, number)
            with suppress(RegistryError):
                delete_version(Ledger.of(self.tracking, name), int(number))
                self._gone(lambda: client.delete_run(version.run_id) if version.run_id else None)
                self.removed.append(item)

    def _remove_models_of_gone_versions(self, tracking: Tracking) -> None:
        """Marks MLflow's models as deleted whose versions are, by this command or by a person: they hold the weights."""
        client, oldest = tracking.client, time.time() - self.retention.keep_days * DAY_S
        with translated(tracking.uri):
            for experiment in client.search_experiments():
                for model in client.search_logged_models([experiment.experiment_id], max_results=MOST_MODELS):
                    named = _versions_of(model.tags or {})
                    gone = bool(named) and not any(has_version(tracking, name, version) for name, version in named)
                    if gone and (model.creation_timestamp or 0) / 1000 < oldest:
                        self._gone(lambda model=model: client.delete_logged_model(model.model_id))

    def _gone(self, delete: Callable[[], None]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            delete()
        except MlflowException as error:
            if error.error_code not in NOT_THERE:
                raise

    def _collect_garbage(self) -> None:
        """Lets MLflow remove artifacts and records of the runs and models that are marked as deleted, a person's too."""
        assert self.tracking is not None
        place = self.storage / "mlflow"
        before = sum(size for _, size, _ in place.tree())
        command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", self.tracking.uri, "--tracking-uri", self.tracking.uri]
        days = f"{int(self.retention.keep_days * 1440)}m"
        done = subprocess.run([*command, "--older-than", days], capture_output=True, text=True, check=False, timeout=GC_TIMEOUT_S)
        if done.returncode:
            self.reporter.line(f"  [yellow]note[/] MLflow did not remove what is deleted ({' '.join(done.stderr.split())[-200:]})")
            return
        freed = before - sum(size for _, size, _ in place.tree())
        if freed > 0:
            self.removed.append(Item("mlflow", "deleted runs and models", (), freed, 0.0))


def _versions_of(tags: Mapping[str, str]) -> list[tuple[str, int]]:
    """Returns the registered versions that a model of MLflow says it became, as `register` notes them."""
    try:
        return [(str(one["name"]), int(one["version"])) for one in json.loads(tags.get("mlflow.modelVersions", "[]"))]
    except (ValueError, KeyError, TypeError):
        return []


def remove(place: Location) -> None:
    """Removes a file, or a folder whose manifests and receipts go first, so that what is left of it at any time is nothing that anybody reads."""
    if place.is_file():
        place.remove()
        return
    names = [name for name, _, _ in place.tree() if name.rpartition("/")[2] in _FIRST]
    for name in sorted(names, key=lambda name: _FIRST.index(name.rpartition("/")[2])):
        (place / name).remove()
    place.remove_tree()
