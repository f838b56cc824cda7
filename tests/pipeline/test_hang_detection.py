"""Which worker is found to stand still, and which is left alone."""

from collections.abc import Sequence

from pipeline.training.hang_detection import HangDetector
from pipeline.training.heartbeat import Beat, Phase

LIMIT = 60.0


def beat(rank: int, number: int, step: int, phase: Phase = "computing", attempt: int = 1) -> Beat:
    return Beat(number=number, attempt=attempt, rank=rank, num_workers=2, node_id="n", node="host", pid=100 + rank, first=0, step=step, phase=phase)


def found(hangs: HangDetector, seconds: Sequence[float], beats: Sequence[Sequence[Beat]]) -> list[int]:
    """Returns the ranks found at the last of some moments."""
    hung: list[Beat] = []
    for now, now_beats in zip(seconds, beats, strict=True):
        hung = hangs.look(now_beats, now)
    return [one.rank for one in hung]


def test_workers_that_make_steps_are_left_alone():
    moments = range(0, 1000, 50)
    assert found(HangDetector(LIMIT), moments, [[beat(0, now, now // 50 + 1), beat(1, now, now // 50 + 1)] for now in moments]) == []


def test_a_worker_that_says_nothing_any_more_is_the_one():
    beats = [[beat(0, now, 5), beat(1, min(now, 3), 5)] for now in (0, 3, 59, 61)]
    assert found(HangDetector(LIMIT), (0, 3, 59), beats[:3]) == []
    assert found(HangDetector(LIMIT), (0, 3, 59, 61), beats) == [1]


def test_of_workers_that_live_the_one_behind_is_waited_for():
    assert found(HangDetector(LIMIT), (0, 61), [[beat(0, now, 5), beat(1, now, 4)] for now in (0, 61)]) == [1]
    waiting = [[beat(0, now, 5, "waiting for data"), beat(1, now, 5)] for now in (0, 61)]
    assert found(HangDetector(LIMIT), (0, 61), waiting) == [0]
    assert found(HangDetector(LIMIT), (0, 61), [[beat(0, now, 5), beat(1, now, 5)] for now in (0, 61)]) == [0, 1]


def test_a_start_is_given_ten_times_as_long():
    starting = [[beat(0, now, 0), beat(1, now, 0)] for now in (0, 599, 601)]
    assert found(HangDetector(LIMIT), (0, 599), starting[:2]) == []
    assert found(HangDetector(LIMIT), (0, 599, 601), starting) == [0, 1]


def test_a_living_worker_that_draws_or_saves_is_given_ten_times_as_long_and_a_dead_one_is_not():
    drawing = [[beat(0, now, 5, "drawing samples"), beat(1, now, 5)] for now in (0, 599, 601)]
    assert found(HangDetector(LIMIT), (0, 599), drawing[:2]) == []
    assert found(HangDetector(LIMIT), (0, 599, 601), drawing) == [1]
    stopped = [[beat(0, 7, 5, "drawing samples"), beat(1, now, 5)] for now in (0, 61)]
    assert found(HangDetector(LIMIT), (0, 61), stopped) == [0]


def test_the_last_checkpoint_has_its_minute_however_short_the_limit():
    ending = [[beat(0, now, 9, "ending")] for now in (0, 1, 119, 121)]
    assert found(HangDetector(5.0), (0, 1, 119), ending[:3]) == []
    assert found(HangDetector(5.0), (0, 1, 119, 121), ending) == [0]


def test_nobody_waits_for_a_worker_that_has_ended():
    left = [[beat(0, now, 9, "ending"), beat(1, 7, 9, "ended")] for now in (0, 599, 601)]
    assert found(HangDetector(LIMIT), (0, 599, 601), left) == [0]
    assert found(HangDetector(LIMIT), (0, 10_000), [[beat(0, 7, 9, "ended"), beat(1, 7, 9, "ended")]] * 2) == []


def test_the_step_after_a_long_save_has_its_own_time():
    saved = [[beat(0, now, 5, phase)] for now, phase in ((0, "saving"), (300, "saving"), (301, "computing"), (360, "computing"), (362, "computing"))]  # type: ignore[arg-type]
    assert found(HangDetector(LIMIT), (0, 300, 301, 360), saved[:4]) == []
    assert found(HangDetector(LIMIT), (0, 300, 301, 360, 362), saved) == [0]


def test_steps_that_take_long_raise_the_limit_to_five_times_the_longest():
    slow = [[beat(0, now, step)] for now, step in ((0, 1), (40, 2), (239, 2), (241, 2))]
    assert found(HangDetector(LIMIT), (0, 40, 239), slow[:3]) == []
    assert found(HangDetector(LIMIT), (0, 40, 239, 241), slow) == [0]


def test_the_time_between_two_starts_counts_for_neither():
    hangs = HangDetector(LIMIT)
    assert found(hangs, (0, 50), [[beat(0, 1, 5)], [beat(0, 2, 5)]]) == []
    assert found(hangs, (100, 150), [[beat(0, 1, 5, attempt=2)], [beat(0, 2, 5, attempt=2)]]) == []
