"""One process at a time: a lock on a file system, a lease that must be renewed on S3. Either ends with the process that holds it."""

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.interrupt import interruptible
from components.storage import Location
from pipeline.context import Reporter
from pipeline.errors import ConfigError

RENEW_S, EXPIRE_S, SETTLE_S = 5.0, 30.0, 3.0
READS, RETRY_S = 5, 0.2


class LeaseHeldError(Exception):
    """Raised where another process holds the lease. The message names it."""


class LeaseLostError(ConfigError):
    """Raised in a block whose lease another process holds now, or may hold, because it could not be renewed."""


class _Lease(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: str
    holder: str
    beat: int


@contextmanager
def held(file: Location, *, wait: bool) -> Iterator[None]:
    """Keeps all other processes from the same block while this one is in it.

    A crashed holder on S3 is noticed when its lease was not renewed for half a minute.

    Args:
        file: what stands for the block, below the storage root.
        wait: wait for the other process instead of raising.

    Raises:
        HeldError: naming the process that is in the block.
    """
    with _locked(file, wait) if file.is_local else _leased(file, wait):
        yield


@contextmanager
def alone(file: Location, reporter: Reporter, does: str) -> Iterator[None]:
    """Keeps all other processes from the same block; says for whom it waits, if it has to.

    Args:
        does: what the other process does.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(held(file, wait=False))
        except LeaseHeldError as error:
            with reporter.waiting(f"{error} {does}; waiting for it"):
                stack.enter_context(held(file, wait=True))
        yield


def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextmanager
def _locked(file: Location, wait: bool) -> Iterator[None]:
    file.path.parent.mkdir(parents=True, exist_ok=True)
    with file.path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            lock.seek(0)
            raise LeaseHeldError(lock.read().strip()) from error
        lock.truncate(0)
        lock.write(_holder())
        lock.flush()
        yield


@contextmanager
def _leased(file: Location, wait: bool) -> Iterator[None]:
    mine = _take(file, wait)
    stop, lost = threading.Event(), threading.Event()
    with interruptible() as interrupt:
        renewing = threading.Thread(target=_renew, args=(file, mine, stop, lost, interrupt), name="lease", daemon=True)
        renewing.start()
        try:
            yield
        except KeyboardInterrupt:
            if lost.is_set():
                raise LeaseLostError(f"{file} could not be renewed, so that another process may have taken over; run the same command again") from None
            raise
        finally:
            stop.set()
            renewing.join()
            _give_back(file, mine)


def _give_back(file: Location, mine: _Lease) -> None:
    with suppress(OSError):
        if _is_mine(file, mine):
            file.remove()


def _take(file: Location, wait: bool) -> _Lease:
    mine = _Lease(id=uuid.uuid4().hex, holder=_holder(), beat=0)
    while True:
        other = _wait_while_alive(file, wait)
        if other is not None:
            raise LeaseHeldError(other.holder)
        file.write_text(mine.model_dump_json())
        # The last of several writers wins; each looks again when all have written.
        time.sleep(SETTLE_S)
        if _is_mine(file, mine):
            return mine


def _wait_while_alive(file: Location, wait: bool) -> _Lease | None:
    """Returns the lease of a live holder, or None once there is none: absent, or not renewed for so long that it has expired."""
    seen, since = _read(file), time.monotonic()
    while seen is not None and time.monotonic() - since < EXPIRE_S:
        time.sleep(SETTLE_S)
        now = _read(file)
        if now is not None and now != seen:
            if not wait:
                return now
            since = time.monotonic()
        seen = now
    return None


def _read(file: Location) -> _Lease | None:
    """Returns the lease there is; a read that fails, as one may while another process writes, is tried again."""
    for attempt in range(READS):
        try:
            return _Lease.model_validate_json(file.read_text())
        except (FileNotFoundError, ValidationError):
            return None
        except OSError:
            if attempt == READS - 1:
                raise
            time.sleep(RETRY_S)
    return None


def _is_mine(file: Location, mine: _Lease) -> bool:
    found = _read(file)
    return found is not None and found.id == mine.id


def _renew(file: Location, mine: _Lease, stop: threading.Event, lost: threading.Event, interrupt: Callable[[], None]) -> None:
    """Renews until told to stop; interrupts the block where that is over: found another's, or too long without success."""
    beat, renewed = 0, time.monotonic()
    while not stop.wait(RENEW_S):
        is_late = time.monotonic() - renewed >= EXPIRE_S - RENEW_S
        with suppress(OSError):
            if is_late or not _is_mine(file, mine):
                is_late = True
            else:
                beat += 1
                file.write_text(mine.model_copy(update={"beat": beat}).model_dump_json())
                renewed = time.monotonic()
        if is_late:
            lost.set()
            interrupt()
            return
