"""The table of connections: which there are, which to use for a peer, and which to give up.

Two nodes that dial each other at once get two connections, and a relayed one is followed by a direct one. Both sides
then use the same of them (`Connections.preferred`) and the other is closed when nothing is left on it.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from aci_p2p.network.api import ConnectionInfo, PeerUnreachable
from aci_p2p.network.libp2p.addresses import Scope, TcpAddress, scope_of
from aci_p2p.network.libp2p.kad_table import network_of
from aci_p2p.network.libp2p.yamux import Yamux
from aci_p2p.network.limits import MAX_KNOWN_PEERS
from aci_p2p.protocol.identity import NodeId

MAX_CONNECTIONS = 512
"""Connections kept. Each costs a socket, four tasks and at most 5 MiB of buffers."""
MAX_INBOUND_CONNECTIONS = 384
"""Connections of which peers may have dialled so many: strangers cannot keep us from dialling."""
MAX_CONNECTIONS_PER_SOURCE = 32
"""Inbound connections kept from one source, loopback excepted (a NAT may hide several nodes)."""
MAX_CONNECTIONS_PER_NETWORK = 96
"""Inbound connections kept from one network (see `network_of`): who has a /48 has 65,536 sources in it."""
YOUNG_SECONDS = 30.0
"""How long a new connection is kept in any case, seconds: time to say who one is and to be of use."""
BAN_SECONDS = 60.0
"""How long a peer that was thrown out is neither dialled nor let in, seconds."""


@dataclass(eq=False, slots=True)
class Connection:
    """One multiplexed, authenticated connection."""

    peer: NodeId
    """Who is on the other side."""
    muxer: Yamux
    """Its streams."""
    outbound: bool
    """Whether we dialled it."""
    place: TcpAddress
    """Where we dialled it, or where it came from."""
    source: str
    """Whom it counts against, see `source_of`."""
    opened: float
    """When it was made, in trio's time."""
    relay: NodeId | None = None
    """The relay in between; None when it is direct."""
    agent: str = ""
    """What the peer says its program is."""
    used: float = 0.0
    """When we last opened a stream on it, in trio's time: what the peer opens costs it nothing."""
    accepted: set[str] = field(default_factory=set[str])
    """Protocols of ours that the peer has accepted on it: streams for them need not wait for its answer."""

    @property
    def is_local(self) -> bool:
        """Whether the peer is on this machine."""
        return self.relay is None and self.source == LOOPBACK

    @property
    def scope(self) -> Scope:
        """Where the peer is; behind a relay it may be anywhere."""
        if self.relay is not None:
            return Scope.PUBLIC
        scope = Scope.LOOPBACK if self.is_local else scope_of(self.source.partition("/")[0])
        return Scope.PUBLIC if scope is None else scope


LOOPBACK = "loopback"
"""The source of what comes from this machine."""


