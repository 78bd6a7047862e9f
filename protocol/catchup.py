"""What two nodes say when one asks the other what it has missed of a topic.

Nothing of it is signed: the messages that it brings are signed envelopes, judged as if they had come by gossip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, TypeVar

from aci_p2p.protocol import cbor, wire
from aci_p2p.protocol.hashing import DIGEST_BYTES
from aci_p2p.protocol.wire import DIGEST, Bytes, ListOf, Uint, Wire

EPOCH_BYTES: Final = 8
"""Length of an epoch: enough that two lives of a log never share one."""
NO_EPOCH: Final = bytes(EPOCH_BYTES)
"""Of a log that was never asked before."""
MAX_NEWS: Final = 512
"""Message ids in one answer: 17 KiB."""
MAX_FETCH: Final = 32
"""Messages fetched at once: at most 512 KiB, so that a frame holds them."""
MAX_MESSAGE_BYTES: Final = 16 << 10
"""Largest message, bytes: what gossip carries."""
MAX_LATEST: Final = 16
"""Message ids in one announcement: a busy topic's of two seconds."""
MAX_REQUEST_BYTES: Final = MAX_FETCH * (DIGEST_BYTES + 2) + 64
"""Largest request, bytes."""
MAX_ANSWER_BYTES: Final = MAX_FETCH * (MAX_MESSAGE_BYTES + 3) + 64
"""Largest answer, bytes."""

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Since:
    """First frame: what has your log after this point?"""

    epoch: Annotated[bytes, Wire(1, Bytes(EPOCH_BYTES))]
    """The log's life that `sequence` counts in, from an earlier answer; NO_EPOCH for everything."""
    sequence: Annotated[int, Wire(2, Uint())]
    """The last number that the asker has dealt with; 0 for everything."""


@dataclass(frozen=True, slots=True)
class News:
    """Answer to Since: ids of the unexpired messages after that point, the oldest first."""

    epoch: Annotated[bytes, Wire(1, Bytes(EPOCH_BYTES))]
    """Drawn at random when the log began; in another epoch than the one asked for, the answer is about everything."""
    sequence: Annotated[int, Wire(2, Uint())]
    """Where to go on asking."""
    head: Annotated[int, Wire(3, Uint())]
    """The log's latest number; greater than `sequence` when the ids did not all fit."""
    identifiers: Annotated[tuple[bytes, ...], Wire(4, ListOf(DIGEST, MAX_NEWS))]
    """Gossip message ids."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Further frames: send me these messages."""

    identifiers: Annotated[tuple[bytes, ...], Wire(1, ListOf(DIGEST, MAX_FETCH))]
    """Gossip message ids."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """Answer to Fetch: those of the messages that the log still has, in the order asked for."""

    messages: Annotated[tuple[bytes, ...], Wire(1, ListOf(Bytes(MAX_MESSAGE_BYTES, minimum=0), MAX_FETCH))]
    """Payloads as gossip carries them."""


@dataclass(frozen=True, slots=True)
class Head:
    """On a stream of its own: this is how far our log is by now."""

    epoch: Annotated[bytes, Wire(1, Bytes(EPOCH_BYTES))]
    """Of the log."""
    sequence: Annotated[int, Wire(2, Uint())]
    """The log's latest number."""
    latest: Annotated[tuple[bytes, ...], Wire(3, ListOf(DIGEST, MAX_LATEST))]
    """Ids of the messages with the numbers up to it, the latest last: who knows them need not ask."""


def encode(message: Since | News | Fetch | Fetched | Head) -> bytes:
    """A message as a frame; raises LocalError when a field is out of bounds."""
    return cbor.encode(wire.to_value(message))


def decode(cls: type[M], frame: bytes, *, max_bytes: int) -> M:
    """Read a frame; raises CborError or Malformed."""
    return wire.from_value(cls, cbor.decode(frame, max_bytes=max_bytes))
