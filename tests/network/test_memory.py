"""What only the in-memory implementation has: latency in virtual time, cut cables, and runs that repeat."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.network import PeerUnreachable, StreamClosed
from aci_p2p.network.delivery import GossipJournal, SeenCache
from aci_p2p.network.limits import (
    MAX_KNOWN_PEERS,
    MAX_REJECTS_PER_MINUTE,
    MAX_SEEN,
    PROVIDER_SECONDS,
    REJECT_WINDOW_SECONDS,
    SEEN_SECONDS,
)
from aci_p2p.network.memory import MemoryHub
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.validation import ACCEPTED, Decision, Reason, Validation
from tests.network.driver import (
    ECHO,
    TOPIC,
    Opener,
    echo,
    make_key,
    open_on,
)

LATENCY = 0.25
REJECTED = Validation(Decision.REJECT, Reason.MALFORMED)


@pytest.fixture
def hub() -> MemoryHub:
    """A hub on which everything takes a while."""
    return MemoryHub(latency=LATENCY)


def accept(_forwarder: NodeId, _data: bytes) -> Validation:
    """Everything is fine."""
    return ACCEPTED


async def test_addresses_are_numbered(open_memory: Opener) -> None:
    async with open_memory(1) as a, open_memory(2) as b:
        assert list(a.addresses) == [f"/memory/1/p2p/{a.node_id}"]
        assert list(b.addresses) == [f"/memory/2/p2p/{b.node_id}"]


async def test_one_endpoint_a_key(open_memory: Opener) -> None:
    async with open_memory(1):
        with pytest.raises(LocalError):
            async with open_memory(1):
                pass
    async with open_memory(1):
        pass


async def test_frames_take_the_latency(open_memory: Opener, autojump_clock: MockClock) -> None:
    async with open_memory(1) as a, open_memory(2) as b:
        await a.connect(b.addresses[0])
        with b.serve(ECHO, echo):
            async with a.open_stream(b.node_id, ECHO) as stream:
                await stream.send(b"hello")
                await stream.receive()
                started = trio.current_time()
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"
                assert trio.current_time() - started == pytest.approx(2 * LATENCY)


async def test_gossip_takes_the_latency_of_each_hop(open_memory: Opener, autojump_clock: MockClock) -> None:
    async with (
        open_memory(1) as a,
        open_memory(2) as b,
        open_memory(3) as c,
        b.subscribe(TOPIC, accept, capacity=8),
        c.subscribe(TOPIC, accept, capacity=8) as subscription,
    ):
        await a.connect(b.addresses[0])
        await b.connect(c.addresses[0])
        started = trio.current_time()
        await a.publish(TOPIC, b"hello")
        await subscription.receive()
        assert trio.current_time() - started == pytest.approx(2 * LATENCY)


async def test_peer_that_is_cut_off(hub: MemoryHub, open_memory: Opener, autojump_clock: MockClock) -> None:
    async with open_memory(1) as a, open_memory(2) as b, open_memory(3) as c:
        await a.connect(b.addresses[0])
        with b.serve(ECHO, echo):
            async with a.open_stream(b.node_id, ECHO) as stream:
                hub.cut_off(b.node_id)
                with pytest.raises(StreamClosed):
                    await stream.receive()
        assert not a.peers
        assert not b.peers
        for dialler, address in ((a, b.addresses[0]), (b, c.addresses[0])):
            with pytest.raises(PeerUnreachable):
                await dialler.connect(address)
        hub.restore(b.node_id)
        await a.connect(b.addresses[0])
        assert list(b.peers) == [a.node_id]


async def test_what_is_on_its_way_when_the_cable_is_cut_is_lost(
    hub: MemoryHub, open_memory: Opener, autojump_clock: MockClock
) -> None:
    async with open_memory(1) as a, open_memory(2) as b, b.subscribe(TOPIC, accept, capacity=8):
        await a.connect(b.addresses[0])
        await a.publish(TOPIC, b"in flight")
        hub.cut_off(a.node_id)
        await trio.sleep(10)
        assert b.statistics().gossip_accepted == 0


async def test_lost_connection_can_be_made_again(
    hub: MemoryHub, open_memory: Opener, autojump_clock: MockClock
) -> None:
    async with open_memory(1) as a, open_memory(2) as b:
        await a.connect(b.addresses[0])
        hub.disconnect(a.node_id, b.node_id)
        assert not a.peers
        assert not b.peers
        with b.serve(ECHO, echo):
            async with a.open_stream(b.node_id, ECHO) as stream:
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"


async def test_announcement_expires(open_memory: Opener, autojump_clock: MockClock) -> None:
    async with open_memory(1) as a, open_memory(2) as b:
        await a.connect(b.addresses[0])
        await b.provide(bytes(32))
        assert list(await a.find_providers(bytes(32), 5)) == [b.node_id]
        await trio.sleep(PROVIDER_SECONDS)
        assert list(await a.find_providers(bytes(32), 5)) == []


def test_runs_repeat() -> None:
    async def run() -> list[tuple[float, bytes]]:
        hub = MemoryHub(latency=LATENCY)
        arrivals: list[tuple[float, bytes]] = []

        def note(_forwarder: NodeId, data: bytes) -> Validation:
            arrivals.append((trio.current_time(), data))
            return ACCEPTED

        async with (
            open_on(hub, 1) as a,
            open_on(hub, 2) as b,
            open_on(hub, 3) as c,
            c.subscribe(TOPIC, note, capacity=100),
            b.subscribe(TOPIC, accept, capacity=100),
        ):
            await c.connect(a.addresses[0])
            await c.connect(b.addresses[0])
            await a.connect(b.addresses[0])
            for number in range(20):
                await a.publish(TOPIC, b"%d" % number)
                await trio.sleep(0.01)
            await trio.sleep(1)
        return arrivals

    first, second = (trio.run(run, clock=MockClock(autojump_threshold=0)) for _ in range(2))
    assert len(first) == 20
    assert first == second


def test_seen_messages_are_forgotten_in_time_and_in_number() -> None:
    seen = SeenCache()
    assert seen.add(b"first", 0.0)
    assert not seen.add(b"first", SEEN_SECONDS - 1)
    assert seen.add(b"first", SEEN_SECONDS)
    for number in range(MAX_SEEN + 1):
        seen.add(number.to_bytes(4), SEEN_SECONDS)
    assert b"first" not in seen
    assert (MAX_SEEN).to_bytes(4) in seen


async def test_rejects_are_counted_by_the_minute(autojump_clock: MockClock) -> None:
    journal, peer = GossipJournal(), make_key(1).node_id
    for _ in range(3):
        assert not any(journal.refuse(peer, REJECTED) for _ in range(MAX_REJECTS_PER_MINUTE - 1))
        await trio.sleep(REJECT_WINDOW_SECONDS + 1)
    assert [journal.refuse(peer, REJECTED) for _ in range(MAX_REJECTS_PER_MINUTE + 1)][-2:] == [True, True]
    assert journal.refused["malformed"] == 4 * MAX_REJECTS_PER_MINUTE - 2


async def test_tallies_of_rejects_are_bounded() -> None:
    journal = GossipJournal()
    for number in range(MAX_KNOWN_PEERS + 10):
        journal.refuse(NodeId(number.to_bytes(32)), REJECTED)
    assert len(journal._rejects) == MAX_KNOWN_PEERS
