"""Images that are never to be used again: one small file each below the storage root, by the hash of the encoded image."""

from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from ..storage import Location

FOLDER, ENDING = "forgotten", ".json"


class Tombstone(BaseModel):
    """Why an image is forgotten.

    Attributes:
        paths: where it was seen, in datasets or as a file.
        when: UTC, ISO 8601.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    paths: tuple[str, ...] = ()
    why: str = ""
    when: str = ""


def forgotten_hashes(storage: Location) -> frozenset[bytes]:
    """Returns the SHA-256 of every image to be left out of all datasets below a storage root."""
    names = (name.removesuffix(ENDING) for name in (storage / FOLDER).files() if name.endswith(ENDING))
    return frozenset(bytes.fromhex(name) for name in names if is_sha256(name))


def is_sha256(text: str) -> bool:
    """Tells whether a text is a SHA-256 in hexadecimal."""
    return len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)


def write_tombstone(storage: Location, sha256: str, paths: tuple[str, ...], why: str) -> bool:
    """Keeps an image out of every dataset that is made from now on; returns whether it was not forgotten before."""
    place = storage / FOLDER / f"{sha256}{ENDING}"
    if place.is_file():
        return False
    place.write_text(Tombstone(sha256=sha256, paths=paths, why=why, when=datetime.now(UTC).isoformat(timespec="seconds")).model_dump_json(indent=2) + "\n")
    return True
