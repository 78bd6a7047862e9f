"""A js-libp2p node and ours are peers of one network, whoever dials: as anyone's second implementation would be."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest
import trio

from aci_p2p.clock import system_clock
from aci_p2p.dht import node_key
from aci_p2p.network import Network, Stream
from aci_p2p.network.libp2p import yamux
from aci_p2p.protocol.publications import NodeRecord
from tests.interop.conftest import OpenTrader
from tests.interop.driver import ECHO, MODEL, Gossip, JsNode, Trader, eventually, until

pytestmark = [pytest.mark.interop, pytest.mark.slow]

Connect = Callable[[Network], Awaitable[None]]
"""Connects a node of ours with the js node."""
DIGEST = hashlib.sha256(b"a model").digest()


@pytest.fixture(params=["we dial", "js dials"])
def connect(request: pytest.FixtureRequest, js: JsNode) -> Connect:
    """Connects in each direction in turn, and waits until both have identified each other."""

    async def connect_one(network: Network) -> None:
        async def is_identified() -> bool:
            return "/aci/kad/1.0.0" in (await js("identify", peer=str(network.node_id)))["protocols"]

        if request.param == "we dial":
            assert await network.connect(js.address) == js.peer
        else:
            await js("dial", address=network.addresses[0])
        await eventually(lambda: js.peer in network.peers)
        await until(is_identified)

    return connect_one


@pytest.fixture
async def ours(open_trader: OpenTrader) -> AsyncGenerator[Trader]:
    """A node of ours."""
    async with open_trader(1) as trader:
        yield trader


async def subscribe(js: JsNode, *traders: Trader) -> str:
    """Let the js node join the offers' topic and wait until all of its neighbours know; returns the topic."""
    topic = traders[0].market.offer_topic(MODEL)

    async def all_know() -> bool:
        subscribers = (await js("subscribers", topic=topic))["peers"]
        return len(subscribers) == len(traders) and all(js.peer in one.network.topic_peers(topic) for one in traders)

    await js("subscribe", topic=topic)
    await until(all_know)
    return topic


async def publish(js: JsNode, topic: str, data: bytes) -> None:
    """Let the js node broadcast a message."""
    assert (await js("publish", topic=topic, data=data.hex()))["peers"]


async def test_identify(js: JsNode, ours: Trader, connect: Connect) -> None:
    await connect(ours.network)
    said = await js("identify", peer=str(ours.network.node_id))
    assert said["agent"].startswith("aci-p2p")
    assert {"/ipfs/id/1.0.0", "/ipfs/ping/1.0.0", "/meshsub/1.1.0", "/aci/kad/1.0.0"} <= set(said["protocols"])
    assert [f"{address}/p2p/{ours.network.node_id}" for address in said["addresses"]] == list(ours.network.addresses)
    await eventually(lambda: ours.network.connections()[0].agent.startswith("js-libp2p"))


async def test_ping(js: JsNode, ours: Trader, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yamux, "KEEPALIVE_SECONDS", 0.1)
    await connect(ours.network)
    assert (await js("ping", peer=str(ours.network.node_id)))["ms"] >= 0
    # Ours are yamux's.
    await eventually(lambda: ours.network.connections()[0].round_trip_ms is not None)


async def test_streams(js: JsNode, ours: Trader, connect: Connect) -> None:
    async def echo(stream: Stream) -> None:
        await stream.send((await stream.receive())[::-1])

    await connect(ours.network)
    # More than a receive window each way.
    frame = bytes(range(256)) * 2000
    async with ours.network.open_stream(js.peer, ECHO) as stream:
        for message in (b"one", b"", frame):
            await stream.send(message)
            assert await stream.receive() == message
    with ours.network.serve(ECHO, echo):
        answer = await js("echo", peer=str(ours.network.node_id), data=frame.hex())
    assert bytes.fromhex(answer["data"]) == frame[::-1]


async def test_gossip(js: JsNode, ours: Trader, connect: Connect) -> None:
    await connect(ours.network)
    topic = await subscribe(js, ours)
    offer = ours.offer(1)
    await ours.market.publish_offer(offer)
    assert await js.heard() == Gossip(topic, offer.data)


async def test_gossip_from_js(js: JsNode, ours: Trader, connect: Connect, open_trader: OpenTrader) -> None:
    await connect(ours.network)
    topic = await subscribe(js, ours)
    async with open_trader(2) as author:
        offer = author.offer(1)
    await publish(js, topic, offer.data[:-1] + bytes([offer.data[-1] ^ 1]))
    await publish(js, topic, offer.data)
    with trio.fail_after(10):
        assert await ours.market.next_offer() == offer
    assert ours.network.statistics().gossip_refused == {"bad_signature": 1}


async def test_js_forwards_gossip(js: JsNode, ours: Trader, connect: Connect, open_trader: OpenTrader) -> None:
    async with open_trader(2) as other:
        await connect(ours.network)
        await other.network.connect(js.address)
        await subscribe(js, ours, other)
        offers = [ours.offer(number) for number in range(20)]
        for offer in offers:
            await ours.market.publish_offer(offer)
        with trio.fail_after(10):
            heard = [await other.market.next_offer() for _ in offers]
        assert sorted(offer.data for offer in heard) == sorted(offer.data for offer in offers)


