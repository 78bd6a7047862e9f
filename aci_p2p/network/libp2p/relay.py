"""Being reachable through relays, and reaching others through theirs: circuit relay v2, the sides of the client.

A node that others cannot reach keeps reservations with RELAYS relays among the peers that it has dialled, and announces
the circuits that lead to it. A circuit that we have dialled is replaced when half of what it may carry is used up, so
that no stream ends because its circuit does.

Source: https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import trio

from aci_p2p.clock import MS_PER_S, Clock
from aci_p2p.network.api import PeerUnreachable, Reachability
from aci_p2p.network.libp2p.addresses import TcpAddress, most_useful, parse_all
from aci_p2p.network.libp2p.circuit import (
    HOP,
    CircuitError,
    RelayedStream,
    hop_connect,
    hop_reserve,
    named_peer,
    read_hop,
    read_stop,
    stop_status,
)
from aci_p2p.network.libp2p.connections import Connection
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.upstream import HopMessage, Status, StopMessage
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, YamuxStream
from aci_p2p.network.limits import MAX_ADDRESSES_PER_PEER
from aci_p2p.protocol.identity import NodeId

RELAYS = 2
"""Reservations that we keep: one may fail."""
ADDRESSES_PER_RELAY = 2
"""Circuit addresses announced for one relay; both relays' leave half of MAX_ADDRESSES to others."""
ANSWER_SECONDS = 10.0
"""Time for a relay to answer, seconds."""
CIRCUIT_DIAL_SECONDS = 25.0
"""Time from asking for a circuit to a connection over it, seconds: the relay may have to be dialled, asks the target,
and the handshake takes five round trips over both."""
RENEW_AT = 0.75
"""Part of a reservation's time after which it is renewed."""
SHORTEST_RESERVATION_SECONDS = 60.0
"""A relay that promises less is of no use, seconds."""
LONGEST_RESERVATION_SECONDS = 24 * 3600.0
"""A reservation is renewed at least so often, seconds, whatever the relay says."""
RETRY_SECONDS = 30.0
"""How long a relay that refused, failed or was lost is left alone, seconds; doubled each time."""
MAX_RETRY_SECONDS = 1800.0
"""Longest time that a relay is left alone, seconds."""
MAX_REFUSALS = 256
"""Relays remembered as not to be asked for a while."""
RENEWALS_AT_ONCE = 16
"""Circuits that are renewed at the same time: one whose relay is silent takes CIRCUIT_DIAL_SECONDS."""
CHECK_SECONDS = 10.0
"""Time between two looks at the circuits that we have dialled, seconds."""

log = logging.getLogger("aci_p2p.network")


@dataclass(frozen=True, slots=True)
class Reservation:
    """A relay's promise to lead others to us."""

    relay: NodeId
    """Who promised."""
    addresses: tuple[TcpAddress, ...]
    """Circuits that lead to us."""
    renew_at: float
    """When it is to be renewed, in trio's time."""


class RelayRefused(Exception):
    """A relay does not do what we ask, and says so or says nothing."""


class _Refusals:
    """Relays that are left alone for a while."""

    def __init__(self) -> None:
        self._until: OrderedDict[NodeId, tuple[float, float]] = OrderedDict()

    def add(self, relay: NodeId, now: float) -> None:
        pause = min(2 * self._until[relay][1], MAX_RETRY_SECONDS) if relay in self._until else RETRY_SECONDS
        self._until[relay] = (now + pause, pause)
        self._until.move_to_end(relay)
        if len(self._until) > MAX_REFUSALS:
            self._until.popitem(last=False)

    def forget(self, relay: NodeId) -> None:
        self._until.pop(relay, None)

    def until(self, relay: NodeId) -> float:
        return self._until.get(relay, (-math.inf, 0.0))[0]


@dataclass(eq=False, slots=True)
class _Dialled:
    """A circuit that we have opened."""

    connection: Connection
    stream: RelayedStream


