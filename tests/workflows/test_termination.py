"""What ends a command from outside: signals, a terminal that closes, a reader who has gone. Descriptors and signals are real."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from servers import environment
from support import ddpm_command

from workflows.streams import unread_is_fine
from workflows.termination import ASKED, Terminated, handling_termination

LONG_S = 30.0


@pytest.fixture(autouse=True)
def default_answers() -> Iterator[None]:
    """Undoes what a shell does to commands in the background, and nohup to all."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ASKED}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for descriptor in (reader, writer):
        try:
            os.close(descriptor)
        except OSError:
            continue


def wait_to_be_ended() -> None:
    time.sleep(LONG_S)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(LONG_S if signal.getsignal(number) != signal.SIG_IGN else 0)


def close_reader(reader: int, writer: int) -> None:
    """Closes the reading end of what was written to, and waits to be ended."""
    with handling_termination(writer):
        os.write(writer, b"read\n")
        os.close(reader)
        wait_to_be_ended()


@pytest.mark.parametrize("number", ASKED)
def test_a_signal_ends_the_block_and_the_answers_before_are_back(number: signal.Signals):
    with pytest.raises(Terminated), handling_termination():
        send(number)
    assert [signal.getsignal(each) for each in ASKED] == [signal.SIG_DFL] * 2


def test_a_terminal_that_sends_more_than_one_hangup_does_not_disturb_the_way_out():
    tidied = []

    def tidy_up() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        tidied.append(True)

    def block() -> None:
        with handling_termination(), ExitStack() as stack:
            stack.callback(tidy_up)
            send(signal.SIGHUP)

    with pytest.raises(Terminated):
        block()
    assert tidied


def test_what_a_library_raises_in_place_of_the_request_is_the_request():
    def wait_as_ray_does() -> None:
        try:
            send(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    with pytest.raises(Terminated), handling_termination():
        wait_as_ray_does()


def test_ctrl_c_is_no_request_to_end_even_where_it_ends_the_reader_too(pipe: tuple[int, int]):
    tidied = []

    def tidy_up() -> None:
        os.close(pipe[0])
        while os.readlink(f"/proc/self/fd/{pipe[1]}") != os.devnull:
            time.sleep(0.01)
        tidied.append(True)

    def block() -> None:
        with handling_termination(pipe[1]), ExitStack() as stack:
            stack.callback(tidy_up)
            send(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as interrupt:
        block()
    assert not isinstance(interrupt.value, Terminated)
    assert tidied
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_second_sigterm_ends_the_way_out_too():
    with handling_termination():
        with pytest.raises(Terminated):
            send(signal.SIGTERM)
        with pytest.raises(Terminated):
            send(signal.SIGTERM)


def test_a_reader_who_has_gone_ends_the_block_and_what_is_written_then_vanishes(pipe: tuple[int, int]):
    with pytest.raises(Terminated):
        close_reader(*pipe)
    assert os.write(pipe[1], b"never read\n") == 11


def test_a_terminal_that_closes_is_a_reader_who_has_gone():
    master, slave = os.openpty()
    with pytest.raises(Terminated):
        close_reader(master, slave)
    assert os.write(slave, b"never read\n") == 11
    os.close(slave)


def test_a_command_that_ignores_hangups_as_nohup_has_it_goes_on_without_readers(pipe: tuple[int, int]):
    reader, writer = pipe
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with handling_termination(writer):
        os.kill(os.getpid(), signal.SIGHUP)
        os.close(reader)
        deadline = time.monotonic() + LONG_S
        while time.monotonic() < deadline:
            try:
                os.write(writer, b"unheard\n")
                break
            except BrokenPipeError:
                time.sleep(0.01)
        else:
            pytest.fail("the descriptor still leads to a pipe that nobody reads")
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_outputs_that_are_read_and_plain_files_end_nothing(pipe: tuple[int, int]):
    file = os.open(os.devnull, os.O_WRONLY)
    with handling_termination(pipe[1], file):
        os.write(pipe[1], b"read\n")
        time.sleep(0.2)
    os.close(file)
    assert os.read(pipe[0], 100) == b"read\n"


@pytest.mark.parametrize("failure", [BrokenPipeError(), SystemExit(1)], ids=["plain", "as rich has it"])
def test_a_result_that_is_not_read_to_its_end_is_no_failure(pipe: tuple[int, int], failure: BaseException):
    with os.fdopen(os.dup(pipe[1]), "w") as stream:
        os.close(pipe[0])
        with unread_is_fine(stream):
            stream.write("a line that stays in the buffer")
            raise failure


def test_a_command_whose_streams_are_closed_prints_nowhere_and_works():
    shell = " ".join(ddpm_command("config", "digits"))
    for closed in (">&-", ">&- 2>&-", "<&- >&- 2>&-"):
        assert subprocess.run(["bash", "-c", f"{shell} {closed}"], env=environment({}), check=False, capture_output=True, timeout=120).returncode == 0
