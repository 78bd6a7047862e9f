"""What the node and its worker process say to each other over the worker's standard input and output.

A frame is its body's length (4 bytes, big-endian), one byte that says which message it holds, and the body: the
message in deterministic CBOR (protocol/wire.py). The node sends requests; each starts, changes or cancels one job,
named by a number that the node does not use twice with one worker. The worker answers every job other than by the
rules below only if it is broken:

    Load      Loaded, Ended
    Generate  Accepted, Begun, Chunk ..., Ended
    Encode    Encoded, Ended
    Forward   Logits ..., Ended

Instead of what remains, Failed may come at any time, and Ended alone after Cancel. The worker sends a generation's
chunks only against credit: the request brings some, Credit adds to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from aci_p2p.protocol import cbor
from aci_p2p.protocol.hashing import DIGEST_BYTES
from aci_p2p.protocol.wire import (
    DIGEST,
    Bytes,
    EnumOf,
    ListOf,
    Malformed,
    Struct,
    Text,
    Uint,
    Wire,
    from_value,
    to_value,
)

FRAME_BYTES_MAX: Final = 16 << 20
"""Bytes of one body: a whole prompt of 1M tokens as text, or as ids, fits."""
CONVERSATION_BYTES_MAX: Final = 8 << 20
"""Bytes of UTF-8 in all messages of a conversation together."""
MESSAGES_MAX: Final = 4096
"""Messages of one conversation."""
TOKENS_MAX: Final = 2 << 20
"""Tokens of one sequence; public models end at 1M."""
LOGITS_BYTES: Final = 1 << 20
"""Bytes of logits in one frame, rounded up to whole rows: passed on without holding the event loop for 1 ms."""
TOKEN_BYTES: Final = 4
"""Bytes of a token id or a logit, little-endian."""

_HEAD_BYTES = 5
_NAME_BYTES = 128
_LINE_BYTES = 64 << 10
_ROLE_BYTES = 64

JobNumber: TypeAlias = Annotated[int, Wire(0, Uint())]


class Ending(IntEnum):
    """Whether a chunk is the last, and why."""

    NONE = 0
    """More follow."""
    STOP = 1
    """The model ended."""
    LENGTH = 2
    """`max_tokens` were produced."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Annotated[str, Wire(0, Text(_ROLE_BYTES))]
    """Who speaks."""
    content: Annotated[str, Wire(1, Text(CONVERSATION_BYTES_MAX))]
    """What is said."""


@dataclass(frozen=True, slots=True)
class Load:
    """Verify and load a model."""

    job: JobNumber
    """Of this request."""
    model: Annotated[str, Wire(1, Text(_NAME_BYTES))]
    """Name in the store."""


@dataclass(frozen=True, slots=True)
class Generate:
    """Generate an answer."""

    job: JobNumber
    """Of this request."""
    model: Annotated[str, Wire(1, Text(_NAME_BYTES))]
    """Name in the store."""
    turns: Annotated[tuple[Turn, ...], Wire(2, ListOf(Struct(Turn), MESSAGES_MAX))]
    """The conversation."""
    max_tokens: Annotated[int, Wire(3, Uint())]
    """Most tokens of the output, accepted ones included."""
    temperature_milli: Annotated[int, Wire(4, Uint())]
    """Thousandths."""
    seed: Annotated[bytes, Wire(5, Bytes(DIGEST_BYTES, 0))]
    """For sampling."""
    credit: Annotated[int, Wire(6, Uint())]
    """Chunks that may be sent."""
    accepted: Annotated[bytes, Wire(7, Bytes(TOKENS_MAX * TOKEN_BYTES, 0))] = b""
    """The output's first tokens, which are there already: ids, uint32."""


@dataclass(frozen=True, slots=True)
class Encode:
    """Render and tokenise a conversation."""

    job: JobNumber
    """Of this request."""
    model: Annotated[str, Wire(1, Text(_NAME_BYTES))]
    """Name in the store."""
    turns: Annotated[tuple[Turn, ...], Wire(2, ListOf(Struct(Turn), MESSAGES_MAX))]
    """The conversation."""


@dataclass(frozen=True, slots=True)
class Forward:
    """Compute logits of given tokens."""

    job: JobNumber
    """Of this request."""
    model: Annotated[str, Wire(1, Text(_NAME_BYTES))]
    """Name in the store."""
    tokens: Annotated[bytes, Wire(2, Bytes(TOKENS_MAX * TOKEN_BYTES, 0))]
    """Token ids, uint32."""
    start: Annotated[int, Wire(3, Uint())]
    """First token whose logits are wanted."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a job."""

    job: JobNumber
    """Which."""


