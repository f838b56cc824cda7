"""How errors are told: a line for each, whatever a person's values hold."""

import re

from components.errors import DataError

MAX_WORD, HEAD, TAIL = 200, 90, 60
"""Characters of a word, of which so many are left at either end where it is longer."""
MAX_LINE = 4000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD + 1},}}")


def lines_of(error: Exception) -> list[str]:
    """Returns an error's message in lines: one, or where it has several parts one for each."""
    parts = [str(error)] if isinstance(error, DataError) else [str(part) for part in error.args]
    return [one_line(part) for part in parts or [str(error)]]


def one_line(text: str) -> str:
    """Returns text with what a terminal cannot show in one line written out, such as line breaks, and with long words cut in their middle."""
    text = _LONG_WORD.sub(lambda match: _cut(match[0]), _CONTROL.sub(_written_out, text))
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"


def _written_out(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _cut(word: str) -> str:
    return f"{word[:HEAD]}...({len(word)} characters)...{word[-TAIL:]}"
