"""multistream-select 1.0: agreeing on the protocol of a connection or a stream.

Replaces py-libp2p's `protocol_muxer`, whose reader allocates whatever length the peer announces. The dialling side
sends its header and its proposal together, which saves a round trip.

Source: https://github.com/multiformats/multistream-select
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial
from typing import Protocol

from aci_p2p.network.libp2p.varint import encode_varint, read_varint

HEADER = "/multistream/1.0.0"
"""First message of both sides."""
NOT_AVAILABLE = "na"
"""Answer to a proposal that the listener does not support."""
MAX_MESSAGE_BYTES = 256
"""Longest message, bytes; the longest protocol id in use has under 40."""
MAX_PROPOSALS = 8
"""Proposals that a listener answers before it gives up."""


class NegotiationError(Exception):
    """The peer does not speak multistream-select, or we share no protocol."""


class Channel(Protocol):
    """What negotiation needs of a connection or a stream."""

    async def write(self, data: bytes) -> None:
        """Send bytes."""
        ...

    async def read_exactly(self, count: int) -> bytes:
        """Receive exactly `count` bytes; raises when the peer ends before."""
        ...


class EagerChannel(Channel, Protocol):
    """A channel that can check later what the peer has to say first."""

    def expect(self, first: bytes, on_refusal: Callable[[], None]) -> None:
        """The peer's first bytes must be these; they are not read by anybody. `on_refusal` hears when others come."""
        ...


def encode_message(text: str) -> bytes:
    """One message: varint length, text, newline."""
    body = text.encode() + b"\n"
    return encode_varint(len(body)) + body


async def _read_message(channel: Channel) -> str:
    length = await read_varint(channel, MAX_MESSAGE_BYTES)
    body = await channel.read_exactly(length)
    if not body.endswith(b"\n"):
        msg = "a multistream message does not end with a newline"
        raise NegotiationError(msg)
    return body[:-1].decode("utf-8", errors="replace")


def proposal(protocol: str) -> bytes:
    """What the dialling side sends first; who accepts it answers with the same."""
    return encode_message(HEADER) + encode_message(protocol)


async def select_outbound(channel: Channel, protocol: str) -> None:
    """Propose one protocol as the dialling side; raises NegotiationError when it is refused."""
    await channel.write(proposal(protocol))
    if await _read_message(channel) != HEADER:
        msg = "the peer does not speak multistream-select 1.0"
        raise NegotiationError(msg)
    if await _read_message(channel) != protocol:
        msg = f"the peer does not speak {protocol}"
        raise NegotiationError(msg)


async def select_again(stream: EagerChannel, protocol: str, accepted: set[str]) -> None:
    """As `select_outbound`, but not waiting for the answer where the peer has `accepted` the protocol before.

    It is checked when it comes. Saves a round trip for each stream, as go-libp2p does.
    """
    if protocol in accepted:
        stream.expect(proposal(protocol), partial(accepted.discard, protocol))
        await stream.write(proposal(protocol))
    else:
        await select_outbound(stream, protocol)
        accepted.add(protocol)


async def select_inbound(channel: Channel, supported: Container[str]) -> str:
    """Answer proposals as the listening side; returns the protocol agreed on or raises NegotiationError."""
    if await _read_message(channel) != HEADER:
        msg = "the peer does not speak multistream-select 1.0"
        raise NegotiationError(msg)
    await channel.write(encode_message(HEADER))
    for _ in range(MAX_PROPOSALS):
        proposal = await _read_message(channel)
        if proposal in supported:
            await channel.write(encode_message(proposal))
            return proposal
        await channel.write(encode_message(NOT_AVAILABLE))
    msg = "the peer proposed too many protocols"
    raise NegotiationError(msg)
