"""One page for people about an evaluation or a comparison: an HTML file that holds its pictures and refers to nothing outside."""

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from ..storage import Location
from .records import Comparison, Estimate, Number, Picture, Report, Section, Verdict
from .style import STYLE

MEDIA_TYPES = {"PNG": "image/png", "GIF": "image/gif", "JPEG": "image/jpeg", "WEBP": "image/webp"}
CHART_DENSITY = 2
"""Pixels of a chart on a pixel of the page."""
HALF_WIDTH = 520
"""Pictures up to this width, in pixels of the page, stand two in a row; charts always do where there are two."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}


def write_report(path: Path | Location, report: Report) -> None:
    """Writes a report as one HTML file; equal reports give equal bytes.

    Raises:
        ValueError: if a picture is of no known format.
        OSError: if the file cannot be written.
    """
    Location.of(str(path)).write_bytes(render_report(report).encode())


def render_report(report: Report) -> str:
    """Returns the page of a report. Raises ValueError if a picture is of no known format."""
    titled = [(_safe(title), body) for title, body in _parts(report)]
    links = "".join(f'<li><a href="#part-{number}">{title}</a></li>' for number, (title, _) in enumerate(titled, 1))
    parts = "\n".join(
        f'<section id="part-{number}" aria-labelledby="title-{number}">\n<h2 id="title-{number}">{title}</h2>\n{body}</section>'
        for number, (title, body) in enumerate(titled, 1)
    )
    provenance = f'<footer>\n<h2>Provenance</h2>\n<div class="provenance">{_facts(report.provenance)}</div>\n</footer>\n' if report.provenance else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_safe(report.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{_safe(report.title)}</h1>
{_optional("p", "subtitle", report.subtitle)}{_verdict(report.verdict)}{_warnings(report.warnings)}<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main>
{parts}
</main>
{provenance}</body>
</html>
"""


def format_estimate(estimate: Estimate, *, signed: bool = False) -> tuple[str, str]:
    """Returns a value and its interval as text, rounded to two digits of the interval's half width, or four of a value alone.

    The interval reads `± 0.21` where it is as wide to either side, else `(9.1 to 9.6)`; it is empty where it is not known.

    Args:
        signed: writes a plus before positive values, as of differences.
    """
    value, low, high = estimate.value, estimate.low, estimate.high
    if low is None or high is None or not all(math.isfinite(number) for number in (value, low, high)):
        return _decimal(value, _decimals(value, 4), signed), ""
    half = (high - low) / 2
    decimals = _decimals(half, 2) if half else _decimals(value, 4)
    if abs((high - value) - (value - low)) <= 0.01 * half:
        return _decimal(value, decimals, signed), f"\N{PLUS-MINUS SIGN} {_decimal(half, decimals)}"
    return _decimal(value, decimals, signed), f"({_decimal(low, decimals, signed)} to {_decimal(high, decimals, signed)})"


def _decimals(value: float, digits: int) -> int:
    """Returns how many decimals show so many digits of a value."""
    return min(9, max(0, digits - 1 - math.floor(math.log10(abs(value))))) if value and math.isfinite(value) else 0


def _decimal(value: float, decimals: int, signed: bool = False) -> str:
    text = f"{value:{'+' if signed else ''}z,.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _safe(text: str) -> str:
    """Returns text as HTML: markup, lone surrogates of undecodable file names, and control characters made harmless."""
    return html.escape(text.encode("utf-8", "replace").decode().translate(CONTROLS))


def _optional(tag: str, name: str, text: str) -> str:
    return f'<{tag} class="{name}">{_safe(text)}</{tag}>\n' if text else ""


def _verdict(verdict: Verdict | None) -> str:
    return f'<p class="verdict {verdict.tone}">{_safe(verdict.text)}</p>\n' if verdict else ""


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{_safe(warning)}</li>" for warning in warnings)
    return f'<aside class="warnings" aria-label="Warnings">\n<h2>Before you trust this</h2>\n<ul>{items}</ul>\n</aside>\n'


def _parts(report: Report) -> Iterable[tuple[str, str]]:
    """Gives the title and the inside of every part of the page."""
    if report.numbers:
        yield "Numbers", _numbers(report.numbers)
    for comparison in report.comparisons:
        yield comparison.metric, _comparison(comparison)
    for section in report.sections:
        yield section.title, _section(section)


