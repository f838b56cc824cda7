"""An attempt that is made elsewhere: how its log says what became of it, and what its command refuses."""

from collections.abc import Callable

import pytest

from workflows.outcome import LoggedOutcome, last_line, said_in
from workflows.retrain import EXIT_CODES

LINE = "digits #7: kept champion v4: FD (dct8) 0.5, 12 new images, 9 s"


@pytest.mark.parametrize("code", sorted({*EXIT_CODES.values(), 1, 143}))
def test_a_log_gives_back_the_code_that_ended_it_and_the_line_before(code: int):
    assert said_in(f"step 4 of 12\n{LINE}\n{last_line(code)}") == LoggedOutcome(code, LINE)


def test_the_last_attempt_of_a_log_counts_and_what_follows_it_does_not():
    log = f"digits #6: failed: RegistryError\n{last_line(1)}{LINE}\r\n{last_line(10)}Job 'ddpm-7' succeeded\n"
    assert said_in(log) == LoggedOutcome(10, LINE)


@pytest.mark.parametrize("log", ["", LINE, f"{LINE}\n{last_line(10)[:-3]}", f"said {last_line(0)}", "ddpm retrain: exit code ten\n"])
def test_a_log_that_was_cut_short_says_nothing(log: str):
    assert said_in(log) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tick", "monday"], "--tick monday finds a cluster's job again, and there is no --address; name one, or leave the option out"),
        (["--address", "http://127.0.0.1:9", "--json"], "--json is not for --address"),
        (["--address", "http://127.0.0.1:9", "--until", "train"], "--until train is not for --address"),
        (["--address", "http://127.0.0.1:9", "--tick", "a~b", "cluster.storage=/x"], "--tick a~b is no part of a job's name"),
    ],
)
def test_options_that_do_not_go_together_are_one_line_and_exit_code_2(run: Callable[..., tuple[int, str, str]], options: list[str], message: str):
    code, out, err = run("retrain", "digits", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