class RelayClient:
    """Our reservations, the circuits that come in through them, and those that we open through others' relays."""

    def __init__(self, host: Host, clock: Clock, random: Random, serves_hop: Callable[[NodeId], bool]) -> None:
        """`serves_hop` says whether a connected peer is a relay; `clock` is what the end of a reservation refers to."""
        self._host = host
        self._clock = clock
        self._random = random
        self._serves_hop = serves_hop
        self._reserved: dict[NodeId, Reservation] = {}
        self._refusals = _Refusals()
        self._dialled: list[_Dialled] = []
        self._changed = trio.Event()
        host.on_disconnected.append(self._on_disconnected)
        host.on_changed.append(self.wake)

    @property
    def reservations(self) -> tuple[Reservation, ...]:
        """What relays have promised us."""
        return tuple(self._reserved.values())

    def wake(self) -> None:
        """Something has changed: our reachability, or who is connected."""
        self._changed.set()

    def _on_disconnected(self, peer: NodeId) -> None:
        if self._reserved.pop(peer, None) is not None:
            self._announce()
            self.wake()

    def _announce(self) -> None:
        circuits = [address for reservation in self.reservations for address in reservation.addresses]
        self._host.announce("relay", circuits)

    async def keep_reservations(self) -> None:
        """See to it that we can be reached through relays, for as long as others cannot reach us; until cancelled."""
        while True:
            self._changed = trio.Event()
            next_time = await self._review()
            with trio.move_on_at(next_time):
                await self._changed.wait()

    async def _review(self) -> float:
        """Renew, give up and make reservations; returns when to look again, in trio's time."""
        if self._host.reachability is not Reachability.PRIVATE:
            self._reserved.clear()
            self._announce()
            return math.inf
        now = trio.current_time()
        for reservation in self.reservations:
            if reservation.renew_at <= now:
                await self._try_reserve(reservation.relay)
        for relay in self._candidates():
            if len(self._reserved) >= RELAYS:
                break
            await self._try_reserve(relay)
        times = [reservation.renew_at for reservation in self.reservations]
        if len(self._reserved) < RELAYS:
            times += [self._refusals.until(peer) for peer in self._host.peers if self._may_relay(peer)]
        return max(min(times, default=math.inf), trio.current_time() + 1)

    def _may_relay(self, peer: NodeId) -> bool:
        """Whether a connected peer could lead others to us: it relays, and could be dialled by us."""
        connection = self._host.connection(peer)
        return (
            peer not in self._reserved
            and connection is not None
            and connection.outbound
            and connection.relay is None
            and self._serves_hop(peer)
        )

    def _candidates(self) -> list[NodeId]:
        """Peers to ask, those first that most others can dial; by chance among equals."""
        now = trio.current_time()
        peers = [peer for peer in self._host.peers if self._may_relay(peer) and self._refusals.until(peer) <= now]
        self._random.shuffle(peers)
        return sorted(peers, key=self._is_local)

    def _is_local(self, peer: NodeId) -> bool:
        connection = self._host.connection(peer)
        return connection is not None and connection.place.is_ip and not connection.place.is_global

    async def _try_reserve(self, relay: NodeId) -> None:
        try:
            with trio.fail_after(ANSWER_SECONDS):
                reservation = await self._reserve(relay)
        except (RelayRefused, PeerUnreachable, CircuitError, EndOfStream, StreamReset, trio.TooSlowError) as error:
            log.debug("%s gives us no reservation: %s", relay.short, error)
            self._refusals.add(relay, trio.current_time())
            self._reserved.pop(relay, None)
        else:
            self._refusals.forget(relay)
            # It may have disconnected, or others may have reached us, in the meantime.
            if self._host.connection(relay) is not None and self._host.reachability is Reachability.PRIVATE:
                self._reserved[relay] = reservation
        self._announce()

    async def _reserve(self, relay: NodeId) -> Reservation:
        stream = await self._host.open_stream(relay, HOP)
        try:
            await stream.write(hop_reserve())
            answer = await read_hop(stream, HopMessage.STATUS)
        finally:
            stream.reset()
        _check(answer)
        seconds = min(answer.reservation.expire - self._clock() / MS_PER_S, LONGEST_RESERVATION_SECONDS)
        if seconds < SHORTEST_RESERVATION_SECONDS:
            msg = f"it would end in {seconds:.0f} s; one of the two clocks may be wrong"
            raise RelayRefused(msg)
        addresses = self._circuits_through(relay, list(answer.reservation.addrs))
        if not addresses:
            msg = "nobody knows where it can be dialled"
            raise RelayRefused(msg)
        return Reservation(relay, addresses, trio.current_time() + RENEW_AT * seconds)

    def _circuits_through(self, relay: NodeId, said: list[bytes]) -> tuple[TcpAddress, ...]:
        """The circuits to announce: where we have dialled the relay, and where it says that it can be dialled."""
        connection = self._host.connection(relay)
        dialled = [] if connection is None or not connection.outbound else [connection.place]
        claimed = [address for address in parse_all(said, MAX_ADDRESSES_PER_PEER) if address.peer == relay]
        direct = [address for address in (*dialled, *claimed) if address.relay is None]
        circuits = dict.fromkeys(address.through(relay) for address in most_useful(direct))
        return tuple(circuits)[:ADDRESSES_PER_RELAY]

    async def serve_stop(self, peer: NodeId, stream: YamuxStream) -> None:
        """Take a circuit that one of our relays passes on, and serve the connection over it till it ends."""
        try:
            with trio.fail_after(ANSWER_SECONDS):
                message = await read_stop(stream, StopMessage.CONNECT)
            initiator = named_peer(message)
        except (CircuitError, trio.TooSlowError):
            await stream.write(stop_status(Status.MALFORMED_MESSAGE))
            return
        reservation = self._reserved.get(peer)
        if reservation is None or initiator in {peer, self._host.node_id}:
            await stream.write(stop_status(Status.PERMISSION_DENIED))
            return
        await stream.write(stop_status(Status.OK))
        place = reservation.addresses[0].relay_address.through(peer)
        await self._host.adopt_inbound(RelayedStream(stream, message.limit), place, peer, expected=initiator)

    async def dial(self, peer: NodeId, address: TcpAddress) -> Connection:
        """A connection to a peer through the relay that an address names. Raises PeerUnreachable."""
        assert address.relay is not None
        if address.relay == self._host.node_id:
            msg = f"{address.transport} leads through ourselves"
            raise PeerUnreachable(msg)
        try:
            with trio.fail_after(CIRCUIT_DIAL_SECONDS):
                return await self._dial(peer, address.relay, address)
        except (RelayRefused, CircuitError, EndOfStream, StreamReset, trio.TooSlowError) as error:
            msg = f"{address.transport} does not lead to {peer.short}: {error or 'no answer'}"
            raise PeerUnreachable(msg) from error

    async def _dial(self, peer: NodeId, relay: NodeId, address: TcpAddress) -> Connection:
        to_relay = await self._host.dial(relay, (address.relay_address,))
        if to_relay.relay is not None:
            msg = "the relay itself is reached through a relay"
            raise RelayRefused(msg)
        stream = await self._host.open_stream(relay, HOP)
        try:
            await stream.write(hop_connect(peer))
            answer = await read_hop(stream, HopMessage.STATUS)
            _check(answer)
            relayed = RelayedStream(stream, answer.limit)
            connection = await self._host.adopt_outbound(relayed, peer, address, relay)
        except BaseException:
            stream.reset()
            raise
        self._dialled.append(_Dialled(connection, relayed))
        return connection

    async def renew_circuits(self) -> None:
        """Open a new circuit in the place of each that is half worn; until cancelled."""
        while True:
            await trio.sleep(CHECK_SECONDS)
            self._dialled = [one for one in self._dialled if not one.connection.muxer.is_closed]
            limit = trio.CapacityLimiter(RENEWALS_AT_ONCE)
            async with trio.open_nursery() as nursery:
                for one in self._dialled:
                    if one.stream.is_worn and self._host.connection(one.connection.peer) is one.connection:
                        nursery.start_soon(self._renew, one.connection, limit)

    async def _renew(self, circuit: Connection, limit: trio.CapacityLimiter) -> None:
        async with limit:
            try:
                await self.dial(circuit.peer, circuit.place)
            except PeerUnreachable as error:
                log.debug("the circuit to %s is not renewed: %s", circuit.peer.short, error)


def _check(answer: HopMessage) -> None:
    """Raises RelayRefused unless the answer is OK."""
    if answer.status == Status.OK:
        return
    try:
        reason = Status.Name(answer.status).lower().replace("_", " ")
    except ValueError:
        reason = f"status {answer.status}"
    msg = f"the relay says: {reason}"
    raise RelayRefused(msg)
