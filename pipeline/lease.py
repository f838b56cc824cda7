"""One process at a time: a lock on a file system, a lease that must be renewed on S3. Either ends with the process that holds it."""

import fcntl
import itertools
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from cluster.interrupt import interruptible
from components.storage import Location
from pipeline.context import Reporter
from pipeline.errors import ConfigError
from pipeline.lease_record import Record, RecordFile, Version, record_file

RENEW_S, EXPIRE_S, SETTLE_S = 5.0, 30.0, 3.0
TRIES, RETRY_S = 5, 0.2


class LeaseHeldError(Exception):
    """Raised where another process holds the lease. The message names it."""


class LeaseLostError(ConfigError):
    """Raised in a block whose lease another process holds now, or may hold, because it could not be renewed."""


@dataclass(frozen=True)
class _Taken:
    """A lease that this process holds.

    Attributes:
        version: what it wrote last.
        record: the same, without the tag.
        since: when that began, by this machine's monotonic clock.
    """

    version: Version
    record: Record
    since: float


@contextmanager
def held(file: Location, *, wait: bool) -> Iterator[None]:
    """Keeps all other processes from the same block while this one is in it.

    A crashed holder on S3 is noticed when its lease was not renewed for half a minute. Where the store honours conditional writes, at most
    one of several processes that take the lease at once succeeds; elsewhere each writes, waits, and looks whether it was the last.

    Args:
        file: what stands for the block, below the storage root.
        wait: wait for the other process instead of raising.

    Raises:
        LeaseHeldError: naming the process that is in the block.
        LeaseLostError: in the block, where another process may be in it by now.
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
    lease = record_file(file)
    taken = _take(lease, wait)
    with interruptible() as interrupt:
        renewal = _Renewal(lease, taken, interrupt)
        try:
            with renewal:
                yield
        except KeyboardInterrupt:
            if renewal.is_lost:
                raise LeaseLostError(f"{file} could not be renewed, so that another process may have taken over; run the same command again") from None
            raise
        finally:
            _give_back(lease, taken.record.id)


def _take(lease: RecordFile, wait: bool) -> _Taken:
    while True:
        record = Record(id=uuid.uuid4().hex, holder=_holder(), beat=0)
        first = _write(lease, record, over=_wait_until_free(lease, wait))
        if first is None:
            continue
        # A process that writes without a condition may have looked before this was written: the last of several writers wins, and each
        # looks again when all have written. Where the store honours conditions, it may still be one of an earlier version.
        time.sleep(SETTLE_S)
        record, since = record.renewed(1), time.monotonic()
        if (version := _write(lease, record, over=first)) is not None:
            return _Taken(version, record, since)


def _wait_until_free(lease: RecordFile, wait: bool) -> Version | None:
    """Returns what a lease may be written over: nothing, one that was released, or one not renewed for so long that it has expired.

    No clocks of two machines are compared: how long a lease stays as it is, each process measures for itself.

    Raises:
        LeaseHeldError: if another process renews it, and is not to be waited for.
    """
    seen, since = _read(lease), time.monotonic()
    while seen is not None and seen.record is not None and time.monotonic() - since < EXPIRE_S:
        time.sleep(SETTLE_S)
        now = _read(lease)
        if now is not None and now.record is not None and now != seen:
            if not wait:
                raise LeaseHeldError(now.record.holder)
            since = time.monotonic()
        seen = now
    return seen


def _read(lease: RecordFile) -> Version | None:
    """Returns what stands there; a read that fails, as one may while another process writes, is tried again."""
    for _ in range(TRIES - 1):
        with suppress(OSError):
            return lease.read()
        time.sleep(RETRY_S)
    return lease.read()


def _write(lease: RecordFile, record: Record, over: Version | None, tries: int = TRIES) -> Version | None:
    """Writes a record over what was seen, or over an earlier one of the same holding; returns None where another process wrote in between.

    A write whose answer was lost may have been done or not: so each one that does not succeed is followed by a look.
    """
    failure = None
    for _ in range(tries):
        try:
            if (written := lease.put(record, over)) is not None:
                return written
        except OSError as error:
            failure = error
        found = lease.read()
        if found is not None and found.record == record:
            return found
        if found != over and not (found is not None and found.is_of(record.id)):
            return None
        over = found
        time.sleep(RETRY_S)
    raise OSError(f"{lease.file} could not be written, {tries} times in a row: {failure or 'other writes were under way'}") from failure


def _give_back(lease: RecordFile, id: str) -> None:
    for _ in range(TRIES):
        with suppress(OSError):
            found = lease.read()
            if found is None or not found.is_of(id) or lease.remove(found):
                return


class _Renewal:
    """Renews a lease while a block runs; interrupts the block where that is over: found another's, or too long without success.

    Attributes:
        is_lost: whether the block was interrupted.
    """

    def __init__(self, lease: RecordFile, taken: _Taken, interrupt: Callable[[], None]) -> None:
        self._lease, self._taken, self._renewed, self._interrupt = lease, taken, taken.since, interrupt
        self.is_lost = False
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._threads = [threading.Thread(target=work, name="lease", daemon=True) for work in (self._renew, self._watch)]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        with self._ending:
            self._over.set()
        for thread in self._threads:
            thread.join()

    def _renew(self) -> None:
        """Renews until the block is over, each time with another record."""
        last, record = self._taken.version, self._taken.record
        for beat in itertools.count(record.beat + 1):
            if self._over.wait(RENEW_S):
                return
            sent = time.monotonic()
            with suppress(OSError):
                written = _write(self._lease, record.renewed(beat), last, tries=2)
                if written is None:
                    self._lose()
                    return
                last, self._renewed = written, sent

    def _watch(self) -> None:
        """Ends the block in time where no renewal succeeds, whatever the one under way is waiting for."""
        while (left := self._renewed + EXPIRE_S - RENEW_S - time.monotonic()) > 0:
            if self._over.wait(left):
                return
        self._lose()

    def _lose(self) -> None:
        with self._ending:
            if self._over.is_set():
                return
            self._over.set()
            self.is_lost = True
            self._interrupt()