@dataclass(frozen=True, slots=True)
class Credit:
    """Allow more chunks of a generation."""

    job: JobNumber
    """Which."""
    chunks: Annotated[int, Wire(1, Uint())]
    """How many more."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model is ready."""

    job: JobNumber
    """Of the request."""
    root: Annotated[bytes, Wire(1, DIGEST)]
    """Weights root."""
    context: Annotated[int, Wire(2, Uint())]
    """Longest sequence, tokens."""
    vocabulary: Annotated[int, Wire(3, Uint())]
    """Number of token ids."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The generation will run: its prompt fits the context."""

    job: JobNumber
    """Of the request."""
    input_tokens: Annotated[int, Wire(1, Uint())]
    """Tokens of the prompt."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The generation has a place in the batch."""

    job: JobNumber
    """Of the request."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of a generation."""

    job: JobNumber
    """Of the request."""
    index: Annotated[int, Wire(1, Uint())]
    """Position of the first token in the output."""
    tokens: Annotated[tuple[int, ...], Wire(2, ListOf(Uint(), TOKENS_MAX))]
    """Token ids."""
    text: Annotated[str, Wire(3, Text(_LINE_BYTES))]
    """Their text."""
    ending: Annotated[Ending, Wire(4, EnumOf(Ending))]
    """Whether this is the last chunk."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The conversation as tokens."""

    job: JobNumber
    """Of the request."""
    tokens: Annotated[bytes, Wire(1, Bytes(TOKENS_MAX * TOKEN_BYTES, 0))]
    """Token ids, uint32."""


@dataclass(frozen=True, slots=True)
class Logits:
    """Some rows of logits, in order."""

    job: JobNumber
    """Of the request."""
    rows: Annotated[bytes, Wire(1, Bytes(FRAME_BYTES_MAX, 0))]
    """fp32, whole rows of the vocabulary."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The job is over."""

    job: JobNumber
    """Of the request."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The job is over and failed."""

    job: JobNumber
    """Of the request."""
    code: Annotated[str, Wire(1, Text(_NAME_BYTES))]
    """Of the error."""
    message: Annotated[str, Wire(2, Text(_LINE_BYTES))]
    """Of the error."""
    hint: Annotated[str, Wire(3, Text(_LINE_BYTES))]
    """Of the error."""
    roots: Annotated[tuple[bytes, ...], Wire(4, ListOf(DIGEST, 2))]
    """Of WeightsMismatch: the expected and the actual one; else none."""


Start: TypeAlias = Load | Generate | Encode | Forward
"""A request that starts a job."""
Request: TypeAlias = Start | Cancel | Credit
Reply: TypeAlias = Loaded | Accepted | Begun | Chunk | Encoded | Logits | Ended | Failed

_KINDS: Final[tuple[type[Request | Reply], ...]] = (
    Load,
    Generate,
    Encode,
    Forward,
    Cancel,
    Credit,
    Loaded,
    Accepted,
    Begun,
    Chunk,
    Encoded,
    Logits,
    Ended,
    Failed,
)
"""A message's number is its place here."""
_NUMBERS: Final = {kind: number for number, kind in enumerate(_KINDS)}


def encode_frame(message: Request | Reply) -> bytes:
    """One frame. Raises LocalError when a field is out of bounds."""
    body = cbor.encode(to_value(message))
    return len(body).to_bytes(_HEAD_BYTES - 1, "big") + bytes([_NUMBERS[type(message)]]) + body


class FrameReader:
    """Splits what comes out of a pipe into messages."""

    def __init__(self) -> None:
        """At the start of a stream."""
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Request | Reply]:
        """The messages that `data` completes. Raises Malformed or CborError; nothing can be read afterwards."""
        self._buffer += data
        while len(self._buffer) >= _HEAD_BYTES:
            size = int.from_bytes(self._buffer[: _HEAD_BYTES - 1], "big")
            number = self._buffer[_HEAD_BYTES - 1]
            if size > FRAME_BYTES_MAX or number >= len(_KINDS):
                msg = "not a frame"
                raise Malformed(msg)
            if len(self._buffer) < _HEAD_BYTES + size:
                return
            body = bytes(self._buffer[_HEAD_BYTES : _HEAD_BYTES + size])
            del self._buffer[: _HEAD_BYTES + size]
            yield from_value(_KINDS[number], cbor.decode(body, max_bytes=FRAME_BYTES_MAX))
