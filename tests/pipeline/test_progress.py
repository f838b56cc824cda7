"""What a person reads of how far something is, by a clock of the test's own, and what the end says of times."""

import io
import re
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from pipeline import context as context_module
from pipeline.context import Reporter
from pipeline.progress import Pace, Times, repeatedly


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def paced(total: int, *advances: tuple[float, float], done: int = 0) -> Pace:
    """Returns the pace after advances, each some seconds after the one before."""
    clock = Clock()
    pace = Pace(total, done, clock)
    for seconds, amount in advances:
        clock.now += seconds
        pace.advance(amount)
    return pace


def test_until_there_is_a_rate_it_says_starting():
    assert str(paced(100)) == "starting"
    assert str(paced(100, (60, 10))) == "starting"
    assert str(paced(100, (60, 10), (0.5, 10))) == "starting"


def test_what_came_before_the_first_step_is_no_part_of_the_rate():
    assert str(paced(3000, (36, 50), (2, 50), (2, 50))) == "25 per second, 2 min left"


def test_a_large_rate_is_a_plain_number():
    assert str(paced(60_000, (2, 5880), (1, 5880), (1, 5880))) == "5,880 per second, 7 s left"


def test_what_an_earlier_call_did_is_no_part_of_the_rate():
    assert str(paced(3000, (36, 50), (2, 50), done=2900)) == "25 per second, 0 s left"


def test_the_rate_is_that_of_the_last_minute():
    slow, fast = [(10.0, 1.0)] * 100, [(1.0, 1.0)] * 120
    assert paced(10_000, *slow, *fast).per_second == pytest.approx(1.0)


def test_a_restart_begins_the_reckoning_anew():
    pace = paced(1000, *[(1.0, 10.0)] * 20)
    pace.restart()
    assert str(pace) == "starting"
    assert not pace.has_begun


def test_pieces_that_end_in_pairs_give_the_rate_of_both():
    assert paced(10_000, *[(14.8, 16.0), (1.2, 16.0)] * 4).per_second == pytest.approx(2.0, rel=0.2)


def test_parts_count_for_themselves_alone_and_are_told_in_the_order_in_which_they_began():
    clock = Clock()
    times = Times(clock)
    with times.of("outer"):
        clock.now += 1
        for seconds in (20, 30):
            with times.of("inner"):
                clock.now += seconds
        clock.now += 2
    assert list(times.take().items()) == [("outer", 3), ("inner", 50)]
    assert times.take() == {}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> tuple[Reporter, io.StringIO]:
    for name in ("FIRST_LINE_S", "LINE_EVERY_S", "LOOK_S"):
        monkeypatch.setattr(context_module, name, 0.02)
    reporter, said = Reporter(), io.StringIO()
    reporter.console = Console(file=said, width=200)
    return reporter, said


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_part_that_takes_long_says_again_and_again_that_it_goes_on(told: tuple[Reporter, io.StringIO]):
    reporter, said = told
    with reporter.part("writing the list of rows"):
        until(lambda: said.getvalue().count("\n") >= 2)
    assert re.fullmatch(r"(  writing the list of rows, \d+ s so far\n)+", said.getvalue())
    assert list(reporter.times.take()) == ["writing the list of rows"]


def test_a_part_that_can_count_says_how_far_it_is(told: tuple[Reporter, io.StringIO]):
    reporter, said = told
    with reporter.part("listing the source", lambda: "1,200 files"):
        until(lambda: "  listing the source, 1,200 files, 0 s so far\n" in said.getvalue())


def test_of_parts_within_each_other_the_inner_one_has_the_word(told: tuple[Reporter, io.StringIO]):
    reporter, said = told
    with reporter.part("outer"):
        with reporter.part("inner"):
            until(lambda: "inner" in said.getvalue())
            before = said.getvalue()
        until(lambda: "outer" in said.getvalue())
    assert "outer" not in before


def test_progress_is_told_even_while_nothing_advances(told: tuple[Reporter, io.StringIO]):
    reporter, said = told
    with reporter.progress("train", 3000, "steps") as advance:
        until(lambda: "train 0/3000 steps, starting, 0 s so far" in said.getvalue())
        advance(50)
        until(lambda: "train 50/3000 steps, starting\n" in said.getvalue())


def test_the_time_before_the_first_step_is_told_apart_where_it_has_a_name(told: tuple[Reporter, io.StringIO]):
    reporter, _ = told
    with reporter.progress("train", 10, "steps", start="starting the workers") as advance:
        time.sleep(0.1)
        advance(10)
        time.sleep(0.05)
    taken = reporter.times.take()
    assert taken["starting the workers"] >= 0.1
    assert taken["train"] >= 0.05


def test_something_done_repeatedly_ends_with_its_block():
    done: list[int] = []
    with repeatedly(0.01, lambda: done.append(1)):
        until(lambda: len(done) > 2)
    count = len(done)
    time.sleep(0.05)
    assert len(done) == count


def test_parts_that_are_each_short_do_not_add_up_to_silence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(context_module, "FIRST_LINE_S", 0.2)
    monkeypatch.setattr(context_module, "LOOK_S", 0.01)
    reporter, said = Reporter(), io.StringIO()
    reporter.console = Console(file=said, width=200)
    deadline = time.monotonic() + 10
    while not said.getvalue():
        assert time.monotonic() < deadline
        with reporter.part("one of many"):
            time.sleep(0.05)
    assert said.getvalue() == "  one of many, 0 s so far\n"
