"""Decoding in a process of its own, so that an image that kills its decoder takes no other with it.

The two processes share memory: a record and the pixels of each image. The child notes which image it begins; when it dies, the parent knows whose
fault it was, tries that image once more, and after a second death leaves it out with the reason `crashed`. The memory has two halves, used in turn,
so that the parent can write what came of one call while the child is at the next.
"""

import contextlib
import hashlib
import json
import mmap
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from ..errors import DataError
from ..spaces.kinds import AnySpace
from ..spaces.space import Space
from .listing import Item
from .sources import Source, source_from_json, source_to_json

SPARE_BYTES = 256 << 20
FILE_S, POLL_S = 300.0, 5.0
READ_AHEAD, READ_AHEAD_BYTES, UNKNOWN_BYTES = 16, 64 << 20, 1 << 20
ATTEMPTS = 2
_WAITING, _BEGUN, _ROW, _BAD, _SAME = range(5)
_DETAIL = 400
_RECORD = np.dtype([("state", "u1"), ("bytes", "i8"), ("sha256", "V32"), ("pixels", "V16"), ("reason", "S24"), ("detail", f"S{_DETAIL}")])


DECODED_SCHEMA = pa.schema(
    [
        ("bytes", pa.int64()),  # of the content; null where it could not be read
        ("sha256", pa.binary(32)),  # of the content, likewise
        ("pixels", pa.binary(16)),  # hash of the pixels (BLAKE2b); null where there are none
        ("reason", pa.string()),  # why it is no row; null where it is one, or where its content is the one that was known
        ("detail", pa.string()),
        ("same", pa.bool_()),  # whether its content is the one that was known, so that it was not decoded
    ]
)


def memory_limit(space: Space) -> int:
    """Returns how many bytes a decoder may take on top of what it has when it starts."""
    return space.decoding_bytes + SPARE_BYTES


class Decoder:
    """A child process that fetches and decodes images; it starts with the first of them and ends with this process.

    Args:
        capacity: most images of one call.
    """

    def __init__(self, source: Source, space: Space, capacity: int) -> None:
        self._task = json.dumps({"source": source_to_json(source), "space": space.model_dump(mode="json"), "capacity": capacity})
        self._file = _shared_file(2 * capacity * (_RECORD.itemsize + space.row_bytes))
        self._halves = _map(self._file.fileno(), space, capacity)
        self._half = 0
        self._records = self._halves[0][0]
        self._child: subprocess.Popen[bytes] | None = None
        self._reports = -1
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the decoder
        self._is_abandoned = False

    def decode(self, items: Sequence[Item], known: Sequence[bytes | None]) -> tuple[pa.Table, np.ndarray]:
        """Decodes images; returns one line (DECODED_SCHEMA) for each, and the pixels (N, C, H, W) uint8.

        The pixels are of use where there is a hash of them, and until the call after the next one.

        Args:
            known: content (SHA-256) that need not be decoded, None where any content must be.

        Raises:
            DataError: if the source itself is not there.
            RuntimeError: if the child fails otherwise than by dying on an image.
        """
        self._half ^= 1
        self._records, pixels = self._halves[self._half]
        self._records[: len(items)] = np.zeros(1, _RECORD)
        deaths: Counter[int] = Counter()
        first = 0
        while first < len(items):
            cause = self._run(items, known, first)
            if cause is None:
                break
            first = self._blame(cause, deaths, len(items))
        return _decoded(self._records[: len(items)]), pixels[: len(items)]

    def abandon(self) -> None:
        """Makes a call of `decode` that another thread waits for, and all later ones, fail soon."""
        self._is_abandoned = True
        child = self._child
        if child is not None:
            child.kill()

    def close(self) -> None:
        """Ends the child; the decoder is of no use any more."""
        self._stop()
        self._file.close()
        self._errors.close()

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            os.close(self._reports)
            if self._child.stdin is not None:
                with contextlib.suppress(OSError):
                    self._child.stdin.close()
            self._child = None

    def _run(self, items: Sequence[Item], known: Sequence[bytes | None], first: int) -> str | None:
        """Has the child do the images from one on; returns None when they are done, else what ended it."""
        child = self._started()
        request = {"half": self._half, "first": first, "items": items, "known": [None if one is None else one.hex() for one in known]}
        try:
            assert child.stdin is not None
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            answer = self._answer(len(items))
        except BrokenPipeError:
            answer = b""
        if answer.startswith(b"{"):
            failure = json.loads(answer)
            if failure:
                raise DataError(failure["message"], failure["reason"])
            return None
        return self._end(answer.decode())

    def _answer(self, count: int) -> bytes:
        """Waits for the child's line; returns b"" when it died and the reason when it was stuck on one image for too long."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._reports, selectors.EVENT_READ)
            seen, since, line = -1, time.monotonic(), b""
            while not line.endswith(b"\n"):
                if selector.select(timeout=POLL_S):
                    part = os.read(self._reports, 1 << 16)
                    if not part:
                        return b""
                    line += part
                    continue
                done = int(np.count_nonzero(self._records["state"][:count] > _BEGUN))
                if done != seen:
                    seen, since = done, time.monotonic()
                elif time.monotonic() - since > FILE_S:
                    return f"was not done after {FILE_S:.0f} seconds".encode()
        return line

    def _end(self, reason: str) -> str:
        """Ends a child that died or must; returns what is to be said of the image it was at."""
        child = self._child
        assert child is not None
        if reason:
            child.kill()
        code = child.wait()
        self._stop()
        if reason:
            return reason
        if code >= 0:
            self._errors.seek(0)
            raise RuntimeError(f"the decoder ended with exit code {code}: {self._errors.read()[-4000:].decode(errors='replace')}")
        return f"ended its decoder by signal {-code} ({signal.Signals(-code).name})"

    def _blame(self, cause: str, deaths: Counter[int], count: int) -> int:
        """Returns where to go on after the child's death."""
        begun = np.flatnonzero(self._records["state"][:count] == _BEGUN)
        if not len(begun):
            deaths[-1] += 1
            if deaths[-1] > ATTEMPTS:
                raise RuntimeError(f"the decoder dies before it begins: {cause}")
            left = np.flatnonzero(self._records["state"][:count] == _WAITING)
            return int(left[0]) if len(left) else count
        at = int(begun[0])
        deaths[at] += 1
        if deaths[at] < ATTEMPTS:
            self._records[at] = np.zeros(1, _RECORD)[0]
            return at
        record = self._records[at : at + 1]
        record["state"], record["reason"], record["detail"] = _BAD, b"crashed", f"{cause}, {ATTEMPTS} times".encode()
        return at + 1

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._is_abandoned:
            raise RuntimeError("the decoder was abandoned")
        if self._child is not None:
            return self._child
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        # Pydantic's search for plugins is a twentieth of the time that the child takes to start.
        settings = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYDANTIC_DISABLE_PLUGINS": "__all__"}
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **settings}
        self._reports, reports = os.pipe()
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._file.fileno()), str(reports)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=(self._file.fileno(), reports),
            env=environment,
        )
        os.close(reports)
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(self._task.encode() + b"\n")
        return self._child


