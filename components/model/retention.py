"""The checkpoints of a training run: which is the newest that is whole, which are kept, which are set aside.

step_000001000-0001/    step, and the attempt that wrote it: two attempts never write into the same folder
damaged_step_000000500-0001/    one that does not match its manifest: set aside with `damage.txt`, which says why, and not looked at again
"""

import itertools
import shutil
from collections.abc import Collection
from contextlib import suppress

from ..errors import DataError
from ..storage import Location
from .manifest import MANIFEST, STAGING, copied, is_complete, verify

DAMAGED, DAMAGE_FILE = "damaged_", "damage.txt"


def checkpoint_name(step: int, attempt: int) -> str:
    """Returns the folder name of the checkpoint of a step; names sort by step, then by attempt."""
    return f"step_{step:09d}-{attempt:04d}"


def checkpoints(folder: Location) -> list[Location]:
    """Returns the checkpoint folders of a training run, the newest first; some may not be whole."""
    return [folder / name for name in sorted(folder.folders(), reverse=True) if name.startswith("step_")]


def checkpoint_step(path: Location) -> int:
    """Returns the step of a checkpoint folder."""
    return int(path.name.removeprefix("step_").partition("-")[0])


def newest_whole_checkpoint(folder: Location) -> Location | None:
    """Returns the last checkpoint, by step, that passes its checksums; None if there is none. Newer ones that do not are set aside.

    Raises:
        OSError: if the storage cannot be reached, or this machine's disk is full: then it is not known which are whole.
    """
    for path in checkpoints(folder):
        if _is_unfinished(path):
            continue
        try:
            with copied(path, None) as copy:
                verify(copy)
        except DataError as error:
            _set_aside(path, str(error))
            continue
        return path
    return None


def _is_unfinished(path: Location) -> bool:
    """Tells whether a checkpoint on S3 lacks the manifest, which goes last: it may be under way still. On a file system it appears in one step."""
    return not path.is_local and not (path / MANIFEST).is_file()


def _set_aside(path: Location, reason: str) -> None:
    """Gives a damaged checkpoint a name that says so, and a file that says why."""
    taken, name = path.parent.folders(), f"{DAMAGED}{path.name}"
    free = next(name for name in itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2))) if name not in taken)
    # A disk without room for a line must not keep training from an older checkpoint.
    with suppress(OSError):
        (path / DAMAGE_FILE).write_text(reason + "\n")
    path.rename(path.parent / free)


def damaged_checkpoints(folder: Location) -> list[Location]:
    """Returns the checkpoints of a training run that were set aside, the oldest first."""
    return [folder / name for name in folder.folders() if name.startswith(DAMAGED)]


def damage_of(path: Location) -> str:
    """Returns why a checkpoint was set aside."""
    try:
        return (path / DAMAGE_FILE).read_text().strip()
    except OSError:
        return "it does not match its checksums"


def snapshots_folder(folder: Location) -> Location:
    """Returns where a training run keeps averages from which others are made afterwards."""
    return folder / "snapshots"


def prune(folder: Location, keep_last: int, written: Location, keep_every: int | None = None, keep_steps: Collection[int] = ()) -> None:
    """Removes checkpoints before the one that was just written, but those to be kept; torn ones do not count among these.

    Args:
        keep_last: the last whole ones that are kept.
        keep_every: steps, of whose multiples the last whole checkpoint is kept for good.
        keep_steps: steps whose last whole checkpoint is kept, such as that of the best measurement.
    """
    whole = [path for path in checkpoints(folder) if path == written or is_complete(path)]
    # The newest comes first, so that of several attempts' checkpoints of a step the latest is set down last.
    of_step = {checkpoint_step(path): path for path in reversed(whole)}
    kept = {written, *whole[:keep_last], *(path for step, path in of_step.items() if (keep_every and step % keep_every == 0) or step in keep_steps)}
    for path in checkpoints(folder):
        if path not in kept and path.name < written.name:
            path.remove_tree()
    _remove_unfinished(folder, _attempt_of(written.name))


def _remove_unfinished(folder: Location, attempt: int) -> None:
    """Removes what attempts left that were killed while they wrote a checkpoint; never what an attempt is writing that may have taken this one's place."""
    for staging in folder.path.glob(f".step_*{STAGING}") if folder.is_local else ():
        if _attempt_of(staging.name.lstrip(".").partition(".")[0]) <= attempt:
            shutil.rmtree(staging, ignore_errors=True)


def _attempt_of(name: str) -> int:
    """Returns the attempt that a checkpoint's name tells, 0 where it tells none."""
    return int(name.rpartition("-")[2]) if "-" in name else 0
