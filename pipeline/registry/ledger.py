"""Who is champion, decided one after the other: a log of moves whose entries are written once.

MLflow's aliases are plain writes of which the last wins, so that two processes could both promote against the same champion. A run's parameter,
though, is written once: of several processes that write `move.000007` one succeeds; the others read what it decided and decide anew. The aliases
follow the last entry. An entry whose aliases were not moved, because its process died, is carried out by whoever comes next; an alias that was
moved on MLflow's pages is noticed and becomes an entry.
"""

import getpass
import itertools
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import ValidationError

from pipeline.artifacts import ChampionTest
from pipeline.errors import RegistryError
from pipeline.registry.move import Kind, Move
from pipeline.registry.page import is_ours, model_page
from pipeline.registry.versions import CHAMPION, PREVIOUS, alias_of, all_versions, has_version, set_alias
from pipeline.tracking import NOT_THERE, Tracking

LEDGER_TAG = "ddpm.log"
NOTICE_S = 2.0
"""How long an alias must be elsewhere than the log says before it counts as moved by hand, and not as being moved."""
MOST_CHAMPIONS, MOST_WORDS = 50, 2000
_MOVE, _MOVED = "move.", "moved."
_UNPRINTABLE = re.compile(r"[\x00-\x1f]")
"""What JSON writes as six characters: MLflow cuts a parameter at 6,000, and an entry that was cut could never be read again."""


@dataclass(frozen=True)
class Ledger:
    """The log of a registered model: parameters of a run of its own."""

    tracking: Tracking
    name: str
    run_id: str

    @classmethod
    def of(cls, tracking: Tracking, name: str) -> "Ledger":
        """Returns the log of a registered model that has a version; all processes agree on its run.

        Raises:
            RegistryError: if no version of it came from a run.
        """
        known = tracking.client.get_registered_model(name).tags.get(LEDGER_TAG)
        if known is not None and _is_usable(tracking, known):
            return cls(tracking, name, known)
        run_id = _agree_on_run(tracking, name)
        tracking.client.set_registered_model_tag(name, LEDGER_TAG, run_id)
        return cls(tracking, name, run_id)

    @classmethod
    def find(cls, tracking: Tracking, name: str) -> "Ledger | None":
        """Returns the log of a registered model, None where it has none; changes nothing."""
        known = tracking.client.get_registered_model(name).tags.get(LEDGER_TAG)
        return cls(tracking, name, known) if known is not None and tracking.has_run(known) else None

    def moves(self) -> list[Move]:
        """Returns all entries, oldest first."""
        return self._read()[0]

    def about(self, version: int) -> Move | None:
        """Returns what the gate decided about a version, None where it has not."""
        return next((move for move in self.moves() if move.by_gate and move.version == version), None)

    def append(
        self,
        last: Move | None,
        kind: Kind,
        version: int | None,
        champions: tuple[int, ...],
        why: str,
        *,
        champion_test: ChampionTest | None = None,
        who: str | None = None,
    ) -> Move | None:
        """Writes the entry behind the last one; returns None where another process was first.

        Args:
            last: the entry that the decision was made on.
            who: by default the person or process that runs this.
        """
        from mlflow.exceptions import MlflowException

        move = Move(
            number=(last.number if last else 0) + 1,
            kind=kind,
            version=version,
            champions=champions[-MOST_CHAMPIONS:],
            who=who or whoami(self.tracking),
            when=datetime.now(UTC).isoformat(timespec="milliseconds"),
            why=_UNPRINTABLE.sub(" ", why)[:MOST_WORDS],
            champion_test=champion_test,
        )
        try:
            self.tracking.client.log_param(self.run_id, f"{_MOVE}{move.number:06d}", move.model_dump_json(), synchronous=True)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                return None
            raise
        return move

    def settle(self) -> Move | None:
        """Makes the aliases follow the log, and the log what was moved outside it; returns the last entry."""
        carried = 0
        while True:
            moves, carried_out = self._read()
            last = moves[-1] if moves else None
            if last is not None and (last.number not in carried_out or 0 < carried < last.number):
                self._carry_out(last, moves)
                carried = last.number
            elif (champion := alias_of(self.tracking, self.name, CHAMPION)) == (last.champion if last else None):
                return last
            else:
                self._notice(last, champion)

    def show(self) -> None:
        """Writes the model's page: its champion, and the last moves."""
        self._show(self.moves())

    def _read(self) -> tuple[list[Move], set[int]]:
        """Returns all entries, and the numbers of those that were carried out."""
        params = self.tracking.client.get_run(self.run_id).data.params
        moves = []
        for key in sorted(key for key in params if key.startswith(_MOVE)):
            try:
                moves.append(Move.model_validate_json(params[key]))
            except ValidationError as error:
                raise RegistryError(f"entry {key} of the log of {self.name} (run {self.run_id}) cannot be read; a newer version of ddpm wrote it") from error
        return moves, {int(key.removeprefix(_MOVED)) for key in params if key.startswith(_MOVED)}

    def _carry_out(self, move: Move, moves: list[Move]) -> None:
        from mlflow.exceptions import MlflowException

        for alias, version in ((CHAMPION, move.champion), (PREVIOUS, move.previous)):
            if alias_of(self.tracking, self.name, alias) == version:
                continue
            if version is None:
                self._take_away(alias)
            elif has_version(self.tracking, self.name, version):
                set_alias(self.tracking, self.name, alias, version)
        self._show(moves)
        with suppress(MlflowException):  # another process carried it out as well
            self.tracking.client.log_param(self.run_id, f"{_MOVED}{move.number:06d}", move.when, synchronous=True)

    def _take_away(self, alias: str) -> None:
        """Removes an alias; `previous` stays where the server's user may only EDIT, because MLflow asks for more to remove one."""
        from mlflow.exceptions import MlflowException

        try:
            self.tracking.client.delete_registered_model_alias(self.name, alias)
        except MlflowException as error:
            if alias != PREVIOUS or error.error_code != "PERMISSION_DENIED":
                raise

    def _show(self, moves: list[Move]) -> None:
        """Writes the model's page, unless somebody has written one of their own."""
        written = self.tracking.client.get_registered_model(self.name).description or ""
        if written and not is_ours(written):
            return
        champion = moves[-1].champion if moves else None
        there = champion is not None and has_version(self.tracking, self.name, champion)
        page = self.tracking.client.get_model_version(self.name, str(champion)).description if there else ""
        self.tracking.client.update_registered_model(self.name, model_page(self.name, page or "", moves))

    def _notice(self, last: Move | None, champion: int | None) -> None:
        """Writes down what moved the alias outside the log, if it stays where it is."""
        time.sleep(NOTICE_S)
        if alias_of(self.tracking, self.name, CHAMPION) != champion:
            return
        kept = tuple(version for version in (last.champions if last else ()) if has_version(self.tracking, self.name, version))
        if last is None or champion is not None:
            assert champion is not None
            why = "moved outside this log, on MLflow's pages or by another client" if last else "this log begins here, with the champion that was there"
            champions = (*(version for version in kept if version != champion), champion)
        elif last.champion in kept:
            why, champions = "the alias was removed outside this log, on MLflow's pages or by another client", ()
        else:
            why, champions = f"v{last.champion} was deleted outside this log{f'; back to v{kept[-1]}' if kept else ''}", kept
        self.append(last, "outside", champion, champions, why, who="unknown")


