"""What a report says: verdicts, numbers, comparisons and pictures, before they become a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Tone = Literal["good", "bad", "neutral"]
Better = Literal["lower", "higher", ""]


@dataclass(frozen=True)
class Verdict:
    """A conclusion in a sentence. `tone` colours it, and says nothing that the sentence does not say."""

    text: str
    tone: Tone = "neutral"


@dataclass(frozen=True)
class Estimate:
    """A value and, where it is known, its interval of 95 %."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, standard_error: float) -> "Estimate":
        """Returns a value with the interval of a normal distribution, 1.96 standard errors to either side."""
        return cls(value, value - 1.96 * standard_error, value + 1.96 * standard_error)


@dataclass(frozen=True)
class Number:
    """A measured number.

    Attributes:
        unit: all that must be equal before it may be compared: name of the part, such as `extractor`, to its value.
        note: stands below the name.
    """

    name: str
    estimate: Estimate
    unit: Mapping[str, str]
    better: Better = "lower"
    note: str = ""


@dataclass(frozen=True)
class Compared:
    """A model in a comparison.

    Attributes:
        difference: from the comparison's baseline; none for the baseline itself, and where units differ.
        note: stands below the name.
    """

    name: str
    estimate: Estimate
    difference: Estimate | None = None
    verdict: Verdict | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Several models by one number, which has one unit.

    Attributes:
        metric: name of the number.
        baseline: name of the model that differences are taken from.
    """

    metric: str
    baseline: str
    models: Sequence[Compared]
    unit: Mapping[str, str]
    better: Better = "lower"


@dataclass(frozen=True)
class Picture:
    """An image file on the page.

    Attributes:
        content: of a PNG, GIF, JPEG or WebP file.
        alt: what is seen, for those who cannot see it.
        shows: what it shows; stands below it.
        reading: how to read it; stands behind that.
        is_chart: ink on white, which may change places with the page in dark mode; its pixels are half as large as the page's.
    """

    content: bytes
    alt: str
    shows: str
    reading: str = ""
    is_chart: bool = False


@dataclass(frozen=True)
class Section:
    """Pictures about one question, with its answer where there is one.

    Attributes:
        lead: a sentence or two below the title.
    """

    title: str
    lead: str = ""
    pictures: Sequence[Picture] = ()
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Report:
    """What a page says, in its order.

    Attributes:
        numbers: the one that decides first.
        provenance: what all of it was made from and with: digests, commit, versions.
    """

    title: str
    verdict: Verdict
    subtitle: str = ""
    warnings: Sequence[str] = ()
    numbers: Sequence[Number] = ()
    comparisons: Sequence[Comparison] = ()
    sections: Sequence[Section] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
