"""What a person reads in the morning about an attempt."""

import math
from typing import Any

import pytest

from pipeline.artifacts import ChampionTest, Metric, MetricUnit, PairedTest
from pipeline.retraining.summary import AttemptSummary, Outcome, headline, to_markdown, to_payload

UNIT = MetricUnit(
    extractor="fd_dct8_v1",
    extractor_digest="e" * 64,
    preprocessing="p",
    reference_digest="r" * 64,
    reference_count=1500,
    num_samples=1000,
    first_seed=0,
    sampler="ddim",
    steps=50,
)


def attempt(outcome: Outcome, reason: str = "because", **facts: object) -> AttemptSummary:
    return AttemptSummary.model_validate(
        {"name": "digits", "outcome": outcome, "reason": reason, "started": "2026-11-21T03:00:05.1+00:00", "seconds": 12.3} | facts
    )


MEASURED: dict[str, Any] = {
    "attempt": 7,
    "seconds": 725.0,
    "new_images": 214,
    "removed_images": 3,
    "quarantined": {"empty": 1, "truncated": 2},
    "dataset_before": "aaaa",
    "dataset_after": "bbbb",
    "start": "models:/digits/7 (ema)",
    "steps": 4000,
    "device_hours": 0.2014,
    "metric": Metric(value=3.1, unit=UNIT, standard_error=0.1),
    "champion_test": ChampionTest(
        champion_version=7,
        test=PairedTest(first_seed=0, num_samples=1000, candidate=3.1, champion=3.6, difference=-0.5, standard_error=0.1),
        confirmation=PairedTest(first_seed=1000, num_samples=1000, candidate=3.2, champion=3.6, difference=-0.4, standard_error=0.1),
    ),
    "version": 8,
    "model": "models:/digits/8",
    "champion": 8,
    "run_link": "http://127.0.0.1:5000/#/experiments/1/runs/2",
    "report": "/storage/report.html",
    "warnings": ("few samples",),
}


def test_a_promoted_version_is_one_line_with_number_champion_news_and_time():
    expected = "digits #7: promoted v8: fd_dct8_v1_1000 3.1 (champion v7: 3.6), 214 new images, 12 min"
    assert headline(attempt("promoted", **MEASURED)) == expected
    alone = attempt("promoted", **MEASURED | {"champion_test": None, "new_images": 1})
    assert headline(alone) == "digits #7: promoted v8: fd_dct8_v1_1000 3.1, 1 new image, 12 min"


def test_a_kept_champion_is_named_with_the_number_that_did_not_beat_it():
    assert (
        headline(attempt("kept", **MEASURED | {"champion": 7})) == "digits #7: kept champion v7: fd_dct8_v1_1000 3.1 (champion v7: 3.6), 214 new images, 12 min"
    )


@pytest.mark.parametrize("outcome", ["skipped", "stopped", "failed", "open", "abandoned"])
def test_any_other_outcome_is_told_with_its_reason_on_one_line(outcome: Outcome):
    assert headline(attempt(outcome, "no new\nimages")) == f"digits: {outcome}: no new images"
    assert headline(attempt(outcome, **MEASURED)) == f"digits #7: {outcome}: because"
    assert len(headline(attempt(outcome, "x" * 5000))) < 300


def test_an_alert_comes_first():
    assert headline(attempt("failed", "no disk", failures=3, is_alert=True, attempt=9)) == "ALERT, 3 failures in a row: digits #9: failed: no disk"


def test_the_page_tells_everything_as_a_list():
    assert to_markdown(attempt("promoted", "better: by far", **MEASURED)) == (
        "**digits #7: promoted v8: fd_dct8_v1_1000 3.1 (champion v7: 3.6), 214 new images, 12 min**\n\n"
        "better: by far\n\n"
        "- **when**: 2026-11-21 03:00 UTC, 12 min\n"
        "- **images**: 214 new, 3 removed, 3 quarantined (2 truncated, 1 empty)\n"
        "- **dataset**: `aaaa` \N{RIGHTWARDS ARROW} `bbbb`\n"
        "- **training**: 4,000 steps from models:/digits/7 (ema), 0.201 device-hours\n"
        "- **fd_dct8_v1_1000**: 3.1 ± 0.2 (95 %); lower is better\n"
        "- **unit**: fd_dct8_v1 (eeeeeeeeeeee), 1,000 samples from seed 0, ddim, against 1,500 images (train) of `rrrrrrrrrrrrrrrr`\n"
        "- **against the champion**: v7 has 3.6 on the same seeds: difference -0.5 ± 0.16 (90 %); on fresh seeds -0.4 ± 0.16 (90 %)\n"
        "- **version**: `models:/digits/8`\n"
        "- **champion**: v8\n"
        "- **run**: <http://127.0.0.1:5000/#/experiments/1/runs/2>\n"
        "- **report**: `/storage/report.html`\n"
        "- **warning**: few samples\n"
    )


def test_a_short_reason_is_told_once_and_a_long_one_in_full():
    assert to_markdown(attempt("skipped", "nothing new")) == "**digits: skipped: nothing new**\n\n- **when**: 2026-11-21 03:00 UTC, 12 s\n"
    long = "a " * 400 + "end"
    assert long in to_markdown(attempt("stopped", long, failures=2))
    assert "- **failures in a row**: 2\n" in to_markdown(attempt("stopped", long, failures=2))


def test_names_of_files_are_no_markup():
    page = to_markdown(attempt("failed", "<!channel> `x` [a](b) _c_ snake_case *d* <img>", warnings=("<b>",)))
    assert page.startswith(r"**digits: failed: &lt;!channel&gt; \`x\` \[a\](b) \_c\_ snake_case \*d\* &lt;img&gt;**")
    assert "- **warning**: &lt;b&gt;\n" in page


def test_a_message_is_text_for_chats_and_the_whole_record_for_programs():
    summary = attempt("promoted", **MEASURED | {"device_hours": math.nan, "start": None})
    message = to_payload(summary)
    assert message["text"] == headline(summary)
    assert message["markdown"] == to_markdown(summary)
    record = message["summary"]
    assert isinstance(record, dict)
    assert record["device_hours"] is None
    assert AttemptSummary.model_validate(record) == summary.model_copy(update={"device_hours": None})
    assert "from fresh weights" in to_markdown(summary)
    called = to_payload(attempt("failed", "<!channel> & @all of models:/x@champion"))["text"]
    assert called == "digits: failed: &lt;!channel&gt; &amp; @\N{ZERO WIDTH SPACE}all of models:/x@champion"
