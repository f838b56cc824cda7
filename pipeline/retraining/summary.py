"""What a person reads in the morning: one line, and below it all that an attempt did. Lists, no tables: MLflow and chats draw those badly."""

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue
from pydantic_core import from_json

from components.counts import counted
from pipeline.artifacts import ChampionTest, Metric
from pipeline.progress import duration

Outcome = Literal["promoted", "kept", "skipped", "stopped", "open", "abandoned", "failed"]
MOST_WORDS, MOST_REASONS = 200, 4
_MARKS = re.compile(r"[\\`*\[\]]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown takes for markup; an underscore inside a word is none."""
_MENTION = re.compile(r"(?<!\w)@(?=\w)")


class AttemptSummary(BaseModel):
    """What became of one attempt. All but name, outcome, reason and time may be unknown, because the attempt ended before."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    attempt: int | None = None
    """None where there was nothing to begin an attempt with."""
    outcome: Outcome
    reason: str
    """Why, in a sentence."""
    started: str
    """ISO 8601, UTC."""
    seconds: float
    new_images: int | None = None
    removed_images: int | None = None
    quarantined: dict[str, int] = {}
    """Newly quarantined files by reason."""
    dataset_before: str | None = None
    """Digest."""
    dataset_after: str | None = None
    """Digest."""
    start: str | None = None
    """The weights that training started from, in words; None for fresh ones."""
    steps: int | None = None
    """Optimiser steps; None where nothing was trained."""
    device_hours: float | None = None
    """Devices times hours of training."""
    metric: Metric | None = None
    champion_test: ChampionTest | None = None
    """The paired test with the champion."""
    version: int | None = None
    """In the model registry."""
    model: str | None = None
    """models:/NAME/VERSION."""
    champion: int | None = None
    """Version that is champion after the attempt."""
    run_link: str | None = None
    """Address of the run's page, without a password."""
    report: str | None = None
    """Path of the page that shows everything."""
    warnings: tuple[str, ...] = ()
    failures: int = 0
    """In a row, this attempt included."""
    is_alert: bool = False
    """Whether so many failures in a row raise the alert."""


def headline(summary: AttemptSummary) -> str:
    """Returns one line: what became of the attempt, by which number, from how many new images, in what time."""
    who = summary.name if summary.attempt is None else f"{summary.name} #{summary.attempt}"
    alert = f"ALERT, {summary.failures} failures in a row: " if summary.is_alert else ""
    if summary.metric is None or summary.outcome not in ("promoted", "kept"):
        return f"{alert}{who}: {summary.outcome}: {_shortened(summary.reason)}"
    parts = [f"{_number(summary.metric, summary.champion_test)}", *_news(summary), duration(summary.seconds)]
    return f"{alert}{who}: {summary.outcome}{_versions(summary)}: {', '.join(parts)}"


def _versions(summary: AttemptSummary) -> str:
    if summary.outcome == "promoted":
        return "" if summary.version is None else f" v{summary.version}"
    return "" if summary.champion is None else f" champion v{summary.champion}"


def _number(metric: Metric, champion_test: ChampionTest | None) -> str:
    against = f" (champion v{champion_test.champion_version}: {champion_test.test.champion:.4g})" if champion_test else ""
    return f"{metric.name} {metric.value:.4g}{against}"


def _news(summary: AttemptSummary) -> list[str]:
    return [] if summary.new_images is None else [_images(summary.new_images, "new ")]


def _images(count: int, what: str = "") -> str:
    return f"{count:,} {what}image{'' if count == 1 else 's'}"


def to_markdown(summary: AttemptSummary) -> str:
    """Returns all of a summary for MLflow's page of the run and for a chat."""
    facts = [fact for part in (_when(summary), _data(summary), _training(summary), _result(summary), _places(summary)) for fact in part]
    lines = "\n".join(f"- **{name}**: {_one_line(value)}" for name, value in facts)
    repeats = summary.metric is None or summary.outcome not in ("promoted", "kept")
    reason = [] if repeats and len(_one_line(summary.reason)) <= MOST_WORDS else [_escaped(_one_line(summary.reason))]
    return "\n\n".join([f"**{_escaped(headline(summary))}**", *reason, lines]) + "\n"


Facts = Sequence[tuple[str, str]]


def _when(summary: AttemptSummary) -> Facts:
    row = [("failures in a row", str(summary.failures))] if summary.failures else []
    return [("when", f"{summary.started[:16].replace('T', ' ')} UTC, {duration(summary.seconds)}"), *row]


def _data(summary: AttemptSummary) -> Facts:
    removed = f", {summary.removed_images:,} removed" if summary.removed_images else ""
    images = [] if summary.new_images is None else [("images", f"{summary.new_images:,} new{removed}{_quarantined(summary.quarantined)}")]
    digests = [f"`{digest}`" for digest in dict.fromkeys((summary.dataset_before, summary.dataset_after)) if digest]
    return [*images, *([("dataset", " \N{RIGHTWARDS ARROW} ".join(digests))] if digests else [])]


def _quarantined(by_reason: dict[str, int]) -> str:
    if not by_reason:
        return ""
    worst = sorted(by_reason.items(), key=lambda item: (-item[1], item[0]))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in worst[:MOST_REASONS])
    return f", {sum(by_reason.values()):,} quarantined ({reasons}{', ...' if len(worst) > MOST_REASONS else ''})"


