"""A store that all processes of a run can read and write: small notes, kept by Ray's head for as long as it lives.

It needs no process, no port and no folder of its own. Nothing that has to outlive the head belongs on it.
"""

from dataclasses import dataclass
from typing import Any

from .config import HeadLostError

REACH_S = 5.0


class StoreLostError(HeadLostError):
    """Raised when Ray's head does not answer."""


@dataclass(frozen=True)
class KeyValueStore:
    """The notes of one run; a process that uses it is connected to Ray.

    Attributes:
        name: sets the notes apart from those of other runs.
    """

    name: str

    def put(self, key: str, note: str) -> None:
        """Sets a note, in place of the one before.

        Raises:
            BoardLostError: if Ray's head does not answer.
        """
        self._ask("internal_kv_put", key.encode(), note.encode(), True, self._space)

    def get(self, key: str) -> str | None:
        """Returns a note, None where there is none. Raises like `put`."""
        found = self._ask("internal_kv_get", key.encode(), self._space)
        return None if found is None else found.decode()

    def below(self, prefix: str) -> dict[str, str]:
        """Returns the notes whose keys start with a prefix. Raises like `put`."""
        keys = self._ask("internal_kv_keys", prefix.encode(), self._space)
        notes = self._ask("internal_kv_multi_get", keys, self._space) if keys else {}
        return {key.decode(): note.decode() for key, note in notes.items()}

    def clear(self) -> None:
        """Takes all notes off. Raises like `put`."""
        self._ask("internal_kv_del", b"", True, self._space)

    @property
    def _space(self) -> bytes:
        return f"ddpm-{self.name}".encode()

    def _ask(self, method: str, *arguments: object) -> Any:
        from ray.exceptions import RayError
        from ray.experimental.internal_kv import internal_kv_get_gcs_client

        client = internal_kv_get_gcs_client()
        if client is None:
            raise StoreLostError("this process is not connected to Ray")
        try:
            return getattr(client, method)(*arguments, timeout=REACH_S)
        except (RayError, OSError, RuntimeError) as error:
            message = " ".join(str(error).split())[:200]
            raise StoreLostError(f"Ray's head does not answer ({message}); run the same command again to resume, when it answers or with a new head") from error