def _decoded(records: np.ndarray) -> pa.Table:
    """Returns records (N,) as a table (DECODED_SCHEMA)."""
    state, sha256 = records["state"], np.ascontiguousarray(records["sha256"])
    has_content = np.any(sha256.view(np.uint64).reshape(len(records), 4), axis=1)
    reason, detail = np.full(len(records), None, object), np.full(len(records), None, object)
    for index in np.flatnonzero(state == _BAD):
        reason[index] = records["reason"][index].decode()
        detail[index] = records["detail"][index].decode("utf-8", "replace")
    columns = [
        pa.array(records["bytes"], mask=~has_content),
        _fixed_size(sha256, has_content),
        _fixed_size(np.ascontiguousarray(records["pixels"]), state == _ROW),
        pa.array(reason, pa.string()),
        pa.array(detail, pa.string()),
        pa.array(state == _SAME),
    ]
    return pa.table(columns, schema=DECODED_SCHEMA)


def _fixed_size(values: np.ndarray, is_valid: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Returns values (N,) of some bytes each, null where they are not valid."""
    validity = None if is_valid.all() else pa.array(is_valid).buffers()[1]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(values.itemsize), len(values), [validity, pa.py_buffer(values.tobytes())])


def _shared_file(size: int) -> IO[bytes]:
    """Returns a file without a name, in memory where the system has such."""
    file = os.fdopen(os.memfd_create("ddpm-decoder"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()  # noqa: SIM115
    file.truncate(size)
    return file


def _map(file: int, space: Space, capacity: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the records (N,) and rows (N, *shape) of each half of a file."""
    size = capacity * (_RECORD.itemsize + space.row_bytes)
    memory = mmap.mmap(file, 2 * size)
    halves = []
    for first in (0, size):
        count, rows_at = capacity * int(np.prod(space.shape)), first + capacity * _RECORD.itemsize
        rows = np.frombuffer(memory, space.dtype, count, rows_at).reshape(capacity, *space.shape)
        halves.append((np.frombuffer(memory, _RECORD, capacity, first), rows))
    return halves


class _Child:
    """The other side of a Decoder."""

    def __init__(self, memory: int, reports: int) -> None:
        task = json.loads(sys.stdin.buffer.readline())
        self._source = source_from_json(task["source"])
        self._space = TypeAdapter(AnySpace).validate_python(task["space"])
        self._halves = _map(memory, self._space, task["capacity"])
        self._use(0)
        self._reports = reports
        self._is_open = False
        self._space.prepare_process()
        _limit_memory(memory_limit(self._space))

    def serve(self) -> None:
        """Answers each request with a line: an empty object, or why the source is not there."""
        for line in sys.stdin.buffer:
            request = json.loads(line)
            try:
                if not self._is_open:
                    self._source.open()
                    self._is_open = True
                self._use(request["half"])
                self._do([Item(*item) for item in request["items"]], request["known"], request["first"])
                answer = {}
            except DataError as error:
                answer = {"message": str(error), "reason": error.reason}
            os.write(self._reports, json.dumps(answer).encode() + b"\n")

    def _use(self, half: int) -> None:
        records, self._rows = self._halves[half]
        self._columns = {name: records[name] for name in _RECORD.names or ()}

    def _do(self, items: list[Item], known: list[str | None], first: int) -> None:
        state_of = self._columns["state"]
        with _contents(self._source, items[first:], memory_limit(self._space) // 3) as contents:
            for index in range(first, len(items)):
                state_of[index] = _BEGUN
                try:
                    state = self._one(index, next(contents), known[index])
                except DataError as error:
                    state = self._note(index, error.reason, str(error))
                except MemoryError:
                    state = self._note(index, "too_large", f"needs more than {memory_limit(self._space) >> 20} MiB of memory to decode")
                except Exception as error:  # whatever a library makes of an image, it is that image's fault alone
                    state = self._note(index, "corrupt", f"its decoder failed: {type(error).__name__}")
                state_of[index] = state

    def _one(self, index: int, content: "bytes | np.ndarray | Exception", known: str | None) -> int:
        if isinstance(content, Exception):
            raise content
        sha256 = _content_hash(content)
        self._columns["bytes"][index] = len(content) if isinstance(content, bytes) else content.nbytes
        self._columns["sha256"][index] = np.void(sha256)
        if known is not None and sha256.hex() == known:
            return _SAME
        row = self._space.decode(content)
        self._rows[index] = row
        self._columns["pixels"][index] = np.void(hashlib.blake2b(np.ascontiguousarray(row).data, digest_size=16).digest())
        return _ROW

    def _note(self, index: int, reason: str, detail: str) -> int:
        self._columns["reason"][index] = reason.encode()
        self._columns["detail"][index] = detail.encode("utf-8", "backslashreplace")[:_DETAIL]
        return _BAD


def _content_hash(content: bytes | np.ndarray) -> bytes:
    if isinstance(content, bytes):
        return hashlib.sha256(content).digest()
    return hashlib.sha256(repr(content.shape).encode() + np.ascontiguousarray(content).tobytes()).digest()


@contextlib.contextmanager
def _contents(source: Source, items: list[Item], most_bytes: int) -> "Iterator[Iterator[bytes | np.ndarray | Exception]]":
    """Gives a block the contents of files in turn; from a remote source several are fetched ahead, within a bound of memory."""
    if not source.is_remote:
        yield (_fetch(source, item, most_bytes) for item in items)
        return
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="fetch") as pool:
        yield _fetched_ahead(pool, source, items, most_bytes)


def _fetched_ahead(pool: ThreadPoolExecutor, source: Source, items: list[Item], most_bytes: int) -> "Iterator[bytes | np.ndarray | Exception]":
    waiting: deque[tuple[int, Future[bytes | np.ndarray | Exception]]] = deque()
    held, left = 0, iter(items)
    item = next(left, None)
    while item is not None or waiting:
        while item is not None and (not waiting or (held + _weight(item) <= READ_AHEAD_BYTES and len(waiting) < 2 * READ_AHEAD)):
            waiting.append((_weight(item), pool.submit(_fetch, source, item, most_bytes)))
            held += _weight(item)
            item = next(left, None)
        weight, content = waiting.popleft()
        held -= weight
        yield content.result()


def _weight(item: Item) -> int:
    return item.size if item.size >= 0 else UNKNOWN_BYTES


def _fetch(source: Source, item: Item, most_bytes: int) -> "bytes | np.ndarray | Exception":
    if item.size > most_bytes:
        return DataError(f"the file has {item.size} bytes; above {most_bytes} it is not read, as data.max_pixels says", "too_large")
    try:
        return source.fetch(item.path)
    except (DataError, MemoryError) as error:
        return error
    except Exception as error:  # raised here it would end the fetching of all that follow
        return DataError(f"fetching it failed: {type(error).__name__}", "unreadable")


def _limit_memory(limit: int) -> None:
    """Keeps this process from taking more memory than a limit on top of what it has."""
    try:
        import resource

        held = next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (held + limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    except (ImportError, OSError, ValueError, StopIteration):
        return  # no such limit on this system


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def main() -> None:
    """Runs the child: the numbers of the shared memory and of the pipe for reports are its arguments."""
    threading.Thread(target=_end_with, args=(os.getppid(),), name="watch", daemon=True).start()
    _Child(int(sys.argv[1]), int(sys.argv[2])).serve()


if __name__ == "__main__":
    main()
