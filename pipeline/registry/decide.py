"""Whether the champion falls: pure, so that every case can be tested."""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.artifacts import ChampionTest, Metric, MetricUnit


@dataclass(frozen=True)
class Decision:
    """Whether the champion falls, and why, in a sentence."""

    promote: bool
    reason: str


@dataclass(frozen=True)
class Champion:
    """The version that the alias points to.

    Attributes:
        metric: its number, if it carries one.
        samples: folder of its samples' features, if it says so.
    """

    version: int
    metric: Metric | None
    samples: str | None = None


Ask = Callable[[Champion], ChampionTest | str]


def unlike_parts(one: MetricUnit, other: MetricUnit) -> list[str]:
    """Returns which parts of two units differ, with both values."""
    values = ((part, getattr(one, part), getattr(other, part)) for part in MetricUnit.model_fields)
    return [f"{part} {first} against {second}" for part, first, second in values if first != second]


def decide(candidate: Metric, champion: Champion | None, champion_test: ChampionTest | str | None, min_gain: float, *, copies: bool = False) -> Decision:
    """Promotes a first version, and one that is better by more than chance and `min_gain`, twice; numbers of unlike units are never compared.

    Better means: the difference to the champion on the same seeds plus 1.645 of its standard errors is below -min_gain (one-sided, 95 %),
    and so it is on fresh seeds. A candidate that copies training images takes no champion's place.

    Args:
        champion_test: the test, or why there is none.
    """
    if champion is None:
        return Decision(True, f"first version: {candidate.name} is {candidate.value:.4g}, and there was no champion")
    refused = why_not_compared(candidate, champion)
    if refused and not isinstance(champion_test, str):
        return Decision(False, f"kept: {refused}")
    if copies:
        return Decision(False, f"kept: the candidate copies training images; champion v{champion.version} stays")
    if champion_test is None or isinstance(champion_test, str):
        return Decision(False, f"kept: champion v{champion.version} could not be measured beside it{f': {champion_test}' if champion_test else ''}")
    numbers = f"{candidate.name} is {champion_test.test.candidate:.4g}, champion v{champion.version} has {champion_test.test.champion:.4g} on the same seeds"
    wanted = f"below {-min_gain:g}" if min_gain else "below 0"
    first = f"difference {champion_test.test.interval}"
    if not champion_test.test.upper < -min_gain:
        return Decision(False, f"kept: {numbers}; {first}: its upper end must be {wanted}")
    if champion_test.confirmation is None or not champion_test.confirmation.upper < -min_gain:
        again = "was not confirmed" if champion_test.confirmation is None else f"on fresh seeds only {champion_test.confirmation.interval}"
        return Decision(False, f"kept: {numbers}; {first}, {again}: the upper end must be {wanted} both times")
    return Decision(True, f"better: {numbers}; {first}, on fresh seeds {champion_test.confirmation.interval}")


def why_not_compared(candidate: Metric, champion: Champion) -> str:
    """Returns why a candidate's number cannot be held against the champion's, nothing where it can."""
    if champion.metric is None:
        return f"champion v{champion.version} carries no metric to compare with; evaluate it, or move the alias by hand"
    theirs = champion.metric.unit
    unlike = unlike_parts(candidate.unit, theirs)
    advice = f"; evaluate.precision={theirs.precision} measures as the champion was measured" if candidate.unit.precision != theirs.precision else ""
    return f"not comparable with champion v{champion.version}, whose unit differs: {'; '.join(unlike)}{advice}" if unlike else ""
