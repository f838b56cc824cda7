"""Files on S3 that are written and removed only where nobody else changed them in between.

These are S3's conditional requests: `If-None-Match: *` writes where there is nothing, `If-Match` where the object still has an ETag.
They go through boto3, for pyarrow, by which `storage` reaches S3, has none. Not every store honours them, so that must be asked first.
"""

import os
import ssl
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .storage import Location

TIMEOUT_S = 10.0
TRIES, RETRY_S = 3, 0.2
_NO_TAG = f'"{"0" * 32}"'
_REFUSALS = (304, 405, 501, "NotImplemented", "InvalidArgument", "InvalidRequest")
"""Statuses and codes of stores that do not know the conditions of writes; 304 is what they mean for reads."""


class UnsupportedConditionError(OSError):
    """Raised where a store says that it cannot tell whether a file was changed."""


@dataclass(frozen=True)
class Conditions:
    """Which conditional requests a store honours.

    Attributes:
        deletes: removals too; they are younger than writes, and fewer stores have them.
    """

    writes: bool
    deletes: bool


_found: dict[tuple[str, str], Conditions] = {}


def conditions_of(file: Location) -> Conditions:
    """Returns what the store of a file honours, found out once in a process by requests that must fail.

    Raises:
        OSError: if the store cannot be reached, or refuses.
    """
    store = (_endpoint(), _address(file)["Bucket"])
    if store not in _found:
        _found[store] = _find_conditions(file)
    return _found[store]


def read_with_tag(file: Location) -> tuple[bytes, str] | None:
    """Returns the content of a file and the ETag that stands for it, None where there is no file.

    Raises:
        OSError: if it cannot be read.
    """
    with _s3(file) as client:
        answer = client.get_object(**_address(file))
        with answer["Body"] as body:
            return body.read(), answer["ETag"]
    return None


def write_if(file: Location, content: bytes, tag: str | None) -> str | None:
    """Writes a file and returns its new ETag, or None and writes nothing where it was changed in between.

    Args:
        tag: the ETag that the file must have; None where there must be no file.

    Raises:
        OSError: if the store cannot be reached, or refuses; the file may have been written all the same.
    """
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
    with _s3(file) as client:
        return client.put_object(**_address(file), Body=content, **condition)["ETag"]
    return None


def remove_if(file: Location, tag: str) -> bool:
    """Removes a file that still has an ETag; tells whether it did. Raises like `write_if`."""
    with _s3(file) as client:
        client.delete_object(**_address(file), IfMatch=tag)
        return True
    return False


def _find_conditions(file: Location) -> Conditions:
    """Asks by one file after another, until all of its requests are answered."""
    for _ in range(TRIES - 1):
        with suppress(OSError):
            return _probe(file)
        time.sleep(RETRY_S)
    return _probe(file)


def _probe(beside: Location) -> Conditions:
    """Returns what a store honours, by a new file: what must fail has to fail, and what must not has to succeed."""
    file = Location(f"{beside}.{uuid.uuid4().hex[:8]}.probe")
    try:
        writes = _honours_writes(file)
        return Conditions(writes=writes, deletes=writes and _honours_deletes(file))
    finally:
        with suppress(OSError):
            file.remove()


def _honours_writes(file: Location) -> bool:
    try:
        tag = write_if(file, b"1", None)
        if tag is None or write_if(file, b"2", None) is not None or write_if(file, b"3", _NO_TAG) is not None:
            return False
        return write_if(file, b"4", tag) not in (None, tag)
    except UnsupportedConditionError:
        return False


def _honours_deletes(file: Location) -> bool:
    try:
        return not remove_if(file, _NO_TAG) and file.is_file()
    except UnsupportedConditionError:
        return False


@contextmanager
def _s3(file: Location) -> Iterator[Any]:
    """Gives a block the client; leaves the block where the answer is that the file is not there, or not as it should be.

    Raises:
        OSError: for all other errors.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield _client(_endpoint())
    except ClientError as error:
        status, code = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"]
        # 409: another write of the same file was under way.
        if status in (409, 412) or (status == 404 and code != "NoSuchBucket"):
            return
        kind = UnsupportedConditionError if status in _REFUSALS or code in _REFUSALS else OSError
        raise kind(f"{file}: {' '.join(str(error).split())[:300]}") from error
    except (BotoCoreError, ValueError) as error:
        raise OSError(f"{file}: {' '.join(str(error).split())[:300]}") from error


def _address(file: Location) -> dict[str, str]:
    bucket, _, key = file.uri.partition("://")[2].partition("/")
    return {"Bucket": bucket, "Key": key}


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


@lru_cache(maxsize=4)
def _client(endpoint: str) -> Any:
    """Returns a client that reaches a store as `storage` does: no proxy, the certificates of this machine, either name of the region."""
    from boto3.session import Session
    from botocore.config import Config

    config = Config(
        connect_timeout=TIMEOUT_S,
        read_timeout=TIMEOUT_S,
        # A repeated write cannot tell its own success from another's: whoever asks looks before asking again.
        retries={"total_max_attempts": 1},
        proxies={},
        # Stores other than Amazon's may not know the newer checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    trusted = ssl.get_default_verify_paths().cafile  # what pyarrow trusts
    return Session().client("s3", region_name=region, endpoint_url=endpoint or None, verify=trusted, config=config)
