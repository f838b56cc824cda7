"""A start of Ray that was begun early: who waits gets it, or what kept it, and its thread lives as long as that Ray."""

import threading

import pytest

from cluster.background_start import BackgroundStart


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "ray"}


def test_who_waits_goes_on_when_it_has_started_and_the_thread_lives_until_the_end():
    may, before = threading.Event(), threads()

    def start() -> None:
        may.wait(10)

    ahead = BackgroundStart(start)
    (thread,) = threads() - before
    may.set()
    ahead.wait()
    assert thread.is_alive()
    ahead.end()
    thread.join(10)
    assert not thread.is_alive()


def test_what_keeps_it_from_starting_is_raised_where_it_is_waited_for_and_nowhere_else():
    def fail() -> None:
        raise OSError("no room")

    ahead = BackgroundStart(fail)
    ahead.settle()
    with pytest.raises(OSError, match="no room"):
        ahead.wait()
    ahead.end()
