"""The report page, read back as a browser reads it: what is embedded, what is escaped, and how numbers are written."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.figures import grid, save_animation
from components.report.page import HALF_WIDTH, format_estimate, render_report, write_report
from components.report.records import Compared, Comparison, Estimate, Number, Picture, Report, Section, Verdict
from components.report.style import STYLE

HOSTILE = "<script>alert('1')</script> & \"x\" onload=y"
UNIT = {"extractor": "dct8", "digest": "1f00be77", "samples": "1,000"}
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, and the text inside each kind of tag; unbalanced tags fail."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def png(width: int = 20, height: int = 10, image_format: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(content, image_format)
    return content.getvalue()


def decoded(uri: str) -> tuple[str, bytes]:
    kind, _, content = uri.partition(",")
    return kind, base64.b64decode(content, validate=True)


def report_of(text: str, picture: bytes) -> Report:
    """Returns a report that says the same text wherever it says something."""
    verdict, estimate = Verdict(text, "good"), Estimate.of(9.12, 0.1)
    models = (Compared("a", estimate, note=text), Compared(text, estimate, Estimate.of(-0.5, 0.1), verdict, text))
    return Report(
        title=text,
        verdict=verdict,
        subtitle=text,
        warnings=(text,),
        numbers=(Number(text, estimate, {text: text}, note=text), Number(text, estimate, {text: text + "2"})),
        comparisons=(Comparison(text, "a", models, {text: text}),),
        sections=(Section(text, text, (Picture(picture, text, text, text),), verdict),),
        provenance={text: text},
    )


def test_text_is_shown_as_it_is_and_never_becomes_markup():
    harmless, hostile = (Page(render_report(report_of(text, png()))) for text in ("plain", HOSTILE))
    assert [(tag, sorted(attributes)) for tag, attributes in harmless.tags] == [(tag, sorted(attributes)) for tag, attributes in hostile.tags]
    for tag in ("title", "h1", "h2", "th", "td", "li", "dt", "dd", "span", "strong", "figcaption", "p", "a"):
        assert any(HOSTILE in text for text in hostile.texts[tag]), tag
    assert hostile.all("img")[0]["alt"] == HOSTILE


def test_the_page_refers_to_nothing_outside_itself():
    text = render_report(report_of("plain", png()))
    assert "://" not in text
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "base", "form"}
        for name in {"src", "srcset", "href", "data", "action", "poster"} & set(attributes):
            assert attributes[name].startswith(("data:image/", "#part-")), (tag, attributes)
    assert not [word for word in ("http", "//", "url(", "@import", "@font-face") if word in STYLE]


@pytest.mark.parametrize(("image_format", "kind"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("GIF", "image/gif"), ("WEBP", "image/webp")])
def test_a_picture_comes_back_byte_for_byte(image_format: str, kind: str):
    content = png(image_format=image_format)
    [image] = Page(render_report(report_of("x", content))).all("img")
    assert decoded(image["src"]) == (f"data:{kind};base64", content)
    assert (image["width"], image["height"]) == ("20", "10")


def test_an_animation_brings_its_last_frame_for_those_who_want_no_motion(tmp_path: Path):
    frames = [grid(np.full((2, 3, 8, 8), value, np.uint8), 2, 100) for value in (0, 100, 200)]
    save_animation(tmp_path / "a.gif", frames)
    content = (tmp_path / "a.gif").read_bytes()
    moving, still = Page(render_report(report_of("x", content))).all("img")
    assert decoded(moving["src"]) == ("data:image/gif;base64", content)
    kind, last = decoded(still["src"])
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(last)).convert("RGB")), np.asarray(frames[-1]))
    assert moving["alt"] == still["alt"]
    assert (moving["class"], still["class"]) == ("moving", "still")


def test_a_chart_stands_at_half_its_pixels():
    section = Section("a", pictures=(Picture(png(1160, 700), "a", "b", is_chart=True),))
    [image] = Page(render_report(Report("t", Verdict("v"), sections=(section,)))).all("img")
    assert (image["width"], image["height"]) == ("580", "350")


@pytest.mark.parametrize(("width", "place"), [(HALF_WIDTH, None), (HALF_WIDTH + 1, "wide")])
def test_a_wide_image_has_a_row_of_its_own(width: int, place: str | None):
    assert Page(render_report(report_of("x", png(width)))).all("figure")[0].get("class") == place


@pytest.mark.parametrize("content", [b"", b"<svg onload=alert(1)></svg>", png(image_format="BMP")])
def test_what_is_no_picture_is_refused_by_its_name(content: bytes):
    with pytest.raises(ValueError, match="picture='a cat' is not an image that pages can show; use"):
        render_report(Report("t", Verdict("v"), sections=(Section("s", pictures=(Picture(content, "a cat", "b"),)),)))


@pytest.mark.parametrize(
    ("estimate", "value", "interval"),
    [
        (Estimate.of(9.1234, 0.1122), "9.12", "± 0.22"),
        (Estimate.of(1234.5, 100), "1,234", "± 196"),
        (Estimate.of(0.03121, 0.0009), "0.0312", "± 0.0018"),
        (Estimate(0.0095, 0.007, 0.0128), "0.0095", "(0.0070 to 0.0128)"),
        (Estimate.of(-0.69, 0.09), "−0.69", "± 0.18"),
        (Estimate(12.3456), "12.35", ""),
        (Estimate(5.0, 5.0, 5.0), "5.000", "± 0.000"),
        (Estimate(0.0), "0", ""),
        (Estimate(float("nan"), 0, 1), "nan", ""),
        (Estimate(3.0, 1.0, float("inf")), "3.000", ""),
    ],
)
def test_a_number_is_rounded_as_its_interval_is(estimate: Estimate, value: str, interval: str):
    assert format_estimate(estimate) == (value, interval)


@pytest.mark.parametrize(("value", "text"), [(0.69, "+0.69"), (-0.69, "−0.69"), (-0.0001, "+0.00")])
def test_a_difference_has_a_sign(value: float, text: str):
    assert format_estimate(Estimate.of(value, 0.09), signed=True)[0] == text


def test_numbers_stand_in_a_table_with_their_intervals_and_what_differs_between_their_units():
    numbers = (Number("FID", Estimate.of(9.12, 0.1122), UNIT), Number("recall", Estimate(0.612, 0.601, 0.622), UNIT | {"digest": "a81b2c90"}, "higher"))
    page = Page(render_report(Report("t", Verdict("v"), numbers=numbers)))
    assert page.texts["th"] == ["number", "value, interval of 95 %", "better", "digest", "FID", "recall"]
    assert [attributes["scope"] for attributes in page.all("th")] == ["col"] * 4 + ["row"] * 2
    assert [attributes.get("class") for attributes in page.all("tr")] == [None, "decides", None]
    assert page.texts["td"] == ["9.12 ", "lower", "1f00be77", "0.612 ", "higher", "a81b2c90"]
    assert page.texts["span"] == ["± 0.22", "(0.601 to 0.622)"]
    assert list(zip(page.texts["dt"], page.texts["dd"], strict=True)) == [("extractor", "dct8"), ("samples", "1,000")]


def test_models_are_compared_with_their_baseline():
    models = (
        Compared("v3", Estimate.of(9.81, 0.11)),
        Compared("v4", Estimate.of(9.12, 0.11), Estimate.of(-0.69, 0.09), Verdict("better", "good")),
        Compared("v5", Estimate.of(12.4, 0.11), Estimate.of(2.59, 0.12), Verdict("worse", "bad")),
        Compared("v6", Estimate.of(3.1, 0.11), verdict=Verdict("sampler=ancestral differs")),
    )
    page = Page(render_report(Report("t", Verdict("v"), comparisons=(Comparison("FID", "v3", models, UNIT),))))
    assert page.texts["th"] == ["model", "value, lower is better", "difference from v3", "verdict", "v3", "v4", "v5", "v6"]
    baseline, better, worse, other = ["9.81 ", "baseline", ""], ["9.12 ", "−0.69 ", "better"], ["12.40 ", "+2.59 ", "worse"], ["3.10 ", "not compared"]
    assert page.texts["td"] == [*baseline, *better, *worse, *other, "sampler=ancestral differs"]
    assert dict(zip(page.texts["dt"], page.texts["dd"], strict=True)) == UNIT


def test_the_contents_lead_to_every_part():
    page = Page(render_report(report_of("x", png())))
    assert [link["href"] for link in page.all("a")] == [f"#{section['id']}" for section in page.all("section")] == ["#part-1", "#part-2", "#part-3"]


def test_equal_reports_are_equal_files_and_odd_text_is_no_obstacle(tmp_path: Path):
    report = report_of("猫 \udcff \x00 \x1b[31m", png())
    for name in ("a", "b"):
        write_report(tmp_path / name / "report.html", report)
    content = (tmp_path / "a" / "report.html").read_bytes()
    assert content == (tmp_path / "b" / "report.html").read_bytes()
    assert Page(content.decode()).texts["h1"] == ["猫 ? \N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}[31m"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["report.html"]