def source_of(address: str) -> str:
    """Whom to hold to account for what comes from an IP address.

    That is the address itself, but the /64 network of an IPv6 address, since every subscriber has as many addresses as
    it likes in one; LOOPBACK for this machine.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None and not ip.is_loopback:
            return str(ipaddress.ip_network((ip, 64), strict=False))
        ip = ip.ipv4_mapped or ip
    return LOOPBACK if ip.is_loopback else str(ip)


class ConnectionCount(NamedTuple):
    """How many connections there are, of each kind."""

    inbound: int
    """Those that peers have dialled."""
    outbound: int
    """Those that we have dialled."""
    relayed: int
    """Those of both through relays."""


class Connections:
    """All connections of a host."""

    def __init__(self, own: NodeId, low_water: int, high_water: int) -> None:
        """Of more than `high_water` connections, those that nobody needs are closed until `low_water` are left."""
        self.own = own
        self._low_water = low_water
        self._high_water = high_water
        self._of_peer: dict[NodeId, list[Connection]] = {}
        self._banned: OrderedDict[NodeId, float] = OrderedDict()
        self.protected: list[Callable[[], Iterable[NodeId]]] = []
        self.trimmed = 0
        self.on_connected: list[Callable[[Connection], None]] = []
        self.on_disconnected: list[Callable[[NodeId], None]] = []
        self.on_moved: list[Callable[[NodeId], None]] = []

    @property
    def peers(self) -> tuple[NodeId, ...]:
        """Connected peers."""
        return tuple(self._of_peer)

    @property
    def all(self) -> list[Connection]:
        """All connections, the oldest first."""
        every = [connection for several in self._of_peer.values() for connection in several]
        return sorted(every, key=lambda connection: connection.opened)

    def count(self) -> ConnectionCount:
        """How many connections there are."""
        outbound = inbound = relayed = 0
        for several in self._of_peer.values():
            for one in several:
                if one.outbound:
                    outbound += 1
                else:
                    inbound += 1
                relayed += one.relay is not None
        return ConnectionCount(inbound, outbound, relayed)

    def of(self, peer: NodeId) -> tuple[Connection, ...]:
        """All connections to a peer."""
        return tuple(self._of_peer.get(peer, ()))

    def preferred(self, peer: NodeId) -> Connection | None:
        """The connection to use for a peer: a direct one rather than a relayed one, then the newest of the best.

        When both sides have dialled each other at once, both use the one that the smaller identity dialled.
        """
        usable = [one for one in reversed(self._of_peer.get(peer, ())) if not one.muxer.is_closed]
        return max(usable, key=self._rank, default=None)

    def _rank(self, connection: Connection) -> tuple[bool, bool]:
        return connection.relay is None, connection.outbound == (self.own < connection.peer)

    def add(self, connection: Connection) -> list[Connection]:
        """Enter a connection and tell those who want to know; returns the ones that the peer must have lost.

        A second connection in the same direction: the peer lost the first one and has come back. Not so for relayed
        ones, which are renewed before their time is up, while there are streams on the one before.
        """
        before = self.preferred(connection.peer)
        several = self._of_peer.setdefault(connection.peer, [])
        lost = [one for one in several if one.relay is None and self._rank(one) == self._rank(connection)]
        connection.agent = several[-1].agent if several else ""
        several.append(connection)
        if len(several) == 1:
            for notify in self.on_connected:
                notify(connection)
        elif self.preferred(connection.peer) is not before:
            for tell in self.on_moved:
                tell(connection.peer)
        return lost

    def remove(self, connection: Connection) -> None:
        """A connection has ended."""
        several = self._of_peer[connection.peer]
        several.remove(connection)
        if not several:
            del self._of_peer[connection.peer]
            for notify in self.on_disconnected:
                notify(connection.peer)

    def has_room_for(self, source: str) -> bool:
        """Whether another inbound connection is taken."""
        inbound = [connection for connection in self.all if not connection.outbound]
        if len(inbound) >= MAX_INBOUND_CONNECTIONS:
            return False
        if source == LOOPBACK:
            return True
        network = network_of(source)
        of_network = 0 if network is None else sum(network_of(one.source) == network for one in inbound)
        of_source = sum(one.source == source for one in inbound)
        return of_source < MAX_CONNECTIONS_PER_SOURCE and of_network < MAX_CONNECTIONS_PER_NETWORK

    async def make_room(self) -> None:
        """Before another connection is dialled, close the oldest idle one if need be; raises PeerUnreachable."""
        connections = self.all
        if len(connections) < MAX_CONNECTIONS:
            return
        free = [one for one in connections if one.outbound and not one.muxer.is_needed]
        if not free:
            msg = f"all {MAX_CONNECTIONS} connections are in use"
            raise PeerUnreachable(msg)
        await min(free, key=lambda one: one.muxer.is_in_use).muxer.close()

    @property
    def is_over(self) -> bool:
        """Whether there are more connections than there should be."""
        return len(self.all) > self._high_water

    def superfluous(self) -> list[Connection]:
        """The connections to close, above high water: the least useful ones that nobody needs, down to low water.

        Kept are those that are young, those on which we use a stream, and those to peers that a function in `protected`
        names. Those that the peer alone uses go last, for whatever it says it needs; those that peers have dialled go
        first, since we did not choose them; and of each kind those that we did not use for longest.
        """
        connections = self.all
        if len(connections) <= self._high_water:
            return []
        old = trio.current_time() - YOUNG_SECONDS
        needed = {peer for protected in self.protected for peer in protected()}
        free = [one for one in connections if one.opened <= old and not one.muxer.is_needed and one.peer not in needed]
        free.sort(key=lambda one: (one.muxer.is_in_use, one.outbound, max(one.used, one.opened)))
        chosen = free[: len(connections) - self._low_water]
        self.trimmed += len(chosen)
        return chosen

    @property
    def banned_count(self) -> int:
        """Peers that were thrown out lately."""
        if not self._banned:
            return 0
        now = trio.current_time()
        return sum(until > now for until in self._banned.values())

    def ban(self, peer: NodeId) -> None:
        """Have nothing to do with a peer for BAN_SECONDS."""
        self._banned[peer] = trio.current_time() + BAN_SECONDS
        self._banned.move_to_end(peer)
        if len(self._banned) > MAX_KNOWN_PEERS:
            self._banned.popitem(last=False)

    def is_banned(self, peer: NodeId) -> bool:
        """Whether a peer was thrown out lately."""
        return self._banned.get(peer, 0.0) > trio.current_time()

    def describe(self) -> tuple[ConnectionInfo, ...]:
        """See `Network.connections`; gossip's scores are not for here."""
        now = trio.current_time()
        return tuple(
            ConnectionInfo(
                peer=one.peer,
                address=str(one.place),
                outbound=one.outbound,
                relay=one.relay,
                age_s=now - one.opened,
                round_trip_ms=None if one.muxer.round_trip is None else 1e3 * one.muxer.round_trip,
                streams=one.muxer.stream_count,
                agent=one.agent,
                score=0.0,
            )
            for one in self.all
        )