def _section(section: Section) -> str:
    pictures = "".join(_picture(picture) for picture in section.pictures)
    shown = f'<div class="pictures">\n{pictures}</div>\n' if pictures else ""
    return _optional("p", "lead", section.lead) + _verdict(section.verdict) + shown


def _numbers(numbers: Sequence[Number]) -> str:
    """Returns the table of numbers: what their units share stands once below it, what differs in columns."""
    parts = dict.fromkeys(part for number in numbers for part in number.unit)
    shared = {part: numbers[0].unit[part] for part in parts if len({number.unit.get(part) for number in numbers}) == 1}
    differing = [part for part in parts if part not in shared]
    rows = []
    for number in numbers:
        unit_cells = [_text_cell(number.unit.get(part, "")) for part in differing]
        rows.append(_row(number.name, number.note, [_estimate(number.estimate), _text_cell(number.better), *unit_cells]))
    rows[0] = rows[0].replace("<tr>", '<tr class="decides">', 1)
    return _table("Numbers", ["number", "value, interval of 95 %", "better", *differing], rows) + _facts(shared)


def _comparison(comparison: Comparison) -> str:
    rows = []
    for model in comparison.models:
        apart = "baseline" if model.name == comparison.baseline else "not compared"
        difference = _estimate(model.difference, signed=True) if model.difference else _text_cell(apart)
        verdict = f'<td class="conclusion {model.verdict.tone}">{_safe(model.verdict.text)}</td>' if model.verdict else _text_cell("")
        rows.append(_row(model.name, model.note, [_estimate(model.estimate), difference, verdict]))
    value = f"value, {comparison.better} is better" if comparison.better else "value"
    return _table(comparison.metric, ["model", value, f"difference from {comparison.baseline}", "verdict"], rows) + _facts(comparison.unit)


def _table(name: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{_safe(column)}</th>' for column in columns)
    body = "\n".join(rows)
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{_safe(name)}">\n{table}\n</div>\n'


def _row(name: str, note: str, cells: Sequence[str]) -> str:
    return f'<tr><th scope="row">{_safe(name)}{_optional("span", "note", note).strip()}</th>{"".join(cells)}</tr>'


def _text_cell(text: str) -> str:
    return f"<td>{_safe(text)}</td>"


def _estimate(estimate: Estimate, *, signed: bool = False) -> str:
    value, spread = format_estimate(estimate, signed=signed)
    interval = f' <span class="spread">{spread}</span>' if spread else ""
    return f'<td class="value">{value}{interval}</td>'


def _facts(facts: Mapping[str, str]) -> str:
    pairs = "".join(f"<div><dt>{_safe(name)}</dt><dd>{_safe(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{pairs}</dl>\n' if pairs else ""


def _picture(picture: Picture) -> str:
    image = _open(picture)
    width, height = (length // (CHART_DENSITY if picture.is_chart else 1) for length in image.size)
    size = f'alt="{_safe(picture.alt)}" width="{width}" height="{height}" style="--natural: {width}px"'
    still = _last_frame(image)
    name = "chart" if picture.is_chart else "moving" if still else "image"
    images = f'<img class="{name}" src="{_data_uri(str(image.format), picture.content)}" {size}>'
    if still:
        images += f'<img class="still" src="{_data_uri("PNG", still)}" {size}>'
    wide = ' class="wide"' if not picture.is_chart and width > HALF_WIDTH else ""
    caption = f"<strong>{_safe(picture.shows)}</strong> {_safe(picture.reading)}".rstrip()
    return f'<figure{wide}><div class="scroll">{images}</div>\n<figcaption>{caption}</figcaption></figure>\n'


def _open(picture: Picture) -> Image.Image:
    try:
        return Image.open(io.BytesIO(picture.content), formats=list(MEDIA_TYPES))
    except OSError as error:
        raise ValueError(f"picture={picture.alt!r} is not an image that pages can show; use the content of a PNG, GIF, JPEG or WebP file") from error


def _data_uri(image_format: str, content: bytes) -> str:
    return f"data:{MEDIA_TYPES[image_format]};base64,{base64.b64encode(content).decode()}"


def _last_frame(image: Image.Image) -> bytes:
    """Returns the last frame of an animation as a PNG, for those who asked for no motion, and for paper; nothing where nothing moves."""
    frames = getattr(image, "n_frames", 1)
    if frames == 1:
        return b""
    image.seek(frames - 1)
    content = io.BytesIO()
    image.convert("RGB").save(content, "PNG")
    return content.getvalue()
