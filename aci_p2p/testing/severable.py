"""Cutting a node's cable: for real endpoints by a layer that stops carrying, in memory by the hub itself."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager

import trio

from aci_p2p.dht import RecordRules
from aci_p2p.network import Network, NetworkConfig
from aci_p2p.network.api import (
    ConnectionInfo,
    GossipValidator,
    KnownPeer,
    NetworkStatistics,
    PeerUnreachable,
    Reachability,
    Stream,
    StreamClosed,
    StreamHandler,
    Subscription,
)
from aci_p2p.network.memory import MemoryHub
from aci_p2p.node import OpenNetwork
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.validation import Validation


class Cables:
    """The endpoints of a swarm, each of which can be cut off at once."""

    def __init__(self, opening: OpenNetwork, hub: MemoryHub | None) -> None:
        """`opening` opens an endpoint, on `hub` if there is one."""
        self._opening = opening
        self._hub = hub
        self._severable: dict[NodeId, SeverableNetwork] = {}

    @asynccontextmanager
    async def open_network(self, key: KeyPair, config: NetworkConfig, rules: RecordRules) -> AsyncGenerator[Network]:
        """An endpoint for the block."""
        async with self._opening(key, config, rules) as network:
            if self._hub is not None:
                yield network
                return
            self._severable[key.node_id] = severable = SeverableNetwork(network)
            yield severable

    def cut(self, node: NodeId) -> None:
        """Nothing leaves a node any more. Over sockets, others see its connections end when it is gone."""
        if self._hub is not None:
            self._hub.cut_off(node)
        elif node in self._severable:
            self._severable.pop(node).sever()

    def mend(self, node: NodeId) -> None:
        """The node's next endpoint carries."""
        if self._hub is not None:
            self._hub.restore(node)


class _SeverableStream(Stream):
    def __init__(self, stream: Stream, is_severed: Callable[[], bool]) -> None:
        self._stream = stream
        self._is_severed = is_severed

    @property
    def peer(self) -> NodeId:
        return self._stream.peer

    async def send(self, frame: bytes) -> None:
        if self._is_severed():
            await trio.lowlevel.checkpoint()
            msg = "the cable is cut"
            raise StreamClosed(msg)
        await self._stream.send(frame)

    async def receive(self) -> bytes:
        frame = await self._stream.receive()
        if self._is_severed():
            msg = "the cable is cut"
            raise StreamClosed(msg)
        return frame


class SeverableNetwork(Network):
    """An endpoint as it is, until it is severed: then it does nothing any more."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._severed = False

    def sever(self) -> None:
        """Carry nothing from now on."""
        self._severed = True

    def _is_severed(self) -> bool:
        return self._severed

    def _check(self) -> None:
        if self._severed:
            msg = "the cable is cut"
            raise PeerUnreachable(msg)

    @property
    def node_id(self) -> NodeId:
        return self._network.node_id

    @property
    def addresses(self) -> Sequence[str]:
        return self._network.addresses

    @property
    def peers(self) -> Sequence[NodeId]:
        return () if self._severed else self._network.peers

    @property
    def reachability(self) -> Reachability:
        return self._network.reachability

    async def changed(self) -> None:
        await self._network.changed()

    def connections(self) -> Sequence[ConnectionInfo]:
        return self._network.connections()

    def known_peers(self) -> Sequence[KnownPeer]:
        return self._network.known_peers()

    async def connect(self, address: str) -> NodeId:
        self._check()
        return await self._network.connect(address)

    def learn_addresses(self, peer: NodeId, addresses: Sequence[str]) -> None:
        self._network.learn_addresses(peer, addresses)

    @asynccontextmanager
    async def open_stream(self, peer: NodeId, protocol: str, *, eager: bool = False) -> AsyncGenerator[Stream]:
        self._check()
        async with self._network.open_stream(peer, protocol, eager=eager) as stream:
            yield _SeverableStream(stream, self._is_severed)

    def serve(self, protocol: str, handler: StreamHandler) -> AbstractContextManager[None]:
        async def handle(stream: Stream) -> None:
            if not self._severed:
                await handler(_SeverableStream(stream, self._is_severed))

        return self._network.serve(protocol, handle)

    def subscribe(
        self, topic: str, validator: GossipValidator, *, capacity: int
    ) -> AbstractAsyncContextManager[Subscription]:
        return self._network.subscribe(topic, validator, capacity=capacity)

    def topic_peers(self, topic: str) -> Sequence[NodeId]:
        return () if self._severed else self._network.topic_peers(topic)

    async def publish(self, topic: str, data: bytes) -> None:
        if not self._severed:
            await self._network.publish(topic, data)

    async def report(self, peer: NodeId, topic: str, validation: Validation) -> None:
        if not self._severed:
            await self._network.report(peer, topic, validation)

    async def put_record(self, key: str, value: bytes) -> None:
        self._check()
        await self._network.put_record(key, value)

    async def get_record(self, key: str) -> bytes | None:
        self._check()
        return await self._network.get_record(key)

    async def provide(self, key: bytes) -> None:
        self._check()
        await self._network.provide(key)

    async def find_providers(self, key: bytes, limit: int) -> Sequence[NodeId]:
        self._check()
        return await self._network.find_providers(key, limit)

    def statistics(self) -> NetworkStatistics:
        return self._network.statistics()
