"""Messages: what processes, topics and mailboxes carry. Frozen values, no behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

Kind = Literal["data", "state", "command"]
Scalar = str | int | float | bool | None


class Priority(IntEnum):
    """Commands overtake data."""

    DATA = 0
    COMMAND = 1


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `topic` is where it was published ("process", "log", "model"), or "" if sent."""

    kind: Kind
    topic: str
    time_s: float
    body: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def priority(self) -> Priority:
        return Priority.COMMAND if self.kind == "command" else Priority.DATA
