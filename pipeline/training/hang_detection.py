"""Which workers stand still, judged by the driver's clock alone: pure, so that it can be tested without a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from pipeline.training.heartbeat import Beat, Phase
from pipeline.training.plan import LAST_WRITE_S

SILENT_S, SLOWEST_TIMES, LONG_TIMES = 10.0, 5.0, 10.0
LONG_AT_LEAST_S = 2 * LAST_WRITE_S  # the last checkpoint may be tried for a minute
_ORDER = {phase: number for number, phase in enumerate(get_args(Phase))}
_MAY_TAKE_LONG = ("drawing samples", "validating", "saving", "ending")


@dataclass
class _Seen:
    """When a worker's step, and when its beat, was last seen to change."""

    step: int
    step_at: float
    number: int
    number_at: float
    phase: Phase


class HangDetector:
    """Watches the beats of one run, attempt after attempt.

    An attempt stands still when none of its workers has finished a step for the limit, or for five times its longest step so far where
    that is more; for ten times as long, and at least two minutes, before its first step, and while a living worker draws samples, saves or
    ends. A worker that has ended is waited for by nobody.
    """

    def __init__(self, limit_s: float) -> None:
        """Watches with a limit in seconds."""
        self._limit_s = limit_s
        self._attempt = 0
        self._seen: dict[int, _Seen] = {}
        self._slowest = 0.0

    def look(self, beats: Sequence[Beat], now: float) -> list[Beat]:
        """Returns the workers of an attempt that stands still which the others wait for; none while it moves.

        Args:
            beats: the last beat of each worker of the newest attempt.
            now: seconds on a clock that only goes forward.
        """
        if not beats:
            return []
        if beats[0].attempt != self._attempt:
            self._attempt, self._seen, self._slowest = beats[0].attempt, {}, 0.0
        for beat in beats:
            self._note(beat, now)
        beats = [beat for beat in beats if beat.phase != "ended"]
        silent = [beat for beat in beats if now - self._seen[beat.rank].number_at >= min(SILENT_S, self._limit_s)]
        may_take_long = any(beat.phase in _MAY_TAKE_LONG for beat in beats if beat not in silent) or not any(beat.step > beat.first for beat in beats)
        limit_s = max(self._limit_s, SLOWEST_TIMES * self._slowest)
        if may_take_long:
            limit_s = max(LONG_TIMES * limit_s, LONG_AT_LEAST_S)
        if not beats or now - max(seen.step_at for seen in self._seen.values()) < limit_s:
            return []
        if silent:
            return silent
        behind = min((beat.step, _ORDER[beat.phase]) for beat in beats)
        return [beat for beat in beats if (beat.step, _ORDER[beat.phase]) == behind]

    def _note(self, beat: Beat, now: float) -> None:
        seen = self._seen.setdefault(beat.rank, _Seen(beat.step, now, beat.number, now, beat.phase))
        if beat.step != seen.step:
            if seen.step > beat.first:
                self._slowest = max(self._slowest, (now - seen.step_at) / (beat.step - seen.step))
            seen.step, seen.step_at = beat.step, now
        if seen.phase in _MAY_TAKE_LONG and beat.phase not in _MAY_TAKE_LONG:
            for other in self._seen.values():
                other.step_at = now  # what took long is over
        seen.phase = beat.phase
        if beat.number != seen.number:
            seen.number, seen.number_at = beat.number, now
