"""The workloads of `network.py` over `aci_p2p.network.libp2p`. Gossip, DHT and identify are always on."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import combinations, count
from typing import Final

import trio

from aci_p2p.network import Network, Stream
from aci_p2p.network.libp2p import open_libp2p_network
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.validation import ACCEPTED
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

ECHO: Final = "/bench/echo/1"
DRAIN: Final = "/bench/drain/1"
TOPIC: Final = "bench/offers"

_numbers = count(1)


def open_host() -> AbstractAsyncContextManager[Network]:
    """A host on loopback that keeps any DHT record."""
    key = KeyPair(next(_numbers).to_bytes(32))
    return open_libp2p_network(key, record_validator=lambda _key, _value: None, record_selector=lambda _key, _values: 0)


async def open_hosts(stack: AsyncExitStack, number: int) -> list[Network]:
    """So many of them."""
    return [await stack.enter_async_context(open_host()) for _ in range(number)]


async def echo(stream: Stream) -> None:
    """Send back every frame."""
    while True:
        await stream.send(await stream.receive())


async def drain(stream: Stream) -> None:
    """Say when a transfer was read."""
    while True:
        for _ in range(CHUNKS):
            await stream.receive()
        await stream.send(b"read")


class OurPair(Pair):
    def __init__(self, client: Network, server: NodeId) -> None:
        self._client = client
        self._server = server

    @asynccontextmanager
    async def open_requests(self) -> AsyncGenerator[Step]:
        payload = bytes(PAYLOAD_BYTES)
        async with self._client.open_stream(self._server, ECHO) as stream:

            async def request() -> None:
                await stream.send(payload)
                await stream.receive()

            yield request

    @asynccontextmanager
    async def open_bulk(self) -> AsyncGenerator[Step]:
        chunk = bytes(CHUNK_BYTES)
        async with self._client.open_stream(self._server, DRAIN) as stream:

            async def transfer() -> None:
                for _ in range(CHUNKS):
                    await stream.send(chunk)
                await stream.receive()

            yield transfer


class OurMesh(Mesh):
    def __init__(self, publisher: Network, others: list[Network]) -> None:
        self._publisher = publisher
        self._others = others

    async def publish(self, data: bytes) -> None:
        await self._publisher.publish(TOPIC, data)

    def received(self) -> int:
        return min(other.statistics().gossip_accepted for other in self._others)


class OurSwarm(Swarm):
    def __init__(self, nodes: list[Network], newcomer: Network) -> None:
        self._nodes = nodes
        self._newcomer = newcomer

    def _owner(self, number: int) -> Network:
        return self._nodes[number % len(self._nodes)]

    async def announce(self, number: int) -> None:
        await self._owner(number).provide(key_of(number))
        await self._owner(number).put_record(*record_of(number))

    async def join(self) -> None:
        await self._newcomer.connect(self._nodes[0].addresses[0])

    async def find_provider(self, number: int) -> bool:
        return self._owner(number).node_id in await self._newcomer.find_providers(key_of(number), 1)

    async def find_record(self, number: int) -> bool:
        key, value = record_of(number)
        return await self._newcomer.get_record(key) == value


async def connect(client: Network, server: Network) -> None:
    """Connect, and wait until the server is identified."""
    await client.connect(server.addresses[0])
    while not client.connections()[0].agent:  # noqa: ASYNC110 - there is no event
        await trio.sleep(POLL_S)


class Ours(Library):
    @asynccontextmanager
    async def open_pairs(self, count: int, *, complete: bool = False) -> AsyncGenerator[list[Step]]:
        async with AsyncExitStack() as stack:
            clients, servers = await open_hosts(stack, count), await open_hosts(stack, count)
            for host in (*clients, *servers) if complete else ():
                await stack.enter_async_context(host.subscribe(TOPIC, lambda _peer, _data: ACCEPTED, capacity=1))
            yield [partial(connect, client, server) for client, server in zip(clients, servers, strict=True)]

    @asynccontextmanager
    async def open_pair(self) -> AsyncGenerator[Pair]:
        async with open_host() as client, open_host() as server:
            with server.serve(ECHO, echo), server.serve(DRAIN, drain):
                await connect(client, server)
                yield OurPair(client, server.node_id)

    @asynccontextmanager
    async def open_mesh(self, count: int) -> AsyncGenerator[Mesh]:
        async with AsyncExitStack() as stack:
            hosts = await open_hosts(stack, count)
            for left, right in combinations(hosts, 2):
                await left.connect(right.addresses[0])
            for host in hosts:
                await stack.enter_async_context(host.subscribe(TOPIC, lambda _peer, _data: ACCEPTED, capacity=1))
            yield OurMesh(hosts[0], hosts[1:])

    @asynccontextmanager
    async def open_swarm(self, count: int) -> AsyncGenerator[Swarm]:
        async with AsyncExitStack() as stack:
            newcomer, first, *others = await open_hosts(stack, count + 1)
            await join_all(partial(connect, host, first) for host in others)
            yield OurSwarm([first, *others], newcomer)


if __name__ == "__main__":
    run_worker(Ours())
