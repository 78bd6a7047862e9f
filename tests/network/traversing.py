"""Hosts with NAT traversal on loopback, which do not look for their reachability but are told."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass

import trio

from aci_p2p.clock import system_clock
from aci_p2p.network.api import Reachability
from aci_p2p.network.config import NetworkConfig
from aci_p2p.network.libp2p import identify as identify_module
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.identify import Identify
from aci_p2p.network.libp2p.traversal import Traversal
from aci_p2p.network.libp2p.yamux import YamuxStream
from aci_p2p.protocol.identity import NodeId
from aci_p2p.tasks import open_background
from tests.network.driver import ECHO, eventually, make_key

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


async def echo_bytes(_peer: NodeId, stream: YamuxStream) -> None:
    """Send back what comes."""
    while True:
        await stream.write(await stream.read(1 << 16))


@dataclass(frozen=True, slots=True)
class Traversing:
    """A host and its way through NATs."""

    host: Host
    identify: Identify
    traversal: Traversal

    @property
    def id(self) -> NodeId:
        """Its identity."""
        return self.host.node_id

    async def connect(self, other: Traversing) -> None:
        """Dial another and wait until each knows what the other serves."""
        await self.host.dial(other.id, other.host.addresses)
        await eventually(lambda: self.identify.identity(other.id) and other.identify.identity(self.id))

    def relayed(self, other: Traversing) -> list[bool]:
        """Of each connection to another, whether it goes through a relay."""
        return [connection.relay is not None for connection in self.host.connections.of(other.id)]


@asynccontextmanager
async def open_traversing(
    number: int, *, listen: Sequence[str] = (LOOPBACK,), config: NetworkConfig | None = None
) -> AsyncGenerator[Traversing]:
    """A host for the block; it keeps reservations when it is told that it is PRIVATE."""
    key = make_key(number)
    config = config or NetworkConfig(hole_punching=False)
    async with open_background() as nursery:
        host = Host(key, nursery)
        identify = Identify(host, nursery)
        randomness = random.Random(number)  # noqa: S311 - the same choices in every run
        traversal = Traversal(host, identify, key, config, nursery=nursery, random=randomness, clock=system_clock)
        with ExitStack() as stack:
            stack.enter_context(host.serve(identify_module.PROTOCOL, identify.serve))
            stack.enter_context(host.serve(ECHO, echo_bytes))
            stack.enter_context(traversal.serving())
            for address in listen:
                await host.listen(TcpAddress.parse(address))
            nursery.start_soon(traversal.client.keep_reservations)
            nursery.start_soon(traversal.client.renew_circuits)
            yield Traversing(host, identify, traversal)


@asynccontextmanager
async def open_several(count: int) -> AsyncGenerator[list[Traversing]]:
    """Hosts that do not know each other."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_traversing(number)) for number in range(1, count + 1)]


async def reserve(private: Traversing, *relays: Traversing) -> None:
    """Have a host find out that others cannot reach it, and find its relays."""
    for relay in relays:
        await private.connect(relay)
    private.host.set_reachability(Reachability.PRIVATE)
    await eventually(lambda: len(private.traversal.client.reservations) == len(relays))


def circuits(private: Traversing) -> list[TcpAddress]:
    """The circuits that a host announces."""
    return [address for address in private.host.addresses if address.relay is not None]


async def exchange(host: Host, peer: NodeId, text: bytes = b"hello") -> None:
    """A new stream to a peer carries bytes both ways."""
    stream = await host.open_stream(peer, ECHO)
    try:
        await answered(stream, text)
    finally:
        stream.reset()


async def answered(stream: YamuxStream, text: bytes = b"hello") -> None:
    """An open stream carries bytes both ways."""
    with trio.fail_after(5):
        async with open_background() as nursery:
            # More than a window is read while it is written.
            nursery.start_soon(stream.write, text)
            assert await stream.read_exactly(len(text)) == text
