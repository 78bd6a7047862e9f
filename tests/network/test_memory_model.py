"""The in-memory network with an imagined internet between its endpoints: what a NetworkModel says is what happens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import pytest
import trio

from aci_p2p.network import Network, PeerUnreachable, Stream, StreamClosed, Subscription
from aci_p2p.network.api import Reachability
from aci_p2p.network.memory import MemoryHub
from aci_p2p.network.memory_endpoint import MemoryNetwork
from aci_p2p.network.memory_medium import DIAL_S, HANDSHAKE_TRIPS, INBOX_MESSAGES, KEEP_ALIVE_S, TURN_MESSAGES
from aci_p2p.network.model import Nat, NetworkModel, Place
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.validation import ACCEPTED, Validation
from tests.network.driver import ECHO, TOPIC, echo, make_key, open_on, wait_for_ever

STEADY = NetworkModel(one_way_ms=((10, 100), (100, 20)), jitter=0.0)


def accept(_forwarder: NodeId, _data: bytes) -> Validation:
    """Everything is fine."""
    return ACCEPTED


@asynccontextmanager
async def opened(hub: MemoryHub, places: Sequence[Place]) -> AsyncGenerator[list[Network]]:
    """Endpoints at these places; the first knows where the others are."""
    async with AsyncExitStack() as stack:
        networks: list[Network] = []
        for number, place in enumerate(places, 1):
            hub.place(make_key(number).node_id, place)
            networks.append(await stack.enter_async_context(open_on(hub, number)))
        for network in networks[1:]:
            networks[0].learn_addresses(network.node_id, network.addresses)
        yield networks


async def test_dials_and_frames_take_the_latency_between_regions(autojump_clock: object) -> None:
    hub = MemoryHub(model=STEADY)
    async with opened(hub, [Place(0), Place(1), Place(0)]) as (near, far, neighbour):
        began = trio.current_time()
        await near.connect(far.addresses[0])
        assert trio.current_time() - began == pytest.approx(HANDSHAKE_TRIPS * 0.1)
        with far.serve(ECHO, echo):
            async with near.open_stream(far.node_id, ECHO) as stream:
                await stream.send(b"hello")
                await stream.receive()
                began = trio.current_time()
                await stream.send(b"")
                await stream.receive()
                assert trio.current_time() - began == pytest.approx(0.2)
        assert near.connections()[0].round_trip_ms == pytest.approx(200)
        began = trio.current_time()
        await near.connect(neighbour.addresses[0])
        assert trio.current_time() - began == pytest.approx(HANDSHAKE_TRIPS * 0.01)


async def test_frames_take_bandwidth_and_stay_in_order(autojump_clock: object) -> None:
    hub = MemoryHub(model=NetworkModel(one_way_ms=((10,),), jitter=3.0, bandwidth=100_000))
    arrivals: list[tuple[float, bytes]] = []

    async with opened(hub, [Place(), Place()]) as (near, far):

        async def collect(stream: Stream) -> None:
            while True:
                frame = await stream.receive()
                arrivals.append((trio.current_time(), frame[:1]))

        with far.serve(ECHO, collect):
            async with near.open_stream(far.node_id, ECHO) as stream:
                began = trio.current_time()
                for number in range(10):
                    await stream.send(bytes([number]) * 10_000)
                await trio.sleep(5)
    assert [frame for _, frame in arrivals] == [bytes([number]) for number in range(10)]
    assert 1.0 < arrivals[-1][0] - began < 1.2


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (NetworkModel(loss=1.0), 0),
        (NetworkModel(duplication=1.0), 100),
        (NetworkModel(loss=0.5), 50),
    ],
    ids=["all lost", "twice", "half lost"],
)
async def test_gossip_is_lost_and_seen_once(autojump_clock: object, model: NetworkModel, expected: int) -> None:
    hub = MemoryHub(model=model)
    async with opened(hub, [Place(), Place()]) as (near, far), far.subscribe(TOPIC, accept, capacity=200):
        await near.connect(far.addresses[0])
        for number in range(100):
            await near.publish(TOPIC, bytes([number]))
        await trio.sleep(60)
        assert abs(far.statistics().gossip_accepted - expected) <= (0 if expected in {0, 100} else 20)


async def test_duplicates_arrive(autojump_clock: object) -> None:
    heard: list[str] = []

    def note(kind: str, _source: NodeId, _target: NodeId, _data: bytes) -> None:
        heard.append(kind)

    hub = MemoryHub(model=NetworkModel(duplication=1.0), note=note)
    async with opened(hub, [Place(), Place()]) as (near, far), far.subscribe(TOPIC, accept, capacity=8):
        await near.connect(far.addresses[0])
        await near.publish(TOPIC, b"hello")
        await trio.sleep(60)
    assert heard.count("gossip") == 2


@pytest.mark.parametrize("capacity", [8, 256, 4_096])
async def test_a_burst_is_lost_on_nobody_who_listens(autojump_clock: object, capacity: int) -> None:
    sent = [number.to_bytes(2) for number in range(1_000)]
    heard: list[bytes] = []
    turns_at: set[int] = set()

    async def listen(subscription: Subscription) -> None:
        while True:
            heard.append((await subscription.receive()).data)

    async def take_turns() -> None:
        await begun.wait()
        while len(heard) < len(sent):
            turns_at.add(arrived)
            await trio.lowlevel.checkpoint()

    arrived, begun = 0, trio.Event()

    def count(_forwarder: NodeId, _data: bytes) -> Validation:
        nonlocal arrived
        arrived += 1
        begun.set()
        return ACCEPTED

    hub = MemoryHub(model=STEADY)
    async with (
        opened(hub, [Place(), Place()]) as (near, far),
        near.subscribe(TOPIC, accept, capacity=8),
        far.subscribe(TOPIC, count, capacity=capacity) as subscription,
        trio.open_nursery() as nursery,
    ):
        await near.connect(far.addresses[0])
        nursery.start_soon(listen, subscription)
        for data in sent:
            await near.publish(TOPIC, data)
        with trio.fail_after(60):
            await take_turns()
        nursery.cancel_scope.cancel()
    assert heard == sent
    # Others have their turns meanwhile.
    assert len(turns_at) >= len(sent) // TURN_MESSAGES // 2


async def test_gossip_does_not_go_back(autojump_clock: object) -> None:
    ways: list[tuple[NodeId, NodeId]] = []

    def note(kind: str, source: NodeId, target: NodeId, _data: bytes) -> None:
        if kind == "gossip":
            ways.append((source, target))

    hub = MemoryHub(model=STEADY, note=note)
    async with opened(hub, [Place()] * 3) as (a, b, c):
        await a.connect(b.addresses[0])
        await b.connect(c.addresses[0])
        async with (
            a.subscribe(TOPIC, accept, capacity=8),
            b.subscribe(TOPIC, accept, capacity=8),
            c.subscribe(TOPIC, accept, capacity=8),
        ):
            await a.publish(TOPIC, b"hello")
            await trio.sleep(1)
    assert ways == [(a.node_id, b.node_id), (b.node_id, c.node_id)]


async def test_gossip_overtakes_gossip(autojump_clock: object) -> None:
    hub = MemoryHub(model=NetworkModel(reordering=0.5), random=Random(1))  # noqa: S311
    arrived: list[bytes] = []

    def note(_forwarder: NodeId, data: bytes) -> Validation:
        arrived.append(data)
        return ACCEPTED

    async with opened(hub, [Place(), Place()]) as (near, far), far.subscribe(TOPIC, note, capacity=200):
        await near.connect(far.addresses[0])
        sent = [bytes([number]) for number in range(100)]
        for data in sent:
            await near.publish(TOPIC, data)
        await trio.sleep(60)
    assert sorted(arrived) == sent
    assert arrived != sent


async def test_messages_on_their_way_are_bounded(autojump_clock: object) -> None:
    hub = MemoryHub(model=STEADY)
    async with opened(hub, [Place(), Place()]) as (near, far), far.subscribe(TOPIC, accept, capacity=8):
        await near.connect(far.addresses[0])
        assert isinstance(near, MemoryNetwork)
        for number in range(INBOX_MESSAGES + 10):
            near._forward(TOPIC, number.to_bytes(2), near.node_id)
        assert far.statistics().gossip_dropped == 10


# Partitions.


async def test_short_partition_delays_what_is_sent_meanwhile(autojump_clock: object) -> None:
    hub = MemoryHub(model=STEADY)
    async with opened(hub, [Place(), Place()]) as (near, far):
        with far.serve(ECHO, echo):
            async with near.open_stream(far.node_id, ECHO) as stream:
                hub.partition([near.node_id])
                await stream.send(b"are you there?")
                with trio.move_on_after(KEEP_ALIVE_S - 1) as scope:
                    await stream.receive()
                assert scope.cancelled_caught
                hub.heal()
                began = trio.current_time()
                assert await stream.receive() == b"are you there?"
                assert trio.current_time() - began == pytest.approx(0.02, abs=0.001)
                await trio.sleep(KEEP_ALIVE_S)
                await stream.send(b"")
                assert not await stream.receive()


async def test_long_partition_loses_connections(autojump_clock: object) -> None:
    hub = MemoryHub(model=STEADY)
    async with opened(hub, [Place(), Place(), Place()]) as (a, b, c):
        for peer in (b, c):
            await a.connect(peer.addresses[0])
        with b.serve(ECHO, wait_for_ever):
            async with a.open_stream(b.node_id, ECHO) as stream:
                hub.partition([a.node_id, c.node_id], [b.node_id])
                began = trio.current_time()
                with pytest.raises(StreamClosed):
                    await stream.receive()
                assert trio.current_time() - began == pytest.approx(KEEP_ALIVE_S)
        assert (list(a.peers), list(b.peers)) == ([c.node_id], [])
        with pytest.raises(PeerUnreachable):
            await a.connect(b.addresses[0])
        hub.heal()
        await a.connect(b.addresses[0])


async def test_each_partition_has_its_time(autojump_clock: object) -> None:
    hub = MemoryHub(model=STEADY)
    async with opened(hub, [Place(), Place()]) as (a, b):
        await a.connect(b.addresses[0])
        for _ in range(3):
            hub.partition([a.node_id])
            await trio.sleep(KEEP_ALIVE_S * 0.8)
            hub.heal()
        assert list(a.peers) == [b.node_id]


async def test_dial_into_a_partition_takes_its_time(autojump_clock: object) -> None:
    hub = MemoryHub(model=STEADY)
    async with opened(hub, [Place(), Place()]) as (a, b):
        hub.partition([a.node_id])
        began = trio.current_time()
        with pytest.raises(PeerUnreachable):
            await a.connect(b.addresses[0])
        assert trio.current_time() - began == pytest.approx(DIAL_S)
        assert await a.get_record("/aci/nothing") is None


async def test_stream_that_is_opened_into_a_partition_waits(autojump_clock: object) -> None:
    hub = MemoryHub(model=STEADY)
    async with opened(hub, [Place(), Place()]) as (a, b):
        await a.connect(b.addresses[0])
        with b.serve(ECHO, echo):
            hub.partition([a.node_id])
            with trio.move_on_after(KEEP_ALIVE_S / 2) as scope:
                async with a.open_stream(b.node_id, ECHO):
                    pass
            assert scope.cancelled_caught
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_heal_soon, hub)
                async with a.open_stream(b.node_id, ECHO) as stream:
                    await stream.send(b"at last")
                    assert await stream.receive() == b"at last"
            hub.partition([a.node_id])
            with pytest.raises(PeerUnreachable, match="lost"):
                async with a.open_stream(b.node_id, ECHO):
                    pass


async def _heal_soon(hub: MemoryHub) -> None:
    await trio.sleep(1)
    hub.heal()


async def test_closing_is_not_felt_through_a_partition(autojump_clock: object) -> None:
    hub = MemoryHub(model=STEADY)
    ended = trio.Event()

    async def wait_for_end(stream: Stream) -> None:
        try:
            await stream.receive()
        finally:
            ended.set()

    async with opened(hub, [Place(), Place()]) as (a, b):
        with b.serve(ECHO, wait_for_end):
            async with a.open_stream(b.node_id, ECHO):
                await trio.sleep(1)
                hub.partition([a.node_id])
            await trio.sleep(KEEP_ALIVE_S / 2)
            assert not ended.is_set()
            hub.heal()
            await trio.sleep(1)
            assert ended.is_set()


async def test_gossip_does_not_pass_a_partition(autojump_clock: object) -> None:
    hub = MemoryHub(model=STEADY)
    async with opened(hub, [Place(), Place()]) as (a, b), b.subscribe(TOPIC, accept, capacity=8):
        await a.connect(b.addresses[0])
        hub.partition([a.node_id])
        await a.publish(TOPIC, b"does anybody hear me?")
        hub.heal()
        await trio.sleep(10)
        assert b.statistics().gossip_accepted == 0


async def test_who_left_during_a_partition_is_missed_at_its_end(autojump_clock: object) -> None:
    hub = MemoryHub(model=STEADY)
    async with opened(hub, [Place()]) as (a,):
        async with open_on(hub, 2) as b:
            await a.connect(b.addresses[0])
            hub.partition([a.node_id])
        assert list(a.peers) == [make_key(2).node_id]
        hub.heal()
        assert not a.peers


# NATs.


async def test_cone_nats_can_be_punched(autojump_clock: object) -> None:
    hub = MemoryHub(model=STEADY)
    async with opened(hub, [Place(0, Nat.CONE), Place(0, Nat.CONE)]) as (a, b):
        await a.connect(b.addresses[0])
        assert a.connections()[0].relay is None
        assert a.reachability is Reachability.PRIVATE


async def test_symmetric_nat_needs_a_relay(autojump_clock: object) -> None:
    hub = MemoryHub(model=STEADY)
    hidden = [Place(0, Nat.CONE), Place(0, Nat.SYMMETRIC)]
    async with opened(hub, hidden) as (a, b):
        with pytest.raises(PeerUnreachable, match="no relay"):
            await a.connect(b.addresses[0])
    async with opened(hub, [*hidden, Place(1)]) as (a, b, relay):
        assert relay.reachability is Reachability.PUBLIC
        await a.connect(b.addresses[0])
        assert [one.connections()[0].relay for one in (a, b)] == [relay.node_id] * 2
        assert [one.statistics().relayed for one in (a, b, relay)] == [1, 1, 0]
        assert relay.statistics().circuits == 1
        with b.serve(ECHO, echo), trio.fail_after(60):
            async with a.open_stream(b.node_id, ECHO) as stream:
                await stream.send(b"the long way")
                await stream.receive()
                began = trio.current_time()
                await stream.send(b"")
                await stream.receive()
                # There and back, each by way of the other region.
                assert trio.current_time() - began == pytest.approx(0.4)
                hub.cut_off(relay.node_id)
                with pytest.raises(StreamClosed):
                    await stream.receive()
        assert not a.peers
        assert not b.peers


async def test_gossip_takes_the_way_through_the_relay(autojump_clock: object) -> None:
    hub = MemoryHub(model=STEADY)
    places = [Place(0, Nat.SYMMETRIC), Place(0, Nat.SYMMETRIC), Place(1)]
    async with opened(hub, places) as (a, b, _), b.subscribe(TOPIC, accept, capacity=8) as subscription:
        await a.connect(b.addresses[0])
        began = trio.current_time()
        await a.publish(TOPIC, b"hello")
        await subscription.receive()
        assert trio.current_time() - began == pytest.approx(0.2, abs=0.001)


async def test_relay_behind_the_partition_is_of_no_use(autojump_clock: object) -> None:
    hub = MemoryHub(model=STEADY)
    places = [Place(0, Nat.SYMMETRIC), Place(0, Nat.SYMMETRIC), Place(1)]
    async with opened(hub, places) as (a, b, relay):
        await a.connect(b.addresses[0])
        hub.partition([relay.node_id])
        await trio.sleep(KEEP_ALIVE_S + 1)
        assert not a.peers
        with pytest.raises(PeerUnreachable):
            await a.connect(b.addresses[0])


def test_places_are_drawn_from_the_model() -> None:
    async def draw(seed: int) -> list[Place]:
        model = NetworkModel(cone_share=0.5, symmetric_share=0.2)
        hub = MemoryHub(model=model, random=Random(seed))  # noqa: S311
        async with AsyncExitStack() as stack:
            for number in range(1, 10):
                await stack.enter_async_context(open_on(hub, number))
        return list(hub.medium.places.values())

    first, again, other = trio.run(draw, 1), trio.run(draw, 1), trio.run(draw, 2)
    assert first == again != other
    assert {place.nat for place in first} == set(Nat)