def _training(summary: AttemptSummary) -> Facts:
    if summary.steps is None:
        return []
    hours = "" if summary.device_hours is None else f", {summary.device_hours:.3g} device-hours"
    return [("training", f"{counted(summary.steps, 'step', ',')} from {summary.start or 'fresh weights'}{hours}")]


def _result(summary: AttemptSummary) -> Facts:
    metric, champion_test = summary.metric, summary.champion_test
    if metric is None:
        return []
    error = "" if metric.standard_error is None else f" ± {1.96 * metric.standard_error:.2g} (95 %)"
    unit = metric.unit
    facts = [
        (metric.name, f"{metric.value:.4g}{error}; lower is better"),
        (
            "unit",
            f"{unit.extractor} ({unit.extractor_digest[:12]}), {counted(unit.num_samples, 'sample', ',')} from seed {unit.first_seed}, {unit.drawn_by}, "
            f"against {counted(unit.reference_count, 'image', ',')} ({unit.reference_split}) of `{unit.reference_digest[:16]}`",
        ),
    ]
    return [*facts, ("against the champion", champion_test.in_words)] if champion_test else facts


def _places(summary: AttemptSummary) -> Facts:
    places = [
        ("version", f"`{summary.model}`" if summary.model else ""),
        ("champion", f"v{summary.champion}" if summary.champion is not None else ""),
        ("run", f"<{summary.run_link}>" if summary.run_link else ""),
        ("report", f"`{summary.report}`" if summary.report else ""),
    ]
    return [*((name, place) for name, place in places if place), *(("warning", _escaped(warning)) for warning in summary.warnings)]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shortened(text: str) -> str:
    text = _one_line(text)
    return text if len(text) <= MOST_WORDS else f"{text[: MOST_WORDS - 1].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def _escaped(text: str) -> str:
    """Returns text that Markdown shows as it is: errors hold names of files and labels, which could be markup or call a channel's members."""
    text = _MARKS.sub(r"\\\g<0>", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def to_payload(summary: AttemptSummary) -> dict[str, JsonValue]:
    """Returns a summary as a message: `text`, which chats show, and for programs all of it as `summary` and `markdown`.

    In `text` &, < and > are escaped as Slack asks for, and an invisible space stands behind the @ of what Mattermost would take for a name, so that no
    file's name can call a channel's members.
    """
    text = headline(summary).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _MENTION.sub("@\N{ZERO WIDTH SPACE}", text)
    return {"text": text, "summary": _plain(summary), "markdown": to_markdown(summary)}


def _plain(summary: AttemptSummary) -> JsonValue:
    """Returns the record as JSON; a number that is none, which JSON cannot say, becomes null."""
    return from_json(summary.model_dump_json())
