"""Who needs what below a storage root: followed from registry, runs and attempts down to datasets, samples and caches. Empty where nobody does."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from components.model.retention import checkpoints
from components.storage import Location
from pipeline.housekeeping.items import Retention, below
from pipeline.housekeeping.records import Kept, Records, RunRecords, Training, autoencoder_of
from pipeline.registry.versions import CANDIDATE, CHAMPION, PREVIOUS, SAMPLES_TAG

if TYPE_CHECKING:
    from pipeline.artifacts import ShardSet
    from pipeline.registry.browse import VersionFacts

DAY_S = 86_400.0
_ALIASES = (CHAMPION, PREVIOUS, CANDIDATE)


class Needs:
    """One look at who needs what.

    Args:
        models: the registry's versions by model, newest first.
        now: seconds since 1970.

    Attributes:
        versions: (version, who needs it).
        trainings: who needs the checkpoints in a folder.
        runs: who needs what else a run left.
        busy: whether a process works on any run.
    """

    def __init__(self, records: Records, models: "Mapping[str, Iterable[VersionFacts]]", retention: Retention, now: float) -> None:
        self.records, self.retention, self.now = records, retention, now
        self.busy = any(run.busy for run in records.runs)
        self.versions = [(version, self._of_version(number, version)) for found in models.values() for number, version in enumerate(found)]
        self._texts = dict(_texts(records))
        self.trainings = {training.folder: self._of_training(run, training) for run in records.runs for training in run.trainings}
        self.runs = {run.folder: self._of_run(run) for run in records.runs}

    def young(self, written: float) -> str:
        """Returns that a thing is too young to be removed, nothing where it is not; what a process made today may be needed before it says so."""
        days = max(self.retention.keep_days, 1.0 if self.busy else 0.0)
        return f"written within {days:g} days" if self.now - written < days * DAY_S else ""

    def named(self, place: Location) -> str:
        """Returns whose settings or open attempt name a place, or what is in it."""
        return next((who for who, text in self._texts.items() if any(f"{below(place)}{end}" in text for end in ("/", '"', "\n", "#"))), "")

    def _of_version(self, number: int, version: "VersionFacts") -> str:
        if version.aliases:
            return f"{' and '.join(version.aliases)} of {version.name}"
        if self.retention.keep_versions is None or self.retention.model not in (None, version.name):
            return f"version {version.version} of {version.name}"
        if number < self.retention.keep_versions:
            return f"one of the last {self.retention.keep_versions} versions of {version.name}"
        return self.young(version.created_ms / 1000)

    def _of_training(self, run: RunRecords, training: Training) -> str:
        """Returns who needs checkpoints; of a version without an alias the registry's own copy is enough."""
        if run.busy or run.unreadable:
            return "a process works on its run" if run.busy else "a receipt of its run cannot be read"
        registered = [version for version, _ in self.versions if _is_in(version.tags.get("weights.checkpoint", ""), training.folder)]
        for version in registered:
            if set(version.aliases) & set(_ALIASES):
                return f"{' and '.join(version.aliases)} of {version.name}"
        if why := self.named(training.folder):
            return why
        newest = run.newest_training
        if training.receipt is None and (newest is None or newest.written < training.written):
            return "its training can go on"
        was_registered = bool(registered) or run.registered >= training.written  # whose version may have been deleted since
        if training is newest and not was_registered and run.name not in self.records.trials:
            return "the only copy of what its run trained"
        return self.young(training.written)

    def _of_run(self, run: RunRecords) -> str:
        """Returns why a run's folder stays; that of an attempt goes when nothing in it is needed, that of a run that a person named does not."""
        found = next((why for training in run.trainings if (why := self.trainings[training.folder])), "")
        if found or run.busy or run.unreadable:
            return found or "a process works on it"
        journal = next((journal for journal in self.records.journals if any(attempt.run_name == run.name for attempt in journal.attempts)), None)
        if journal is None:
            return "a person named it"
        if journal.attempts[-1].run_name == run.name:
            return f"the last attempt of {journal.name}"
        return self.young(max((one.written for one in (*run.datasets, *run.evaluations, *run.latents)), default=0.0))

    def of_datasets(self) -> dict[str, str]:
        """Returns who needs a dataset, by its folder or its digest."""
        needed = {digest: why for version, why in self.versions if why and (digest := version.tags.get("dataset.digest"))}
        for run in self.records.runs:
            needed = {below(kept.receipt.path): f"run {run.name}" for kept in self._wanted(run, run.datasets)} | needed
            samples = [kept.receipt.kept_samples for kept in run.evaluations if self.runs[run.folder]]
            needed = {below(place): f"samples of run {run.name}" for place in samples if place is not None} | needed
            trained = [training.receipt for training in run.trainings if training.receipt and self.trainings[training.folder]]
            needed = {receipt.dataset_digest: f"run {run.name}" for receipt in trained} | needed
        for journal in self.records.journals:
            # New images are counted from what was trained last.
            decided = [attempt for attempt in journal.attempts if attempt.was_trained][-1:]
            going = [attempt for attempt in journal.attempts if attempt.outcome is None or attempt is journal.attempts[-1]]
            needed = {below(attempt.dataset): f"attempt {attempt.number} of {journal.name}" for attempt in (*decided, *going)} | needed
        return needed

    def of_latents(self) -> dict[str, str]:
        """Returns who needs a dataset of latents, by its folder."""
        return {below(kept.receipt.path): f"run {run.name}" for run in self.records.runs for kept in self._wanted(run, run.latents)}

    def _wanted(self, run: RunRecords, kept: "tuple[Kept[ShardSet], ...]") -> "list[Kept[ShardSet]]":
        """Returns what of a run's receipts is of use: all while a process works on it, else the newest, where its folder stays."""
        if run.busy or run.unreadable:
            return list(kept)
        newest = max(kept, key=lambda one: one.written, default=None)
        return [newest] if newest is not None and self.runs[run.folder] else []

    def of_autoencoders(self) -> dict[str, str]:
        """Returns which trainings that stay work in the latents of an autoencoder, by its digest."""
        found = {}
        for run in self.records.runs:
            for training in run.trainings:
                if self.trainings[training.folder] and (digest := next((autoencoder_of(one) for one in checkpoints(training.folder)[:1]), None)):
                    found[digest] = f"run {run.name}"
        return found

    def of_word(self, word: str) -> str:
        """Returns whose settings, or whose note of what they meant, hold a word such as a digest."""
        return next((who for who, text in self._texts.items() if word in text), "")

    def of_samples(self) -> dict[str, str]:
        """Returns who needs the samples in a folder."""
        needed = {below(version.tags.get(SAMPLES_TAG, "")): why for version, why in self.versions if version.aliases}
        for run in self.records.runs:
            for kept in run.evaluations:
                training = next((one for one in run.trainings if _is_in(kept.receipt.checkpoint, one.folder)), None)
                if run.busy or (training is not None and self.trainings[training.folder]):
                    needed.setdefault(below(kept.receipt.samples), f"run {run.name}")
        return needed


def _is_in(address: str, folder: Location) -> bool:
    return below(address).startswith(f"{below(folder)}/")


def _texts(records: Records) -> Iterator[tuple[str, str]]:
    """Yields what runs and open attempts name, as text."""
    for run in records.runs:
        yield f"the settings of run {run.name}", "\n".join([*_values(run.settings), *run.pins, ""])
    for journal in records.journals:
        for attempt in journal.attempts:
            if attempt.outcome is None:
                yield f"attempt {attempt.number} of {journal.name}", attempt.model_dump_json()


def _values(tree: object) -> Iterator[str]:
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _values(value)
    elif isinstance(tree, str):
        yield tree
