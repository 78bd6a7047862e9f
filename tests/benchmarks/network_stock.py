"""The workloads of `network.py` over py-libp2p as it comes: its host, gossipsub and Kademlia.

Its options are those that a careful user would set: Noise and yamux only (the default accepts plaintext), a heartbeat
of a second (default: 120), no limit of ten messages a second a peer, and no diversity of addresses asked for, since all
hosts have one. Each host runs what a workload needs, and nothing else. No fault of it is repaired.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import combinations
from typing import Final

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream, ISubscriptionAPI
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID  # pyright: ignore[reportMissingTypeStubs]
from libp2p.peer.peerinfo import info_from_p2p_addr  # pyright: ignore[reportMissingTypeStubs]
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.records.validator import Validator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]

from tests.benchmarks.network_common import (
    CHUNK_BYTES,
    CHUNKS,
    PAYLOAD_BYTES,
    POLL_S,
    Library,
    Mesh,
    Pair,
    Step,
    Swarm,
    join_all,
    key_of,
    record_of,
    run_worker,
)

ECHO: Final = TProtocol("/bench/echo/1")
DRAIN: Final = TProtocol("/bench/drain/1")
TOPIC: Final = "bench/offers"
LOOPBACK: Final = Multiaddr("/ip4/127.0.0.1/tcp/0")


class AnyRecord(Validator):
    """Takes every record under `/aci/`."""

    def validate(self, key: str, value: bytes) -> None:
        """Nothing is wrong with it."""

    def select(self, key: str, values: list[bytes]) -> int:
        """The first is as good as any."""
        return 0


@asynccontextmanager
async def open_host() -> AsyncGenerator[IHost]:
    """A host on loopback."""
    key = create_new_key_pair(os.urandom(32))
    security = {NOISE: NoiseTransport(key, noise_privkey=create_x25519_key_pair().private_key)}
    host = new_host(key_pair=key, sec_opt=security, muxer_opt={TProtocol(YAMUX): Yamux})
    async with host.run(listen_addrs=[LOOPBACK]):
        yield host


async def open_hosts(stack: AsyncExitStack, count: int) -> list[IHost]:
    """So many of them."""
    return [await stack.enter_async_context(open_host()) for _ in range(count)]


async def dial(client: IHost, server: IHost) -> None:
    """Connect."""
    await client.connect(info_from_p2p_addr(server.get_addrs()[0]))


async def connect(client: IHost, server: IHost) -> None:
    """Connect, and wait until the server is identified."""
    await dial(client, server)
    while not client.get_peerstore().get_protocols(server.get_id()):  # noqa: ASYNC110 - there is no event
        await trio.sleep(POLL_S)


async def read_exactly(stream: INetStream, count: int) -> bytes:
    """Read so many bytes."""
    data = await stream.read(count)
    while len(data) < count:
        more = await stream.read(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


async def echo(stream: INetStream) -> None:
    """Send back every request."""
    try:
        while True:
            await stream.write(await read_exactly(stream, PAYLOAD_BYTES))
    except Exception:  # noqa: BLE001 - the end of the stream comes as one of many; out of a handler it would end the host
        await stream.close()


async def drain(stream: INetStream) -> None:
    """Say when a transfer was read."""
    while True:
        left = CHUNKS * CHUNK_BYTES
        while left:
            left -= len(await stream.read(min(left, CHUNK_BYTES)))
        await stream.write(b"read")


class StockPair(Pair):
    def __init__(self, client: IHost, server: ID) -> None:
        self._client = client
        self._server = server

    @asynccontextmanager
    async def open_requests(self) -> AsyncGenerator[Step]:
        payload = bytes(PAYLOAD_BYTES)
        stream = await self._client.new_stream(self._server, [ECHO])

        async def request() -> None:
            await stream.write(payload)
            await read_exactly(stream, PAYLOAD_BYTES)

        yield request
        await stream.close()

    @asynccontextmanager
    async def open_bulk(self) -> AsyncGenerator[Step]:
        chunk = bytes(CHUNK_BYTES)
        stream = await self._client.new_stream(self._server, [DRAIN])

        async def transfer() -> None:
            for _ in range(CHUNKS):
                await stream.write(chunk)
            await read_exactly(stream, 4)

        yield transfer


class StockMesh(Mesh):
    def __init__(self, publisher: Pubsub, others: list[ISubscriptionAPI], nursery: trio.Nursery) -> None:
        self._publisher = publisher
        self._received = [0] * len(others)
        for index, subscription in enumerate(others):
            nursery.start_soon(self._receive, index, subscription)

    async def _receive(self, index: int, subscription: ISubscriptionAPI) -> None:
        while True:
            await subscription.get()
            self._received[index] += 1

    async def publish(self, data: bytes) -> None:
        await self._publisher.publish(TOPIC, data)

    def received(self) -> int:
        return min(self._received)


@asynccontextmanager
async def open_pubsub(host: IHost) -> AsyncGenerator[Pubsub]:
    """Gossip on a host."""
    router = GossipSub(
        [TProtocol("/meshsub/1.1.0")],
        degree=6,
        degree_low=4,
        degree_high=12,
        heartbeat_interval=1,
        spam_protection_enabled=False,
        eclipse_protection_enabled=False,
    )
    pubsub = Pubsub(host, router, strict_signing=False)
    async with background_trio_service(pubsub), background_trio_service(router):
        await pubsub.wait_until_ready()
        yield pubsub


@asynccontextmanager
async def open_node(host: IHost) -> AsyncGenerator[KadDHT]:
    """The DHT on a host."""
    node = KadDHT(host, DHTMode.SERVER, max_peers_per_subnet=0)
    node.register_validator("aci", AnyRecord())
    async with background_trio_service(node):
        yield node


class StockSwarm(Swarm):
    def __init__(self, hosts: list[IHost], nodes: list[KadDHT]) -> None:
        self._hosts = hosts
        *self._nodes, self._newcomer = nodes

    def _owner(self, number: int) -> KadDHT:
        return self._nodes[number % len(self._nodes)]

    async def announce(self, number: int) -> None:
        await self._owner(number).provide(key_of(number).hex())
        await self._owner(number).put_value(*record_of(number))

    async def join(self) -> None:
        await dial(self._hosts[-1], self._hosts[0])
        await self._newcomer.add_peer(self._hosts[0].get_id())

    async def find_provider(self, number: int) -> bool:
        found = await self._newcomer.find_providers(key_of(number).hex(), 1)
        return self._owner(number).host.get_id() in [provider.peer_id for provider in found]

    async def find_record(self, number: int) -> bool:
        key, value = record_of(number)
        return await self._newcomer.get_value(key) == value


class Stock(Library):
    @asynccontextmanager
    async def open_pairs(self, count: int, *, complete: bool = False) -> AsyncGenerator[list[Step]]:
        async with AsyncExitStack() as stack:
            clients, servers = await open_hosts(stack, count), await open_hosts(stack, count)
            for host in (*clients, *servers) if complete else ():
                await stack.enter_async_context(open_node(host))
                pubsub = await stack.enter_async_context(open_pubsub(host))
                await pubsub.subscribe(TOPIC)
            yield [partial(connect, client, server) for client, server in zip(clients, servers, strict=True)]

    @asynccontextmanager
    async def open_pair(self) -> AsyncGenerator[Pair]:
        async with open_host() as client, open_host() as server:
            server.set_stream_handler(ECHO, echo)
            server.set_stream_handler(DRAIN, drain)
            await connect(client, server)
            yield StockPair(client, server.get_id())

    @asynccontextmanager
    async def open_mesh(self, count: int) -> AsyncGenerator[Mesh]:
        async with AsyncExitStack() as stack:
            hosts = await open_hosts(stack, count)
            pubsubs = [await stack.enter_async_context(open_pubsub(host)) for host in hosts]
            for left, right in combinations(hosts, 2):
                await dial(left, right)
            _, *subscriptions = [await pubsub.subscribe(TOPIC) for pubsub in pubsubs]
            nursery = await stack.enter_async_context(trio.open_nursery())
            yield StockMesh(pubsubs[0], subscriptions, nursery)
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def open_swarm(self, count: int) -> AsyncGenerator[Swarm]:
        async with AsyncExitStack() as stack:
            hosts = await open_hosts(stack, count + 1)
            nodes = [await stack.enter_async_context(open_node(host)) for host in hosts]
            await join_all(partial(dial, host, hosts[0]) for host in hosts[1:-1])
            for node in nodes[1:-1]:
                await node.add_peer(hosts[0].get_id())
            yield StockSwarm(hosts, nodes)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    run_worker(Stock())
