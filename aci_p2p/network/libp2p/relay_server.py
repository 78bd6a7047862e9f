"""Relaying for nodes behind NATs: circuit relay v2, the side of the relay.

A node keeps a reservation with us while it is connected; others open circuits to it, which are a stream from them and
a stream to it with nothing in between but copying. What is inside is encrypted from end to end.

Relaying is done whenever it is configured, but no reservation is given while others are known not to reach us.

Source: https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import trio

from aci_p2p.clock import MS_PER_S, Clock
from aci_p2p.network.api import PeerUnreachable, Reachability
from aci_p2p.network.libp2p.circuit import (
    STOP,
    CircuitError,
    hop_status,
    named_peer,
    read_hop,
    read_stop,
    stop_connect,
)
from aci_p2p.network.libp2p.connections import LOOPBACK, Connection
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.upstream import (
    Envelope,
    HopMessage,
    Limit,
    PublicKey,
    Reservation,
    Status,
    StopMessage,
    Voucher,
)
from aci_p2p.network.libp2p.varint import prefixed
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, YamuxStream
from aci_p2p.protocol.identity import KeyPair, NodeId

MAX_RESERVATIONS = 128
"""Nodes that we relay for at once (go-libp2p's value)."""
MAX_RESERVATIONS_PER_SOURCE = 8
"""Of which one source may have so many, loopback excepted (go-libp2p's value); a peer has at most one."""
RESERVATION_SECONDS = 3600
"""How long a reservation lasts, seconds; it ends before when the peer disconnects."""
MAX_CIRCUITS = 256
"""Circuits open at once. Each holds two streams, a task and at most 640 KiB: two windows, and a read each way."""
MAX_CIRCUITS_PER_PEER = 12
"""Circuits to one peer, and as many from one. Whoever is at the other ends may all stop reading at once; then what this
peer has sent fills a window each, and all of them must stay below what its connection to us may hold (4 MiB)."""
MAX_CIRCUITS_PER_SOURCE = 32
"""Circuits from one source, loopback excepted: nobody has all of them for himself."""
MAX_CIRCUITS_PER_SOURCE_AND_TARGET = 4
"""Of which so many may lead to one peer: nobody cuts off a peer by taking all of its circuits."""
CIRCUIT_SECONDS = 1800
"""How long a circuit may last, seconds. Its dialler begins a new one at half of that (`relay.py`), so that a stream has
at least 15 minutes: far more than a job streams tokens."""
CIRCUIT_BYTES = 64 << 20
"""What a circuit may carry each way, bytes: prompts of 1 MiB, some MiB of tokens, and half an hour of gossip at 20
messages a second. All circuits together cannot carry more than 18 MB/s for long."""
CIRCUIT_IDLE_SECONDS = 120.0
"""A direction of a circuit that carries nothing for this long ends it, seconds: yamux pings every 30."""
MESSAGE_SECONDS = 10.0
"""Time for either side of a circuit to say what it has to, seconds."""
READ_BYTES = 64 << 10
"""Copied at once, bytes."""

_VOUCHER_DOMAIN = b"libp2p-relay-rsvp"
_VOUCHER_TYPE = bytes((0x03, 0x02))

log = logging.getLogger("aci_p2p.network")


@dataclass(frozen=True, slots=True)
class _Reserved:
    source: str
    until: float


class Circuit(NamedTuple):
    """Who talks to whom through us."""

    initiator: NodeId
    """Who has asked for it."""
    source: str
    """Where the initiator is, see `connections.source_of`."""
    target: NodeId
    """To whom it leads."""


class Capacity:
    """Who has a reservation, and which circuits are open. No I/O; times are seconds of any one clock."""

    def __init__(self) -> None:
        self._reserved: dict[NodeId, _Reserved] = {}
        self._circuits: list[Circuit] = []

    @property
    def reserving(self) -> tuple[NodeId, ...]:
        """Peers for which we relay."""
        return tuple(self._reserved)

    @property
    def circuits(self) -> int:
        """Circuits that are open."""
        return len(self._circuits)

    def reserve(self, peer: NodeId, source: str, now: float) -> Status.ValueType:
        """Give a peer a reservation, or prolong the one it has."""
        for other in [other for other, reserved in self._reserved.items() if reserved.until <= now]:
            del self._reserved[other]
        others = [reserved for other, reserved in self._reserved.items() if other != peer]
        of_source = sum(reserved.source == source for reserved in others)
        if len(others) >= MAX_RESERVATIONS or (source != LOOPBACK and of_source >= MAX_RESERVATIONS_PER_SOURCE):
            return Status.RESERVATION_REFUSED
        self._reserved[peer] = _Reserved(source, now + RESERVATION_SECONDS)
        return Status.OK

    def release(self, peer: NodeId) -> None:
        """A peer has disconnected: its reservation is over."""
        self._reserved.pop(peer, None)

    def open_circuit(self, circuit: Circuit, now: float) -> Status.ValueType:
        """Enter a circuit, when OK."""
        if circuit.initiator == circuit.target:
            return Status.PERMISSION_DENIED
        reserved = self._reserved.get(circuit.target)
        if reserved is None or reserved.until <= now:
            return Status.NO_RESERVATION
        if not self._has_room_for(circuit):
            return Status.RESOURCE_LIMIT_EXCEEDED
        self._circuits.append(circuit)
        return Status.OK

    def _has_room_for(self, circuit: Circuit) -> bool:
        if len(self._circuits) >= MAX_CIRCUITS:
            return False
        if any(
            sum(peer in {other.initiator, other.target} for other in self._circuits) >= MAX_CIRCUITS_PER_PEER
            for peer in (circuit.initiator, circuit.target)
        ):
            return False
        of_source = [other for other in self._circuits if other.source == circuit.source]
        return circuit.source == LOOPBACK or (
            len(of_source) < MAX_CIRCUITS_PER_SOURCE
            and sum(other.target == circuit.target for other in of_source) < MAX_CIRCUITS_PER_SOURCE_AND_TARGET
        )

    def close_circuit(self, circuit: Circuit) -> None:
        """A circuit is over."""
        self._circuits.remove(circuit)


def sign_voucher(key: KeyPair, peer: NodeId, expires: int) -> bytes:
    """A signed envelope that says that we relay for a peer until `expires` (Unix seconds).

    Source: https://github.com/libp2p/specs/blob/master/RFC/0002-signed-envelopes.md
    """
    voucher = Voucher(relay=key.node_id.peer_id, peer=peer.peer_id, expiration=expires).SerializeToString()
    signed = b"".join(prefixed(part) for part in (_VOUCHER_DOMAIN, _VOUCHER_TYPE, voucher))
    public_key = PublicKey.FromString(key.node_id.peer_id[2:])
    envelope = Envelope(public_key=public_key, payload_type=_VOUCHER_TYPE, payload=voucher, signature=key.sign(signed))
    return envelope.SerializeToString()


class RelayServer:
    """The relay's side of the hop and stop protocols."""

    def __init__(self, host: Host, key: KeyPair, clock: Clock) -> None:
        """`key` signs vouchers, `clock` says until when they hold."""
        self._host = host
        self._key = key
        self._clock = clock
        self.capacity = Capacity()
        host.on_disconnected.append(self.capacity.release)

    async def serve(self, peer: NodeId, stream: YamuxStream) -> None:
        """Answer one hop stream, and copy for as long as the circuit lasts that it becomes."""
        connection = self._host.connection(peer)
        try:
            with trio.fail_after(MESSAGE_SECONDS):
                message = await read_hop(stream)
        except trio.TooSlowError:
            stream.reset()
            return
        except CircuitError:
            await stream.write(hop_status(Status.MALFORMED_MESSAGE))
            return
        if connection is None or connection.relay is not None:
            # No circuits of circuits: they could go in circles.
            await stream.write(hop_status(Status.PERMISSION_DENIED))
        elif message.type == HopMessage.RESERVE:
            await stream.write(self._reserve(peer, connection.source))
        elif message.type == HopMessage.CONNECT:
            await self._connect(connection, stream, message)
        else:
            await stream.write(hop_status(Status.UNEXPECTED_MESSAGE))

    def _reserve(self, peer: NodeId, source: str) -> bytes:
        if self._host.reachability is Reachability.PRIVATE:
            return hop_status(Status.RESERVATION_REFUSED)
        status = self.capacity.reserve(peer, source, trio.current_time())
        if status != Status.OK:
            return hop_status(status)
        expires = self._clock() // MS_PER_S + RESERVATION_SECONDS
        ours = self._host.usable_by(peer, self._host.addresses)
        reservation = Reservation(
            expire=expires,
            addrs=[address.to_bytes(self._host.node_id) for address in ours if address.relay is None],
            voucher=sign_voucher(self._key, peer, expires),
        )
        return hop_status(status, reservation=reservation, limit=_limit())

    async def _connect(self, connection: Connection, stream: YamuxStream, message: HopMessage) -> None:
        try:
            circuit = Circuit(connection.peer, connection.source, named_peer(message))
        except CircuitError:
            await stream.write(hop_status(Status.MALFORMED_MESSAGE))
            return
        status = self.capacity.open_circuit(circuit, trio.current_time())
        if status != Status.OK:
            await stream.write(hop_status(status))
            return
        try:
            onward = await self._open_onward(circuit.initiator, circuit.target)
            if onward is None:
                await stream.write(hop_status(Status.CONNECTION_FAILED))
                return
            try:
                await stream.write(hop_status(Status.OK, limit=_limit()))
                await join(stream, onward)
            finally:
                onward.reset()
        finally:
            self.capacity.close_circuit(circuit)

    async def _open_onward(self, initiator: NodeId, target: NodeId) -> YamuxStream | None:
        """The stream to whom a circuit leads; None when it does not take it."""
        connection = self._host.connection(target)
        if connection is None or connection.relay is not None:
            return None
        stream: YamuxStream | None = None
        taken = False
        try:
            with trio.fail_after(MESSAGE_SECONDS):
                stream = await self._host.open_stream(target, STOP)
                await stream.write(stop_connect(initiator, _limit()))
                answer = await read_stop(stream, StopMessage.STATUS)
            taken = answer.status == Status.OK
        except (PeerUnreachable, CircuitError, EndOfStream, StreamReset, trio.TooSlowError):
            log.debug("%s does not take a circuit", target.short, exc_info=True)
        finally:
            if stream is not None and not taken:
                stream.reset()
        return stream if taken else None


def _limit() -> Limit:
    return Limit(duration=CIRCUIT_SECONDS, data=CIRCUIT_BYTES)


async def join(left: YamuxStream, right: YamuxStream) -> None:
    """Copy between two streams until one ends or is reset, goes idle, or the circuit has had its time or its bytes."""
    with trio.move_on_after(CIRCUIT_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_copy, left, right, nursery.cancel_scope)
            nursery.start_soon(_copy, right, left, nursery.cancel_scope)
    # What has been copied still arrives.
    left.close()
    right.close()


async def _copy(source: YamuxStream, sink: YamuxStream, both: trio.CancelScope) -> None:
    remaining = CIRCUIT_BYTES
    try:
        while remaining:
            with trio.fail_after(CIRCUIT_IDLE_SECONDS):
                data = await source.read(min(READ_BYTES, remaining))
                await sink.write(data)
            remaining -= len(data)
    except (EndOfStream, StreamReset, trio.TooSlowError):
        pass
    finally:
        both.cancel()
