"""Circuit relay v2 on the wire: its messages, and a relayed stream as the bytes under a connection.

Source: https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md
"""

from __future__ import annotations

import trio
from google.protobuf.message import DecodeError

from aci_p2p.network.libp2p.upstream import HopMessage, Limit, PeerId, Reservation, Status, StopMessage
from aci_p2p.network.libp2p.varint import VarintError, prefixed, read_prefixed
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, YamuxStream
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId

HOP = "/libp2p/circuit/relay/0.2.0/hop"
"""Stream protocol id by which a relay is asked for a reservation or a circuit."""
STOP = "/libp2p/circuit/relay/0.2.0/stop"
"""Stream protocol id by which a relay passes a circuit on to whom it leads."""
MAX_MESSAGE_BYTES = 4 << 10
"""Longest message, bytes (go-libp2p's limit)."""


class CircuitError(Exception):
    """A message is malformed, or not the one that belongs here."""


async def read_hop(stream: YamuxStream, expected: HopMessage.Type.ValueType | None = None) -> HopMessage:
    """The next message of the hop protocol. Raises CircuitError, EndOfStream, StreamReset."""
    try:
        message = HopMessage.FromString(await read_prefixed(stream, MAX_MESSAGE_BYTES))
    except (DecodeError, VarintError) as error:
        msg = "the hop message is malformed"
        raise CircuitError(msg) from error
    if not message.HasField("type") or expected not in {None, message.type}:
        msg = "not the hop message that belongs here"
        raise CircuitError(msg)
    return message


async def read_stop(stream: YamuxStream, expected: StopMessage.Type.ValueType) -> StopMessage:
    """The next message of the stop protocol. Raises CircuitError, EndOfStream, StreamReset."""
    try:
        message = StopMessage.FromString(await read_prefixed(stream, MAX_MESSAGE_BYTES))
    except (DecodeError, VarintError) as error:
        msg = "the stop message is malformed"
        raise CircuitError(msg) from error
    if not message.HasField("type") or message.type != expected:
        msg = "not the stop message that belongs here"
        raise CircuitError(msg)
    return message


def named_peer(message: HopMessage | StopMessage) -> NodeId:
    """The peer that a CONNECT is about. Raises CircuitError."""
    try:
        return NodeId.from_peer_id(message.peer.id)
    except LocalError as error:
        msg = "the message does not name a peer"
        raise CircuitError(msg) from error


def hop_reserve() -> bytes:
    """Ask for a reservation."""
    return prefixed(HopMessage(type=HopMessage.RESERVE).SerializeToString())


def hop_connect(target: NodeId) -> bytes:
    """Ask for a circuit."""
    return prefixed(HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=target.peer_id)).SerializeToString())


def hop_status(
    status: Status.ValueType, *, reservation: Reservation | None = None, limit: Limit | None = None
) -> bytes:
    """Answer either; `limit` is what a circuit may carry."""
    answer = HopMessage(type=HopMessage.STATUS, status=status, reservation=reservation, limit=limit)
    return prefixed(answer.SerializeToString())


def stop_connect(initiator: NodeId, limit: Limit) -> bytes:
    """Pass a circuit on."""
    message = StopMessage(type=StopMessage.CONNECT, peer=PeerId(id=initiator.peer_id), limit=limit)
    return prefixed(message.SerializeToString())


def stop_status(status: Status.ValueType) -> bytes:
    """Take a circuit, or refuse it."""
    return prefixed(StopMessage(type=StopMessage.STATUS, status=status).SerializeToString())


class RelayedStream:
    """A stream to or from a relay as the bytes under a connection (`secure.ByteStream`); it knows how worn it is."""

    def __init__(self, stream: YamuxStream, limit: Limit) -> None:
        """`limit`: what the relay says that the circuit may carry; 0 or absent: no limit."""
        self._stream = stream
        self._bytes = limit.data
        self._ends = trio.current_time() + limit.duration if limit.duration else float("inf")
        self._opened = trio.current_time()
        self._received = self._sent = 0

    @property
    def is_worn(self) -> bool:
        """Whether half of the time or of the bytes that the circuit has is used up."""
        half_time = self._opened + (self._ends - self._opened) / 2
        used = max(self._received, self._sent)
        return trio.current_time() >= half_time or (self._bytes > 0 and used >= self._bytes // 2)

    async def receive_some(self, max_bytes: int, /) -> bytes:
        """The next 1 to `max_bytes` bytes, none at the end. Raises trio.BrokenResourceError."""
        try:
            data = await self._stream.read(max_bytes)
        except EndOfStream:
            return b""
        except StreamReset as error:
            raise trio.BrokenResourceError from error
        self._received += len(data)
        return data

    async def send_all(self, data: bytes, /) -> None:
        """Send bytes. Raises trio.BrokenResourceError."""
        try:
            await self._stream.write(data)
        except StreamReset as error:
            raise trio.BrokenResourceError from error
        self._sent += len(data)

    async def aclose(self) -> None:
        """End the circuit."""
        self._stream.close()
        await trio.lowlevel.checkpoint()