def whoami(tracking: Tracking) -> str:
    """Returns who moves an alias: the tracking server's user where there is one, and this process' user and machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid {os.getuid()}"
    known = os.environ.get("MLFLOW_TRACKING_USERNAME") if tracking.uri.startswith("http") else None
    here = f"{user}@{socket.gethostname()}"
    return f"{known} ({here})" if known else here


def _agree_on_run(tracking: Tracking, name: str) -> str:
    """Returns the run of a model's log, made if need be: a parameter of its oldest version's run, written once, says which it is."""
    from mlflow.exceptions import MlflowException

    client, oldest = tracking.client, _oldest_run(tracking, name)
    # A model that was deleted and made anew, or has a version of the same run as another, has a log of its own: no two were made in one millisecond.
    born = client.get_registered_model(name).creation_timestamp
    for number in itertools.count(1):
        key = f"{LEDGER_TAG}.{born}" if number == 1 else f"{LEDGER_TAG}.{born}.{number}"
        known = client.get_run(oldest).data.params.get(key)
        if known is None:
            made = tracking.open_run(f"{name} champion log", f"champion log of {name}", None)
            client.set_terminated(made)
            try:
                client.log_param(oldest, key, made, synchronous=True)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                client.delete_run(made)
            known = client.get_run(oldest).data.params[key]
        if _is_usable(tracking, known):
            return known
    raise AssertionError("unreachable")


def _oldest_run(tracking: Tracking, name: str) -> str:
    versions = sorted(all_versions(tracking, name), key=lambda version: int(version.version))
    for version in versions:
        if version.run_id and tracking.has_run(version.run_id):
            return version.run_id
    raise RegistryError(f"no version of {name} has a run in this store, where its log of moves could be kept; register one by `ddpm run`")


def _is_usable(tracking: Tracking, run_id: str) -> bool:
    """Tells whether a run can be written; one that was deleted on the pages is restored, because it holds the log."""
    from mlflow.exceptions import MlflowException

    try:
        if tracking.client.get_run(run_id).info.lifecycle_stage == "deleted":
            tracking.client.restore_run(run_id)
    except MlflowException as error:
        if error.error_code in NOT_THERE:
            return False
        raise
    return True
