"""One endpoint of an in-memory network."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

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
    Stream,
    StreamClosed,
    StreamHandler,
    Subscription,
)
from aci_p2p.network.checks import check_gossip, check_provider_key, check_record, peer_alone
from aci_p2p.network.delivery import GossipJournal, QueuedSubscription, SeenCache, judge, message_id
from aci_p2p.network.inbound import InboundStreams
from aci_p2p.network.limits import MAX_KNOWN_PEERS
from aci_p2p.network.memory_medium import DIAL_S, KEEP_ALIVE_S, Inbox, parse_address
from aci_p2p.network.memory_records import RecordRules, RecordShelf
from aci_p2p.network.memory_stream import MemoryStream, Pipe
from aci_p2p.network.model import Nat
from aci_p2p.network.outbound import OutboundStreams
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.validation import Decision, Validation
from aci_p2p.tasks import Notice
from aci_p2p.version import SOFTWARE

if TYPE_CHECKING:
    from aci_p2p.network.memory import MemoryHub

REPLICAS = 20
"""Endpoints that keep a DHT record (Kademlia's k)."""

log = logging.getLogger("aci_p2p.network")


@dataclass(eq=False, slots=True)
class _Link:
    address: str
    outbound: bool
    relay: NodeId | None
    opened: float
    streams: dict[MemoryStream, None] = field(default_factory=dict[MemoryStream, None])


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
        self._inbound = InboundStreams[MemoryStream]()
        self._outbound = OutboundStreams()
        self._dials = 0
        self._dial_failures = 0
        self._handler_failures = 0
        self._subscriptions: dict[str, QueuedSubscription] = {}
        self._journal = GossipJournal()
        self._seen = SeenCache()
        self._medium = hub.medium
        self._inbox = Inbox()
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
        is_open = self._medium.places[self._node_id].nat is Nat.OPEN
        return Reachability.PUBLIC if is_open else Reachability.PRIVATE

    async def changed(self) -> None:
        await self._changes.wait()

    def connections(self) -> Sequence[ConnectionInfo]:
        now = trio.current_time()
        return tuple(
            ConnectionInfo(
                peer=peer,
                address=link.address,
                outbound=link.outbound,
                relay=link.relay,
                age_s=now - link.opened,
                round_trip_ms=2_000 * self._medium.latency_s(self._node_id, peer, link.relay),
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
        number, peer = parse_address(address)
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
                if parse_address(address)[1] == peer:
                    kept.append(address)
            except LocalError:
                continue
        if kept:
            self._known[peer] = tuple(kept)

    async def _dial(self, peer: NodeId, addresses: Sequence[str]) -> MemoryNetwork:
        if peer == self._node_id:
            msg = "cannot connect to ourselves"
            raise DialledOurselves(msg)
        remote = self._hub.endpoint(peer)
        if peer in self._links and remote is not None:
            return await self._through_partition(peer, remote)
        relay, failure = self._way_to(peer)
        if remote is None:
            await trio.sleep(2 * self._medium.latency_s(self._node_id, peer) if peer in self._medium.places else 0)
        elif self._medium.is_cut(self._node_id, peer):
            await trio.sleep(DIAL_S)
        else:
            await trio.sleep(self._medium.handshake_s(self._node_id, peer, relay))
        remote = self._hub.endpoint(peer)
        if peer in self._links and remote is not None:
            return remote
        self._dials += 1
        is_cut = self._hub.endpoint(self._node_id) is not self or self._medium.is_cut(self._node_id, peer, relay)
        if remote is None or failure or is_cut or not set(addresses) & set(remote.addresses):
            self._dial_failures += 1
            msg = f"{peer.short} cannot be reached at {', '.join(addresses) or 'any known address'}{failure}"
            raise PeerUnreachable(msg)
        self._add_link(peer, remote.addresses, relay, outbound=True)
        remote._add_link(self._node_id, self.addresses, relay, outbound=False)  # noqa: SLF001 - the other half of one connection
        self._note("connected", peer, b"")
        return remote

    def _way_to(self, peer: NodeId) -> tuple[NodeId | None, str]:
        """The relay that a connection to a peer needs, and why there can be none."""
        if peer not in self._medium.places or self._medium.can_dial(self._node_id, peer):
            return None, ""
        relay = self._hub.relay_between(self._node_id, peer)
        return relay, "" if relay else ": NATs are between, and no relay"

    async def _through_partition(self, peer: NodeId, remote: MemoryNetwork) -> MemoryNetwork:
        """Wait until a connection carries anything again. Raises PeerUnreachable when it is lost first."""
        await trio.lowlevel.checkpoint()
        while (link := self._links.get(peer)) is not None:
            if not self._medium.is_cut(self._node_id, peer, link.relay):
                return remote
            await self._hub.changes.wait()
        msg = f"the connection to {peer.short} was lost"
        raise PeerUnreachable(msg)

    def _note(self, kind: str, peer: NodeId, data: bytes) -> None:
        if self._medium.note is not None:
            self._medium.note(kind, self._node_id, peer, data)

    def _add_link(self, peer: NodeId, addresses: Sequence[str], relay: NodeId | None, *, outbound: bool) -> None:
        self._links.setdefault(peer, _Link(addresses[0], outbound, relay, trio.current_time()))
        self._known[peer] = tuple(addresses)
        self._connected.pop(peer, None)
        self._connected[peer] = tuple(addresses)
        if len(self._connected) > MAX_KNOWN_PEERS:
            del self._connected[next(iter(self._connected))]
        self._changes.notify()

    def drop_link(self, peer: NodeId) -> None:
        """Lose the connection to a peer and the streams on it."""
        link = self._links.pop(peer, None)
        if link is None:
            return
        self._note("disconnected", peer, b"")
        for stream in link.streams:
            stream.reset()
        self._changes.notify()

    @asynccontextmanager
    async def open_stream(
        self,
        peer: NodeId,
        protocol: str,
        *,
        eager: bool = False,  # noqa: ARG002 - nothing is negotiated here
    ) -> AsyncGenerator[Stream]:
        remote = await self._dial(peer, self._known.get(peer, ()))
        with self._outbound.opening(peer, protocol):
            incoming, outgoing = remote.pipe_to(self._node_id), self.pipe_to(peer)
            accept = remote.accept_stream(self._node_id, protocol, incoming=outgoing, outgoing=incoming)
            if not accept:
                msg = f"{peer.short} does not serve {protocol}"
                raise PeerUnreachable(msg)
            stream = MemoryStream(peer, incoming, outgoing, self._carrier(peer))
            with self._holding(stream):
                yield stream

    @contextmanager
    def _holding(self, stream: MemoryStream) -> Generator[None]:
        """Keep a stream, and close it at the end of the block, or reset it when that fails or is cancelled."""
        self._links[stream.peer].streams[stream] = None
        try:
            yield
        except BaseException:
            stream.reset()
            raise
        else:
            stream.close()
        finally:
            if (link := self._links.get(stream.peer)) is not None:
                link.streams.pop(stream, None)

    def pipe_to(self, peer: NodeId) -> Pipe:
        """One direction of a stream over our connection to a peer."""
        link = self._links[peer]

        def arrival(frame: bytes) -> float:
            self._note("frame", peer, frame)
            due = self._medium.arrival(self._node_id, peer, link.relay, len(frame))
            if due == inf:
                self._medium.carry(self._node_id, peer, link.relay, pipe.release)
            return due

        pipe = Pipe(arrival)
        return pipe

    def _carrier(self, peer: NodeId) -> Callable[[Callable[[], None]], None]:
        relay = self._links[peer].relay
        return lambda action: self._medium.carry(self._node_id, peer, relay, action)

    def relays(self) -> list[NodeId]:
        """Through whom our relayed connections go, one for each."""
        return [link.relay for link in self._links.values() if link.relay is not None]

    def drop_circuits(self, relay: NodeId) -> None:
        """A relay is gone: so are the connections through it."""
        for peer in [peer for peer, link in self._links.items() if link.relay == relay]:
            self._hub.disconnect(self._node_id, peer)

    def split(self) -> None:
        """A partition has come, or has changed: connections across it are lost after KEEP_ALIVE_S."""
        if self._cut_peers():
            self._nursery.start_soon(self._give_up, self._medium.cuts)

    def _cut_peers(self) -> list[NodeId]:
        links = self._links.items()
        return [peer for peer, link in links if self._medium.is_cut(self._node_id, peer, link.relay)]

    async def _give_up(self, cut: int) -> None:
        await trio.sleep(KEEP_ALIVE_S)
        if cut == self._medium.cuts:
            for peer in self._cut_peers():
                self._hub.disconnect(self._node_id, peer)

    def heal(self) -> None:
        """The partition is over: connections to those who left meanwhile are lost."""
        for peer in tuple(self._links):
            remote = self._hub.endpoint(peer)
            if remote is None or self._node_id not in remote.peers:
                self.drop_link(peer)

    def accept_stream(self, peer: NodeId, protocol: str, *, incoming: Pipe, outgoing: Pipe) -> bool:
        """Start serving a stream that `peer` opened; False when we do not serve the protocol or are too busy."""
        served = self._handlers.get(protocol)
        stream = MemoryStream(peer, incoming, outgoing, self._carrier(peer))
        scope = None if served is None else self._inbound.add(peer, stream)
        if served is None or scope is None:
            return False
        self._nursery.start_soon(self._serve_stream, stream, scope, *served)
        return True

    async def _serve_stream(
        self, stream: MemoryStream, scope: trio.CancelScope, handler: StreamHandler, scopes: set[trio.CancelScope]
    ) -> None:
        scopes.add(scope)
        try:
            with scope:
                await trio.sleep(self._medium.latency_s(stream.peer, self._node_id))
                if stream.peer in self._links:
                    with self._holding(stream):
                        await handler(stream)
            if scope.cancelled_caught:
                stream.reset()
        except StreamClosed:
            pass
        except Exception:  # a handler never raises into the network's task tree
            log.debug("serving %s failed", stream.peer.short, exc_info=True)
            self._handler_failures += 1
        finally:
            scopes.discard(scope)
            self._inbound.remove(stream.peer, stream)

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
            self._forward(topic, data, self._node_id)

    def _forward(self, topic: str, data: bytes, forwarder: NodeId) -> None:
        for peer, link in self._links.items():
            remote = self._hub.endpoint(peer)
            if remote is not None and peer != forwarder:
                for delay in self._medium.gossip_s(self._node_id, peer, link.relay, len(data)):
                    remote.enqueue_gossip(self._node_id, topic, data, delay)

    def enqueue_gossip(self, forwarder: NodeId, topic: str, data: bytes, delay: float) -> None:
        """A neighbour sends us a message: it arrives `delay` seconds later, unless too many are on their way."""
        if topic in self._subscriptions and not self._inbox.put(delay, (forwarder, topic, data)):
            self._journal.dropped += 1

    async def pump(self) -> None:
        """Handle arriving gossip in the order of its arrival, until cancelled."""
        while True:
            for forwarder, topic, data in await self._inbox.take():
                if forwarder in self._links:
                    self._receive_gossip(forwarder, topic, data)
                    if topic in self._subscriptions and self._subscriptions[topic].is_crowded:
                        await trio.lowlevel.checkpoint()

    def _receive_gossip(self, forwarder: NodeId, topic: str, data: bytes) -> None:
        if self._medium.note is not None:
            self._medium.note("gossip", forwarder, self._node_id, data)
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
        self._forward(topic, data, forwarder)

    def _refuse(self, forwarder: NodeId, validation: Validation) -> None:
        if self._journal.refuse(forwarder, validation) and forwarder in self._links:
            self._hub.disconnect(self._node_id, forwarder)

    async def report(self, peer: NodeId, topic: str, validation: Validation) -> None:  # noqa: ARG002 - no scores here
        await trio.lowlevel.checkpoint()
        self._refuse(peer, validation)

    async def put_record(self, key: str, value: bytes) -> None:
        check_record(key, value)
        self._validate_record(key, value)
        await trio.sleep(self._medium.lookup_s(self._node_id))
        for network in self._closest(key.encode()):
            network.shelf.store(key, value)

    async def get_record(self, key: str) -> bytes | None:
        check_record(key, b"")
        await trio.sleep(self._medium.lookup_s(self._node_id))
        values = [network.shelf.get(key) for network in self._closest(key.encode())]
        return self.shelf.best(key, [value for value in values if value is not None])

    async def provide(self, key: bytes) -> None:
        check_provider_key(key)
        await trio.sleep(self._medium.lookup_s(self._node_id))
        for network in self._closest(key):
            network.shelf.add_provider(key, self._node_id, trio.current_time())

    async def find_providers(self, key: bytes, limit: int) -> Sequence[NodeId]:
        check_provider_key(key)
        await trio.sleep(self._medium.lookup_s(self._node_id))
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
                if remote is not None and peer not in reached and not self._medium.is_cut(self._node_id, peer):
                    reached[peer] = remote
                    waiting.append(remote)
        target = _position(key)
        return [reached[peer] for peer in sorted(reached, key=lambda peer: _position(peer.peer_id) ^ target)[:REPLICAS]]

    def statistics(self) -> NetworkStatistics:
        return NetworkStatistics(
            peers=len(self._links),
            inbound=sum(not link.outbound for link in self._links.values()),
            outbound=sum(link.outbound for link in self._links.values()),
            relayed=len(self.relays()),
            relays=0,
            reservations=0,
            circuits=self._hub.circuits_through(self._node_id),
            holes_punched=0,
            holes_failed=0,
            trimmed=0,
            banned=0,
            handshakes=0,
            handshakes_refused=0,
            dials=self._dials,
            dial_failures=self._dial_failures,
            streams=sum(len(link.streams) for link in self._links.values()),
            gossip_accepted=self._journal.accepted,
            gossip_refused=dict(self._journal.refused),
            gossip_dropped=self._journal.dropped,
            handler_failures=self._handler_failures,
        )


def _position(key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(key).digest())
