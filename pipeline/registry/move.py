"""One entry of a model's log: a decision about a version, whether the champion fell or not."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline.artifacts import ChampionTest

Kind = Literal["promoted", "kept", "promoted by hand", "rolled back", "outside"]


class Move(BaseModel):
    """One entry of the log.

    Attributes:
        version: what it is about; None where an alias was removed.
        champions: the champion after it, last, and before it those that a rollback goes back to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    kind: Kind
    version: int | None
    champions: tuple[int, ...]
    who: str
    when: str
    why: str
    champion_test: ChampionTest | None = None

    @property
    def champion(self) -> int | None:
        """The champion after this move."""
        return self.champions[-1] if self.champions else None

    @property
    def previous(self) -> int | None:
        """Where a rollback would go after this move."""
        return self.champions[-2] if len(self.champions) > 1 else None

    @property
    def by_gate(self) -> bool:
        """Whether the gate decided it, after a run."""
        return self.kind in ("promoted", "kept")

    def to_json(self) -> dict[str, object]:
        """Returns the entry for a script, the champion after it among its fields."""
        return self.model_dump(mode="json") | {"champion": self.champion, "previous": self.previous}
