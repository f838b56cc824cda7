"""The controller in a thread of the command: its result, its failure, and an interruption while it waits."""

import asyncio
import signal
import threading
import time
from typing import Any

import pytest

from cluster.interrupt import interruptible
from pipeline.training.fit import _interruptible


async def gives(result: Any) -> Any:
    await asyncio.sleep(0)
    return result


async def fails() -> Any:
    raise ValueError("worker died")


async def stands(seconds: float) -> Any:
    time.sleep(seconds)  # as a call to a head that is gone does


def test_the_result_and_the_failure_are_those_of_the_work():
    assert _interruptible(gives("done")) == "done"
    with pytest.raises(ValueError, match="worker died"):
        _interruptible(fails())


@pytest.mark.parametrize("work", [asyncio.Event().wait, lambda: stands(8)], ids=["waits", "hears nothing"])
def test_an_interruption_is_heeded_at_once_whatever_the_work_is_at(work: Any):
    began, before = time.monotonic(), set(threading.enumerate())

    def interrupted() -> None:
        with interruptible() as interrupt:
            threading.Timer(0.3, interrupt).start()
            _interruptible(work())

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - began < 6
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    for thread in set(threading.enumerate()) - before:
        thread.join()