async def test_we_forward_gossip_of_js(js: JsNode, ours: Trader, connect: Connect, open_trader: OpenTrader) -> None:
    async with open_trader(2) as other:
        await connect(ours.network)
        await other.network.connect(ours.network.addresses[0])
        topic = await subscribe(js, ours)
        await eventually(lambda: ours.network.node_id in other.network.topic_peers(topic))
        await eventually(lambda: other.network.node_id in ours.network.topic_peers(topic))
        offer = other.offer(1)
        await publish(js, topic, offer.data)
        await other.market.publish_offer(other.offer(2))
        with trio.fail_after(10):
            assert {(await ours.market.next_offer()).body.nonce_commitment[-1] for _ in range(2)} == {1, 2}
        assert (await js.heard()).topic == topic


def record(trader: Trader) -> tuple[str, bytes]:
    """A node's record of itself, and where it lies."""
    body = NodeRecord((), ("provider",), "aci-p2p/1")
    return node_key(trader.sealer.node_id), trader.sealer.seal(body, system_clock()).data


async def test_js_reads_and_writes_our_records(
    js: JsNode, ours: Trader, connect: Connect, open_trader: OpenTrader
) -> None:
    await connect(ours.network)
    key, value = record(ours)
    await ours.network.put_record(key, value)
    assert (await js("get", key=key))["values"] == [value.hex()]
    async with open_trader(2) as other:
        key, value = record(other)
    assert (await js("put", key=key, value=value.hex()))["peers"] == [str(ours.network.node_id)]
    assert await ours.network.get_record(key) == value
    assert (await js("put", key=key, value=value[:-1].hex()))["peers"] == []


async def test_js_keeps_our_records(js: JsNode, connect: Connect, open_trader: OpenTrader) -> None:
    async with open_trader(1) as author:
        await connect(author.network)
        key, value = record(author)
        await author.network.put_record(key, value)
    async with open_trader(2) as reader:
        await connect(reader.network)
        assert await reader.network.get_record(key) == value


async def test_js_finds_and_is_a_provider(js: JsNode, ours: Trader, connect: Connect) -> None:
    await connect(ours.network)
    await ours.network.provide(DIGEST)
    assert (await js("findProviders", digest=DIGEST.hex()))["peers"] == [str(ours.network.node_id)]
    assert (await js("provide", digest=DIGEST.hex()))["peers"] == [str(ours.network.node_id)]
    assert set(await ours.network.find_providers(DIGEST, 10)) == {ours.network.node_id, js.peer}


async def test_js_keeps_our_providers(js: JsNode, connect: Connect, open_trader: OpenTrader) -> None:
    async with open_trader(1) as provider:
        await connect(provider.network)
        await provider.network.provide(DIGEST)
    async with open_trader(2) as reader:
        await connect(reader.network)
        assert list(await reader.network.find_providers(DIGEST, 10)) == [provider.network.node_id]


async def test_we_find_a_peer_through_js(js: JsNode, ours: Trader, connect: Connect, open_trader: OpenTrader) -> None:
    await connect(ours.network)
    await ours.network.provide(DIGEST)
    async with open_trader(2) as other:
        await other.network.connect(js.address)
        assert list(await other.network.find_providers(DIGEST, 10)) == [ours.network.node_id]
        async with other.network.open_stream(ours.network.node_id, "/ipfs/ping/1.0.0"):
            assert ours.network.node_id in other.network.peers


async def test_js_finds_a_peer_through_us(js: JsNode, ours: Trader, connect: Connect, open_trader: OpenTrader) -> None:
    await connect(ours.network)
    async with open_trader(2) as other:
        address, _, peer = other.network.addresses[0].partition("/p2p/")

        async def finds() -> bool:
            return bool((await js("findPeer", peer=peer))["addresses"] == [address])

        await other.network.connect(ours.network.addresses[0])
        await until(finds)
        assert (await js("dial", address=address))["peer"] == peer


async def test_js_is_killed(js: JsNode, ours: Trader, connect: Connect, open_trader: OpenTrader) -> None:
    await connect(ours.network)
    await subscribe(js, ours)
    async with ours.network.open_stream(js.peer, ECHO) as stream:
        js.kill()
        await eventually(lambda: js.peer not in ours.network.peers)
        with pytest.raises(Exception, match="stream"):
            await stream.receive()
    async with open_trader(2) as other:
        await other.network.connect(ours.network.addresses[0])
        await eventually(lambda: ours.network.node_id in other.network.topic_peers(ours.market.offer_topic(MODEL)))
        offer = other.offer(1)
        await other.market.publish_offer(offer)
        with trio.fail_after(10):
            assert await ours.market.next_offer() == offer
    assert ours.network.statistics().handler_failures == 0
