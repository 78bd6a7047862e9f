"""The seam in one process: no sockets, no clock but trio's, no randomness. For tests and simulations.

Every endpoint of a `MemoryHub` can reach every other, `latency` seconds away, until one of them is cut off. Gossip
floods over the connections, which is what gossipsub does in a swarm smaller than its mesh degree. DHT values and
provider records are kept by the endpoints closest to the key among those reachable, as in Kademlia.

Under `trio.testing.MockClock` a run takes no real time.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import trio

from aci_p2p.network.api import (
    ConnectionInfo,
    DialledOurselves,
    GossipMessage,
    GossipValidator,
    KnownPeer,
    Network,
    NetworkStatistics,
    PeerUnreachable,
    Reachability,
    RecordSelector,
    RecordValidator,
    Stream,
    StreamClosed,
    StreamHandler,
    Subscription,
)
from aci_p2p.network.checks import check_gossip, check_provider_key, check_record, peer_alone
from aci_p2p.network.delivery import GossipJournal, QueuedSubscription, SeenCache, judge, message_id
from aci_p2p.network.limits import MAX_KNOWN_PEERS, MAX_STREAMS, MAX_STREAMS_PER_PEER
from aci_p2p.network.memory_records import RecordRules, RecordShelf
from aci_p2p.network.memory_stream import MemoryStream, Pipe
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.validation import Decision, Validation
from aci_p2p.tasks import Notice, open_background
from aci_p2p.version import SOFTWARE

INBOX_MESSAGES = 4096
"""Gossip messages on their way to one endpoint; more are lost."""
REPLICAS = 20
"""Endpoints that keep a DHT record (Kademlia's k)."""

log = logging.getLogger("aci_p2p.network")


class MemoryHub:
    """The medium that endpoints of one simulated network share."""

    def __init__(self, *, latency: float = 0.0) -> None:
        """`latency`: one-way delay between any two endpoints, virtual seconds."""
        self.latency = latency
        self._endpoints: dict[NodeId, MemoryNetwork] = {}
        self._cut_off: set[NodeId] = set()
        self._opened = 0

    @asynccontextmanager
    async def open_network(
        self, key: KeyPair, *, record_validator: RecordValidator, record_selector: RecordSelector
    ) -> AsyncGenerator[Network]:
        """An endpoint for the block. Raises LocalError when the key already has one here."""
        if key.node_id in self._endpoints:
            msg = f"{key.node_id.short} is already on this hub"
            raise LocalError(msg)
        self._opened += 1
        address = f"/memory/{self._opened}/p2p/{key.node_id}"
        async with open_background() as nursery:
            network = MemoryNetwork(self, key.node_id, address, nursery, RecordRules(record_validator, record_selector))
            self._endpoints[key.node_id] = network
            nursery.start_soon(network.pump)
            try:
                yield network
            finally:
                self._disconnect(network)
                del self._endpoints[key.node_id]

    def cut_off(self, peer: NodeId) -> None:
        """Cut a peer's cable: its connections are lost and it can neither dial nor be dialled."""
        self._cut_off.add(peer)
        if (network := self._endpoints.get(peer)) is not None:
            self._disconnect(network)

    def restore(self, peer: NodeId) -> None:
        """Plug a peer in again; connections come back only when somebody dials."""
        self._cut_off.discard(peer)

    def disconnect(self, a: NodeId, b: NodeId) -> None:
        """Drop the connection between two endpoints; either may dial again."""
        self._endpoints[a].drop_link(b)
        self._endpoints[b].drop_link(a)

    def endpoint(self, peer: NodeId) -> MemoryNetwork | None:
        """The endpoint of a peer, None when there is none or it is cut off."""
        return None if peer in self._cut_off else self._endpoints.get(peer)

    def owner_of(self, number: str) -> NodeId | None:
        """Whose endpoint has this number in its address; None when nobody's has."""
        for peer in self._endpoints:
            if (network := self.endpoint(peer)) is not None and network.addresses[0].startswith(f"/memory/{number}/"):
                return peer
        return None

    def is_cut_off(self, peer: NodeId) -> bool:
        """Whether the peer's cable is cut."""
        return peer in self._cut_off

    def _disconnect(self, network: MemoryNetwork) -> None:
        for peer in network.peers:
            self.disconnect(network.node_id, peer)


@dataclass(eq=False, slots=True)
class _Link:
    address: str
    outbound: bool
    opened: float
    streams: set[MemoryStream] = field(default_factory=set[MemoryStream])


class MemoryNetwork(Network):
    """One endpoint of a hub. Made only by `MemoryHub.open_network`."""

    def __init__(
        self, hub: MemoryHub, node_id: NodeId, address: str, nursery: trio.Nursery, rules: RecordRules
    ) -> None:
        self._hub = hub
        self._node_id = node_id
        self._address = address
        self._nursery = nursery
        self._validate_record = rules.validate
        self._known: dict[NodeId, tuple[str, ...]] = {}
        self._links: dict[NodeId, _Link] = {}
        self._connected: dict[NodeId, tuple[str, ...]] = {}
        self._handlers: dict[str, tuple[StreamHandler, set[trio.CancelScope]]] = {}
        self._inbound: dict[NodeId, int] = {}
        self._streams = 0
        self._dials = 0
        self._dial_failures = 0
        self._handler_failures = 0
        self._subscriptions: dict[str, QueuedSubscription] = {}
        self._journal = GossipJournal()
        self._seen = SeenCache()
        self._inbox: deque[tuple[float, NodeId, str, bytes]] = deque()
        self._inbox_changed = trio.Event()
        self._changes = Notice()
        self.shelf = RecordShelf(rules)

    @property
    def node_id(self) -> NodeId:
        return self._node_id

    @property
    def addresses(self) -> Sequence[str]:
        return (self._address,)

    @property
    def peers(self) -> Sequence[NodeId]:
        return tuple(self._links)

    @property
    def reachability(self) -> Reachability:
        return Reachability.PUBLIC

    async def changed(self) -> None:
        await self._changes.wait()

    def connections(self) -> Sequence[ConnectionInfo]:
        now = trio.current_time()
        return tuple(
            ConnectionInfo(
                peer=peer,
                address=link.address,
                outbound=link.outbound,
                relay=None,
                age_s=now - link.opened,
                round_trip_ms=2_000 * self._hub.latency,
                streams=len(link.streams),
                agent=SOFTWARE,
                score=0.0,
            )
            for peer, link in self._links.items()
        )

    def known_peers(self) -> Sequence[KnownPeer]:
        return tuple(KnownPeer(peer, addresses) for peer, addresses in reversed(self._connected.items()))

    async def connect(self, address: str) -> NodeId:
        if (known := peer_alone(address)) is not None:
            await self._dial(known, self._known.get(known, ()))
            return known
        number, peer = _parse_address(address)
        peer = peer or self._hub.owner_of(number)
        if peer is None:
            msg = f"nobody answers at {address}"
            raise PeerUnreachable(msg)
        address = f"/memory/{number}/p2p/{peer}"
        await self._dial(peer, (address,))
        self._known[peer] = (address,)
        return peer

    def learn_addresses(self, peer: NodeId, addresses: Sequence[str]) -> None:
        kept: list[str] = []
        for address in addresses:
            try:
                if _parse_address(address)[1] == peer:
                    kept.append(address)
            except LocalError:
                continue
        if kept:
            self._known[peer] = tuple(kept)

    async def _dial(self, peer: NodeId, addresses: Sequence[str]) -> MemoryNetwork:
        if peer == self._node_id:
            msg = "cannot connect to ourselves"
            raise DialledOurselves(msg)
        await trio.sleep(0 if peer in self._links else 2 * self._hub.latency)
        remote = self._hub.endpoint(peer)
        if peer in self._links and remote is not None:
            return remote
        self._dials += 1
        if remote is None or self._hub.is_cut_off(self._node_id) or not set(addresses) & set(remote.addresses):
            self._dial_failures += 1
            msg = f"{peer.short} cannot be reached at {', '.join(addresses) or 'any known address'}"
            raise PeerUnreachable(msg)
        self._add_link(peer, remote.addresses, outbound=True)
        remote._add_link(self._node_id, self.addresses, outbound=False)  # noqa: SLF001 - the other half of one connection
        return remote

    def _add_link(self, peer: NodeId, addresses: Sequence[str], *, outbound: bool) -> None:
        self._links.setdefault(peer, _Link(addresses[0], outbound, trio.current_time()))
        self._known[peer] = tuple(addresses)
        self._connected.pop(peer, None)
        self._connected[peer] = tuple(addresses)
        if len(self._connected) > MAX_KNOWN_PEERS:
            del self._connected[next(iter(self._connected))]
        self._changes.notify()

    def drop_link(self, peer: NodeId) -> None:
        """Lose the connection to a peer and the streams on it."""
        link = self._links.pop(peer, None)
        for stream in link.streams if link else ():
            stream.reset()
        self._changes.notify()

    @asynccontextmanager
    async def open_stream(self, peer: NodeId, protocol: str) -> AsyncGenerator[Stream]:
        remote = await self._dial(peer, self._known.get(peer, ()))
        incoming, outgoing = Pipe(self._hub.latency), Pipe(self._hub.latency)
        accept = remote.accept_stream(self._node_id, protocol, incoming=outgoing, outgoing=incoming)
        if not accept:
            msg = f"{peer.short} does not serve {protocol}"
            raise PeerUnreachable(msg)
        stream = MemoryStream(peer, incoming, outgoing)
        with self._holding(stream):
            yield stream

    @contextmanager
    def _holding(self, stream: MemoryStream) -> Generator[None]:
        """Count a stream, and close it at the end of the block, or reset it when that fails or is cancelled."""
        self._streams += 1
        self._links[stream.peer].streams.add(stream)
        try:
            yield
        except BaseException:
            stream.reset()
            raise
        else:
            stream.close()
        finally:
            self._streams -= 1
            if (link := self._links.get(stream.peer)) is not None:
                link.streams.discard(stream)

    def accept_stream(self, peer: NodeId, protocol: str, *, incoming: Pipe, outgoing: Pipe) -> bool:
        """Start serving a stream that `peer` opened; False when we do not serve the protocol or are too busy."""
        served = self._handlers.get(protocol)
        total = sum(self._inbound.values())
        if served is None or self._inbound.get(peer, 0) >= MAX_STREAMS_PER_PEER or total >= MAX_STREAMS:
            return False
        handler, scopes = served
        self._inbound[peer] = self._inbound.get(peer, 0) + 1
        self._nursery.start_soon(self._serve_stream, MemoryStream(peer, incoming, outgoing), handler, scopes)
        return True

    async def _serve_stream(self, stream: MemoryStream, handler: StreamHandler, scopes: set[trio.CancelScope]) -> None:
        scope = trio.CancelScope()
        scopes.add(scope)
        try:
            with scope:
                await trio.sleep(self._hub.latency)
                if stream.peer in self._links:
                    with self._holding(stream):
                        await handler(stream)
        except StreamClosed:
            pass
        except Exception:  # a handler never raises into the network's task tree
            log.debug("serving %s failed", stream.peer.short, exc_info=True)
            self._handler_failures += 1
        finally:
            scopes.discard(scope)
            self._inbound[stream.peer] -= 1
            if not self._inbound[stream.peer]:
                del self._inbound[stream.peer]

    @contextmanager
    def serve(self, protocol: str, handler: StreamHandler) -> Generator[None]:
        if protocol in self._handlers:
            msg = f"{protocol} is already served"
            raise LocalError(msg)
        scopes: set[trio.CancelScope] = set()
        self._handlers[protocol] = (handler, scopes)
        try:
            yield
        finally:
            del self._handlers[protocol]
            for scope in tuple(scopes):
                scope.cancel()

    @asynccontextmanager
    async def subscribe(self, topic: str, validator: GossipValidator, *, capacity: int) -> AsyncGenerator[Subscription]:
        await trio.lowlevel.checkpoint()
        if topic in self._subscriptions:
            msg = f"{topic} is already subscribed"
            raise LocalError(msg)
        subscription = QueuedSubscription(validator, capacity)
        self._subscriptions[topic] = subscription
        self._tell_neighbours()
        try:
            yield subscription
        finally:
            del self._subscriptions[topic]
            self._tell_neighbours()

    def _tell_neighbours(self) -> None:
        """Our subscriptions have changed."""
        for peer in self._links:
            if (remote := self._hub.endpoint(peer)) is not None:
                remote._changes.notify()  # noqa: SLF001 - the other end of one connection

    def topic_peers(self, topic: str) -> Sequence[NodeId]:
        remotes = ((peer, self._hub.endpoint(peer)) for peer in self._links)
        return tuple(peer for peer, remote in remotes if remote is not None and remote.has_joined(topic))

    def has_joined(self, topic: str) -> bool:
        """Whether this endpoint is subscribed to a topic."""
        return topic in self._subscriptions

    async def publish(self, topic: str, data: bytes) -> None:
        check_gossip(data)
        await trio.lowlevel.checkpoint()
        if self._seen.add(message_id(topic, data), trio.current_time()):
            self._forward(topic, data)

    def _forward(self, topic: str, data: bytes) -> None:
        for peer in self._links:
            remote = self._hub.endpoint(peer)
            if remote is not None:
                remote.enqueue_gossip(self._node_id, topic, data)

    def enqueue_gossip(self, forwarder: NodeId, topic: str, data: bytes) -> None:
        """A neighbour sends us a message: it arrives `latency` later, unless too much is on its way already."""
        if topic not in self._subscriptions:
            return
        if len(self._inbox) >= INBOX_MESSAGES:
            self._journal.dropped += 1
            return
        self._inbox.append((trio.current_time() + self._hub.latency, forwarder, topic, data))
        self._inbox_changed.set()

    async def pump(self) -> None:
        """Handle arriving gossip, oldest first, until cancelled."""
        while True:
            while not self._inbox:
                self._inbox_changed = trio.Event()
                await self._inbox_changed.wait()
            due, forwarder, topic, data = self._inbox.popleft()
            await trio.sleep_until(due)
            if forwarder in self._links:
                self._receive_gossip(forwarder, topic, data)

    def _receive_gossip(self, forwarder: NodeId, topic: str, data: bytes) -> None:
        subscription = self._subscriptions.get(topic)
        if subscription is None or not self._seen.add(message_id(topic, data), trio.current_time()):
            return
        validation = judge(subscription.validator, forwarder, data)
        if validation.decision is not Decision.ACCEPT:
            self._refuse(forwarder, validation)
            return
        self._journal.accepted += 1
        if not subscription.deliver(GossipMessage(forwarder, data)):
            self._journal.dropped += 1
        self._forward(topic, data)

    def _refuse(self, forwarder: NodeId, validation: Validation) -> None:
        if self._journal.refuse(forwarder, validation) and forwarder in self._links:
            self._hub.disconnect(self._node_id, forwarder)

    async def report(self, peer: NodeId, topic: str, validation: Validation) -> None:  # noqa: ARG002 - no scores here
        await trio.lowlevel.checkpoint()
        self._refuse(peer, validation)

    async def put_record(self, key: str, value: bytes) -> None:
        check_record(key, value)
        self._validate_record(key, value)
        await trio.sleep(2 * self._hub.latency)
        for network in self._closest(key.encode()):
            network.shelf.store(key, value)

    async def get_record(self, key: str) -> bytes | None:
        check_record(key, b"")
        await trio.sleep(2 * self._hub.latency)
        values = [network.shelf.get(key) for network in self._closest(key.encode())]
        return self.shelf.best(key, [value for value in values if value is not None])

    async def provide(self, key: bytes) -> None:
        check_provider_key(key)
        await trio.sleep(2 * self._hub.latency)
        for network in self._closest(key):
            network.shelf.add_provider(key, self._node_id, trio.current_time())

    async def find_providers(self, key: bytes, limit: int) -> Sequence[NodeId]:
        check_provider_key(key)
        await trio.sleep(2 * self._hub.latency)
        now = trio.current_time()
        found = dict.fromkeys(one for network in self._closest(key) for one in network.shelf.providers(key, now))
        for provider in found:
            if provider not in self._known and (remote := self._hub.endpoint(provider)) is not None:
                self.learn_addresses(provider, remote.addresses)
        return tuple(found)[:limit]

    def _closest(self, key: bytes) -> list[MemoryNetwork]:
        """The reachable endpoints (ourselves among them) whose identities are closest to the key by XOR."""
        reached: dict[NodeId, MemoryNetwork] = {self._node_id: self}
        waiting: list[MemoryNetwork] = [self]
        while waiting:
            for peer in waiting.pop().peers:
                remote = self._hub.endpoint(peer)
                if remote is not None and peer not in reached:
                    reached[peer] = remote
                    waiting.append(remote)
        target = _position(key)
        return [reached[peer] for peer in sorted(reached, key=lambda peer: _position(peer.peer_id) ^ target)[:REPLICAS]]

    def statistics(self) -> NetworkStatistics:
        return NetworkStatistics(
            peers=len(self._links),
            inbound=sum(not link.outbound for link in self._links.values()),
            outbound=sum(link.outbound for link in self._links.values()),
            relayed=0,
            relays=0,
            reservations=0,
            circuits=0,
            holes_punched=0,
            holes_failed=0,
            trimmed=0,
            banned=0,
            handshakes=0,
            handshakes_refused=0,
            dials=self._dials,
            dial_failures=self._dial_failures,
            streams=self._streams,
            gossip_accepted=self._journal.accepted,
            gossip_refused=dict(self._journal.refused),
            gossip_dropped=self._journal.dropped,
            handler_failures=self._handler_failures,
        )


def _parse_address(address: str) -> tuple[str, NodeId | None]:
    """The number of an endpoint, and who is expected there; raises LocalError."""
    match address.split("/"):
        case ["", "memory", number] if number.isdecimal():
            return number, None
        case ["", "memory", number, "p2p", peer] if number.isdecimal():
            return number, NodeId.parse(peer)
        case _:
            msg = f"{address!r} is not an in-memory address"
            raise LocalError(msg, hint="it looks like /memory/1/p2p/12D3KooW...")


def _position(key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(key).digest())
