"""Moves of the champion: what the gate decides after a run, and what a person asks for. Each is one entry of the log."""

from collections.abc import Callable

from pipeline.artifacts import ChampionTest
from pipeline.context import Reporter
from pipeline.errors import RegistryError
from pipeline.registry.decide import Decision
from pipeline.registry.ledger import Ledger
from pipeline.registry.move import Move
from pipeline.registry.versions import CANDIDATE, CHAMPION, PREVIOUS, alias_of, has_version, newest_version, set_alias

Judge = Callable[[int | None], tuple[Decision, ChampionTest | None]]
"""Measures a version beside the champion of that number and decides."""


def pass_gate(ledger: Ledger, version: int, judge: Judge, reporter: Reporter) -> Move:
    """Returns the gate's decision about a version, made once, on the champion of the moment it is written.

    A decision that another process overtakes is made again, against the champion that there is now.
    """
    while True:
        last = ledger.settle()
        if (made := ledger.about(version)) is not None:
            return made
        champion = last.champion if last else None
        decision, champion_test = (Decision(True, "is champion already"), None) if champion == version else judge(champion)
        before = last.champions if last else ()
        champions = _behind(before, version) if decision.promote else before
        move = ledger.append(last, "promoted" if decision.promote else "kept", version, champions, decision.reason, champion_test=champion_test)
        if move is not None:
            return move
        reporter.line("  another process decided about the champion meanwhile; deciding anew")


def promote(ledger: Ledger, version: int, judge: Judge | None, why: str) -> Move:
    """Makes a version champion on a person's word.

    Args:
        judge: the gate, which must say better; None to do without.
        why: the person's reason.

    Raises:
        RegistryError: if it is champion already, or the gate keeps the champion.
    """
    while True:
        last = ledger.settle()
        if last is not None and last.champion == version:
            raise RegistryError(f"version={version} of {ledger.name} is champion already; `ddpm models show {ledger.name}` says since when")
        decision, champion_test = (Decision(True, ""), None) if judge is None else judge(last.champion if last else None)
        if not decision.promote:
            raise RegistryError(f"version={version} of {ledger.name} is not promoted: {decision.reason}; --force --why REASON moves the alias all the same")
        words = "; ".join(part for part in (why, decision.reason if judge else "not measured beside the champion") if part)
        move = ledger.append(last, "promoted by hand", version, _behind(last.champions if last else (), version), words, champion_test=champion_test)
        if move is not None:
            ledger.settle()
            return move


def roll_back(ledger: Ledger, to: int | None, why: str) -> Move:
    """Makes the champion before this one champion again, or an earlier one.

    Args:
        to: the version to go back to; the last champion that is still there by default.

    Raises:
        RegistryError: if there is none, or it was never champion.
    """
    while True:
        last = ledger.settle()
        earlier = [version for version in (last.champions[:-1] if last else ()) if has_version(ledger.tracking, ledger.name, version)]
        if last is None or not earlier:
            raise RegistryError(f"{ledger.name} has no earlier champion to go back to; `ddpm models promote {ledger.name}/VERSION` makes another one champion")
        if to is not None and to not in earlier:
            raise RegistryError(
                f"--to {to} is none of the earlier champions of {ledger.name}; use one of {', '.join(map(str, reversed(earlier)))}, or promote it"
            )
        back = earlier if to is None else earlier[: earlier.index(to) + 1]
        move = ledger.append(last, "rolled back", back[-1], tuple(back), why or f"v{last.champion} taken back")
        if move is not None:
            ledger.settle()
            return move


def delete_version(ledger: Ledger, version: int) -> None:
    """Deletes a version from the registry, unless an alias that matters points to it.

    Raises:
        RegistryError: if it is the champion, or the one that a rollback goes back to, or is not there.
    """
    ledger.settle()
    if not has_version(ledger.tracking, ledger.name, version):
        raise RegistryError(f"version={version} of {ledger.name} is not in the registry; `ddpm models list {ledger.name}` says what is")
    held = [alias for alias in (CHAMPION, PREVIOUS) if alias_of(ledger.tracking, ledger.name, alias) == version]
    if held:
        raise RegistryError(f"version={version} of {ledger.name} is {' and '.join(held)}, and deleting it would take the alias away; move the alias first")
    was_candidate = alias_of(ledger.tracking, ledger.name, CANDIDATE) == version
    ledger.tracking.client.delete_model_version(ledger.name, str(version))
    newest = newest_version(ledger.tracking, ledger.name)
    if was_candidate and newest is not None:
        set_alias(ledger.tracking, ledger.name, CANDIDATE, newest)


def _behind(champions: tuple[int, ...], version: int) -> tuple[int, ...]:
    return (*(champion for champion in champions if champion != version), version)
