"""A stock py-libp2p host and ours speak the same protocols."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.ping import PingService
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.peer.peerinfo import info_from_p2p_addr  # pyright: ignore[reportMissingTypeStubs]
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service
from libp2p.utils.varint import read_varint_prefixed_bytes
from multiaddr import Multiaddr  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]

from aci_p2p.network import Stream
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.validation import ACCEPTED
from tests.network.driver import Opener, eventually

ECHO = TProtocol("/test/echo/1")
LOOPBACK = Multiaddr("/ip4/127.0.0.1/tcp/0")


@asynccontextmanager
async def open_stock_host() -> AsyncGenerator[IHost]:
    """A py-libp2p host with Noise and yamux, as it comes."""
    key = create_new_key_pair(b"stock".ljust(32))
    security = {NOISE: NoiseTransport(key, noise_privkey=create_x25519_key_pair().private_key)}
    host = new_host(key_pair=key, sec_opt=security, muxer_opt={TProtocol(YAMUX): Yamux})
    async with host.run(listen_addrs=[LOOPBACK]):
        yield host
        await host.close()


def node_id(host: IHost) -> NodeId:
    """The host's identity in our terms."""
    return NodeId.from_peer_id(host.get_id().to_bytes())


async def test_stock_host_dials_us(open_libp2p: Opener) -> None:
    async def echo(stream: Stream) -> None:
        await stream.send(await stream.receive())

    async with open_libp2p(1) as network, open_stock_host() as host:
        await host.connect(info_from_p2p_addr(Multiaddr(network.addresses[0])))
        with network.serve(ECHO, echo):
            stream = await host.new_stream(host.get_connected_peers()[0], [ECHO])
            await stream.write(b"\x05hello")
            assert await read_varint_prefixed_bytes(stream) == b"hello"
        assert list(network.peers) == [node_id(host)]


async def test_we_dial_a_stock_host(open_libp2p: Opener) -> None:
    async def echo(stream: INetStream) -> None:
        await stream.write(b"\xe0\x5d" + (await read_varint_prefixed_bytes(stream)))
        await stream.close()

    async with open_libp2p(1) as network, open_stock_host() as host:
        host.set_stream_handler(ECHO, echo)
        peer = await network.connect(str(host.get_addrs()[0]))
        async with network.open_stream(peer, ECHO) as stream:
            await stream.send(b"x" * 12_000)
            assert await stream.receive() == b"x" * 12_000


async def test_stock_host_identifies_us(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as network, open_stock_host() as host:
        await host.connect(info_from_p2p_addr(Multiaddr(network.addresses[0])))
        stream = await host.new_stream(host.get_connected_peers()[0], [TProtocol("/ipfs/id/1.0.0")])
        identity = Identify.FromString(await read_varint_prefixed_bytes(stream))
        assert {"/meshsub/1.1.0", "/aci/kad/1.0.0"} <= set(identity.protocols)
        addresses = [f"{Multiaddr(raw)}/p2p/{network.node_id}" for raw in identity.listen_addrs]
        assert addresses == list(network.addresses)


async def test_stock_host_pings_us(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as network, open_stock_host() as host:
        await host.connect(info_from_p2p_addr(Multiaddr(network.addresses[0])))
        times = await PingService(host).ping(host.get_connected_peers()[0], 3)
        assert len(times) == 3


async def test_we_know_what_a_stock_host_is(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as network, open_stock_host() as host:
        await network.connect(str(host.get_addrs()[0]).split("/p2p/")[0])
        await eventually(lambda: "libp2p" in network.connections()[0].agent)
        assert network.connections()[0].round_trip_ms is not None


async def test_gossip_reaches_a_stock_host(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as network, open_stock_host() as host:
        router = GossipSub([TProtocol("/meshsub/1.1.0")], degree=6, degree_low=4, degree_high=12, heartbeat_interval=1)
        pubsub = Pubsub(host, router, strict_signing=False)
        async with background_trio_service(pubsub), background_trio_service(router):
            await pubsub.wait_until_ready()
            stock = await pubsub.subscribe("test/offers")
            async with network.subscribe("test/offers", lambda _peer, _data: ACCEPTED, capacity=8):
                await network.connect(str(host.get_addrs()[0]))
                await eventually(lambda: node_id(host) in network.topic_peers("test/offers"))
                await network.publish("test/offers", b"hello")
                with trio.fail_after(5):
                    assert (await stock.get()).data == b"hello"


async def test_message_with_an_author_is_rejected(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as network, open_stock_host() as host:
        router = GossipSub([TProtocol("/meshsub/1.1.0")], degree=6, degree_low=4, degree_high=12, heartbeat_interval=1)
        pubsub = Pubsub(host, router, strict_signing=False)
        async with background_trio_service(pubsub), background_trio_service(router):
            await pubsub.wait_until_ready()
            async with network.subscribe("test/offers", lambda _peer, _data: ACCEPTED, capacity=8):
                await network.connect(str(host.get_addrs()[0]))
                with trio.fail_after(5):
                    while not network.statistics().gossip_refused:
                        await pubsub.publish("test/offers", b"signed and numbered")
                        await trio.sleep(0.05)
        assert network.statistics().gossip_refused == {"malformed": 1}


pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
