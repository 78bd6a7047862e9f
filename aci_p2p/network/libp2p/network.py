"""The seam over libp2p: host, gossip and DHT put together."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from math import inf
from random import SystemRandom

import trio

from aci_p2p.clock import system_clock
from aci_p2p.network.api import (
    ConnectionInfo,
    GossipValidator,
    KnownPeer,
    Network,
    NetworkStatistics,
    Reachability,
    RecordSelector,
    RecordValidator,
    Stream,
    StreamClosed,
    StreamHandler,
    Subscription,
)
from aci_p2p.network.checks import check_gossip, peer_alone
from aci_p2p.network.config import NetworkConfig
from aci_p2p.network.libp2p import gossip as gossip_module
from aci_p2p.network.libp2p import identify as identify_module
from aci_p2p.network.libp2p import kademlia as kademlia_module
from aci_p2p.network.libp2p import ping as ping_module
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.gossip import Gossip
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.identify import Identify, Identity
from aci_p2p.network.libp2p.kademlia import Kademlia
from aci_p2p.network.libp2p.streams import FramedStream
from aci_p2p.network.libp2p.traversal import Traversal
from aci_p2p.network.libp2p.yamux import YamuxStream
from aci_p2p.network.outbound import OutboundStreams
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.validation import Validation
from aci_p2p.tasks import Notice, open_background

INTERFACES_S = 1.0
"""Seconds for which the addresses of our interfaces are as good as known."""
CLOSE_SECONDS = 0.5
"""How long leaving waits for queued frames to reach the peers, seconds."""


class Libp2pNetwork(Network):
    """A running libp2p endpoint. Made only by `open_libp2p_network`."""

    def __init__(self, host: Host, gossip: Gossip, kademlia: Kademlia, traversal: Traversal) -> None:
        self._host = host
        self._gossip = gossip
        self._kademlia = kademlia
        self._traversal = traversal
        self._outbound = OutboundStreams()
        self._streams = 0
        self._changes = Notice()
        self._addresses: tuple[str, ...] = ()
        self._addresses_until = -inf
        host.on_connected.append(lambda _connection: self._changes.notify())
        host.on_disconnected.append(lambda _peer: self._changes.notify())
        host.on_changed.append(self._changed)
        gossip.on_subscriptions.append(self._changes.notify)

    def _changed(self) -> None:
        self._addresses_until = -inf
        self._changes.notify()

    @property
    def node_id(self) -> NodeId:
        return self._host.node_id

    @property
    def addresses(self) -> Sequence[str]:
        now = trio.current_time()
        if now >= self._addresses_until:
            # Providers tell them with each bid and each ask, and the system is asked for its interfaces.
            self._addresses = tuple(address.owned_by(self.node_id) for address in self._host.addresses)
            self._addresses_until = now + INTERFACES_S
        return self._addresses

    @property
    def peers(self) -> Sequence[NodeId]:
        return self._host.peers

    @property
    def reachability(self) -> Reachability:
        return self._host.reachability

    async def changed(self) -> None:
        await self._changes.wait()

    def connections(self) -> Sequence[ConnectionInfo]:
        return tuple(replace(one, score=self._gossip.score(one.peer)) for one in self._host.connections.describe())

    def known_peers(self) -> Sequence[KnownPeer]:
        return self._host.book.known_peers()

    async def connect(self, address: str) -> NodeId:
        if (known := peer_alone(address)) is not None:
            await self._host.dial(known)
            return known
        target = TcpAddress.parse(address)
        if not target.port or (target.peer is None and target.relay is not None):
            msg = f"{address} does not say where to dial"
            raise LocalError(msg, hint="give a port, and /p2p/ with the peer id after /p2p-circuit")
        if target.peer is None:
            connection = await self._host.dialler.dial_anybody(target)
        else:
            connection = await self._host.dial(target.peer, (target,))
        # Named by our user: remembered whatever the configuration says.
        self._host.book.prefer(connection.peer, target)
        return connection.peer

    def learn_addresses(self, peer: NodeId, addresses: Sequence[str]) -> None:
        parsed: list[TcpAddress] = []
        for address in addresses:
            try:
                parsed.append(TcpAddress.parse(address))
            except LocalError:
                continue
        self._host.learn(peer, self._host.believed(parsed))

    @asynccontextmanager
    async def open_stream(self, peer: NodeId, protocol: str, *, eager: bool = False) -> AsyncGenerator[Stream]:
        if peer not in self._host.peers:
            await self._host.dial(peer)
        with self._outbound.opening(peer, protocol):
            raw = await self._host.open_stream(peer, protocol, eager=eager)
            self._streams += 1
            try:
                yield FramedStream(peer, raw)
            except BaseException:
                raw.reset()
                raise
            else:
                raw.close()
            finally:
                self._streams -= 1

    def serve(self, protocol: str, handler: StreamHandler) -> AbstractContextManager[None]:
        return self._host.serve(protocol, partial(self._serve_stream, handler))

    async def _serve_stream(self, handler: StreamHandler, peer: NodeId, raw: YamuxStream) -> None:
        self._streams += 1
        try:
            await handler(FramedStream(peer, raw))
        except StreamClosed:
            # The peer left: for the handler the ordinary end, and nothing is left to close.
            raw.reset()
        finally:
            self._streams -= 1

    def subscribe(
        self, topic: str, validator: GossipValidator, *, capacity: int
    ) -> AbstractAsyncContextManager[Subscription]:
        return self._gossip.subscribe(topic, validator, capacity=capacity)

    def topic_peers(self, topic: str) -> Sequence[NodeId]:
        return self._gossip.topic_peers(topic)

    async def publish(self, topic: str, data: bytes) -> None:
        check_gossip(data)
        await trio.lowlevel.checkpoint()
        self._gossip.publish(topic, data)

    async def report(self, peer: NodeId, topic: str, validation: Validation) -> None:
        await self._gossip.report(peer, topic, validation)

    async def put_record(self, key: str, value: bytes) -> None:
        await self._kademlia.put_record(key, value)

    async def get_record(self, key: str) -> bytes | None:
        return await self._kademlia.get_record(key)

    async def provide(self, key: bytes) -> None:
        await self._kademlia.provide(key)

    async def find_providers(self, key: bytes, limit: int) -> Sequence[NodeId]:
        return await self._kademlia.find_providers(key, limit)

    def statistics(self) -> NetworkStatistics:
        journal, connections = self._gossip.journal, self._host.connections
        count, traversal = connections.count(), self._traversal
        return NetworkStatistics(
            peers=len(self._host.peers),
            inbound=count.inbound,
            outbound=count.outbound,
            relayed=count.relayed,
            relays=len(traversal.client.reservations),
            reservations=len(traversal.server.capacity.reserving),
            circuits=traversal.server.capacity.circuits,
            holes_punched=traversal.puncher.succeeded,
            holes_failed=traversal.puncher.failed,
            trimmed=connections.trimmed,
            banned=connections.banned_count,
            handshakes=self._host.admission.under_way,
            handshakes_refused=self._host.admission.refused,
            dials=self._host.dialler.dials,
            dial_failures=self._host.dialler.failures,
            streams=self._streams,
            gossip_accepted=journal.accepted,
            gossip_refused=dict(journal.refused),
            gossip_dropped=journal.dropped,
            handler_failures=self._host.handler_failures,
        )


def _introduce(identify: Identify, kademlia: Kademlia) -> None:
    """Have the DHT know which peers belong to it."""

    def on_identified(peer: NodeId, identity: Identity) -> None:
        if kademlia_module.PROTOCOL in identity.protocols:
            kademlia.add_peer(peer)
        else:
            kademlia.avoid(peer)

    identify.on_identified.append(on_identified)
    identify.on_silent.append(kademlia.avoid)


@asynccontextmanager
async def open_libp2p_network(
    key: KeyPair,
    config: NetworkConfig | None = None,
    *,
    record_validator: RecordValidator,
    record_selector: RecordSelector,
) -> AsyncGenerator[Network]:
    """A libp2p endpoint for the block.

    Raises AddressInUse or LocalError for a listen address that cannot be bound. Leaving the block, also by
    cancellation, closes all streams and connections within CLOSE_SECONDS.
    """
    config = config or NetworkConfig()
    bind_to = [TcpAddress.parse(address) for address in config.listen]
    announced = [TcpAddress.parse(address) for address in config.announce]
    random = SystemRandom()
    async with open_background() as nursery:
        host = Host(key, nursery, config)
        identify = Identify(host, nursery)
        gossip = Gossip(host, nursery, random)
        kademlia = Kademlia(host, record_validator, record_selector, random, may_dial=not config.named_only)
        _introduce(identify, kademlia)
        traversal = Traversal(host, identify, key, config, nursery=nursery, random=random, clock=system_clock)
        host.connections.protected += [gossip.mesh_peers, kademlia.close_peers]
        host.on_moved.append(kademlia.move)
        with ExitStack() as stack:
            for protocol, serve in (
                (identify_module.PROTOCOL, identify.serve),
                (identify_module.PUSH_PROTOCOL, identify.serve_push),
                (ping_module.PROTOCOL, ping_module.serve_ping),
                (gossip_module.PROTOCOL, gossip.serve),
                (kademlia_module.PROTOCOL, kademlia.serve),
            ):
                stack.enter_context(host.serve(protocol, serve, background=True))
            stack.enter_context(traversal.serving())
            network = Libp2pNetwork(host, gossip, kademlia, traversal)
            host.announce("config", announced)
            for address in bind_to:
                await host.listen(address)
            nursery.start_soon(identify.run)
            nursery.start_soon(gossip.run)
            nursery.start_soon(kademlia.run)
            nursery.start_soon(traversal.run)
            try:
                yield network
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_SECONDS):
                    await host.close()
