"""How an attempt that was made elsewhere says how it ended: by the end of its log, for to Ray and Kubernetes every exit code but 0 is a failure."""

import re
from dataclasses import dataclass

_MARK = "ddpm retrain: exit code "
_SAID = re.compile(rf"^(?:(.*)\n)?{_MARK}(\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class LoggedOutcome:
    """What an attempt said of itself.

    Attributes:
        code: the exit code that `ddpm retrain` has where it is called directly.
        line: the same for a person.
    """

    code: int
    line: str


def last_line(code: int) -> str:
    """Returns the line that ends an attempt's log."""
    return f"{_MARK}{code}\n"


def said_in(log: str) -> LoggedOutcome | None:
    """Returns what an attempt said at the end of its log; None where it was cut short."""
    found = [LoggedOutcome(int(match[2]), (match[1] or "").strip()) for match in _SAID.finditer(log.replace("\r\n", "\n"))]
    return found[-1] if found else None
