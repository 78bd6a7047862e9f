"""What becomes of a peer's message: ACCEPT, IGNORE or REJECT, with the reason (gossipsub v1.1 extended validators)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum


class Decision(Enum):
    """What the network does with a message, in gossipsub v1.1 terms."""

    ACCEPT = "accept"
    """Deliver and forward."""
    IGNORE = "ignore"
    """Drop silently; the forwarder may be honest (late, duplicate, not ours)."""
    REJECT = "reject"
    """Drop and hold it against the forwarder: no honest node forwards this."""


class Reason(StrEnum):
    """Why a message was accepted, ignored or rejected; logged and counted under this name."""

    OK = "ok"


@dataclass(frozen=True, slots=True)
class Validation:
    """The outcome of checking one message."""

    decision: Decision
    """What to do with it."""
    reason: Reason
    """Why."""
