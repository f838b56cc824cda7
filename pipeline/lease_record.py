"""How a lease is kept on S3: a record that is written over or removed only where nobody else wrote in between.

There are two kinds, by what the store can do. Both keep the same record in the same file, which earlier versions read and write too.
"""

from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from components.conditional_writes import conditions_of, read_with_tag, remove_if, write_if
from components.storage import Location

_RELEASED = b""


class Record(BaseModel):
    """Who holds a lease.

    Attributes:
        id: of this holding alone.
        beat: how often it was renewed, so that no two versions are alike.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    holder: str
    beat: int

    def renewed(self, beat: int) -> "Record":
        """Returns the record after so many renewals."""
        return self.model_copy(update={"beat": beat})


@dataclass(frozen=True)
class Version:
    """What stood in the file at some time.

    Attributes:
        tag: changes with every write.
        record: None where the lease was released, or where no lease can be read.
    """

    tag: str
    record: Record | None

    def is_of(self, id: str) -> bool:
        """Tells whether a holding wrote it."""
        return self.record is not None and self.record.id == id


class RecordFile(Protocol):
    """The file of a lease. Each operation raises OSError where the store cannot be reached; a write may have been done all the same."""

    @property
    def file(self) -> Location: ...

    def read(self) -> Version | None:
        """Returns what stands there, None where there is no file."""
        ...

    def put(self, record: Record, over: Version | None) -> Version | None:
        """Writes a record over what was read; returns None and leaves what stands there where that is something else by now."""
        ...

    def remove(self, version: Version) -> bool:
        """Removes what was read, or marks it as released; tells whether it still stood there."""
        ...


def record_file(file: Location) -> RecordFile:
    """Returns the kind that the store of a file is able to.

    Raises:
        OSError: if the store cannot be reached, or refuses.
    """
    conditions = conditions_of(file)
    return Conditional(file, conditions.deletes) if conditions.writes else Unconditional(file)


@dataclass(frozen=True)
class Conditional:
    """By conditional writes: of several processes that write at once the store lets one succeed.

    Attributes:
        deletes: whether removals can be conditional too.
    """

    file: Location
    deletes: bool

    def read(self) -> Version | None:
        found = read_with_tag(self.file)
        return None if found is None else Version(found[1], _parsed(found[0]))

    def put(self, record: Record, over: Version | None) -> Version | None:
        tag = write_if(self.file, record.model_dump_json().encode(), None if over is None else over.tag)
        return None if tag is None else Version(tag, record)

    def remove(self, version: Version) -> bool:
        if self.deletes:
            return remove_if(self.file, version.tag)
        return write_if(self.file, _RELEASED, version.tag) is not None


@dataclass(frozen=True)
class Unconditional:
    """By looking before each write: of several processes that write at once the last one wins, and each has to look again."""

    file: Location

    def read(self) -> Version | None:
        try:
            content = self.file.read_bytes()
        except FileNotFoundError:
            return None
        return Version(content.decode(errors="replace"), _parsed(content))

    def put(self, record: Record, over: Version | None) -> Version | None:
        if self.read() != over:
            return None
        text = record.model_dump_json()
        self.file.write_text(text)
        return Version(text, record)

    def remove(self, version: Version) -> bool:
        if self.read() != version:
            return False
        self.file.remove()
        return True


def _parsed(content: bytes) -> Record | None:
    try:
        return Record.model_validate_json(content)
    except ValidationError:
        return None
