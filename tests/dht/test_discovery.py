"""Joining, announcing and finding over the in-memory network, in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.dht import BootstrapFailed, capability_key, node_key
from aci_p2p.dht.announcing import JITTER, REANNOUNCE_S
from aci_p2p.dht.discovery import PUBLISH_AT_ONCE, RECORD_LIFETIME_MS
from aci_p2p.dht.exchange import exchange_topic
from aci_p2p.dht.joining import DIAL_TIMEOUT_S
from aci_p2p.dht.search import LOOKUP_TIMEOUT_S, MAX_PROVIDERS
from aci_p2p.network.memory import MemoryHub
from aci_p2p.protocol.envelope import Sealer
from aci_p2p.protocol.errors import LocalError, ResourceError
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.publications import CapabilityRecord, NodeRecord
from tests.dht.driver import HOUR_S, OTHER_ROOT, ROOT, RULES, OpenPeers, clock, dead, open_peer
from tests.protocol.driver import NETWORK

# Joining.


async def test_joining_through_all_bootstrap_nodes(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_peer(hub, 1) as a, open_peer(hub, 2) as b, open_peer(hub, 3) as c:
        await c.discovery.join([b.address, a.address])
        assert set(c.network.peers) == {a.node_id, b.node_id}
        await c.discovery.join([])


async def test_joining_with_a_dead_bootstrap_node(autojump_clock: MockClock, hub: MemoryHub) -> None:
    for dead_first in (True, False):
        async with open_peer(hub, 1) as a, open_peer(hub, 2) as b:
            addresses = [a.address, dead(99)]
            await b.discovery.join(addresses[::-1] if dead_first else addresses)
            assert b.network.peers == (a.node_id,)


async def test_joining_when_all_bootstrap_nodes_are_dead(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_peer(hub, 1) as peer:
        addresses = [dead(98), dead(99)]
        with pytest.raises(BootstrapFailed) as caught:
            await peer.discovery.join(addresses)
        error = caught.value
        assert [address for address, _ in error.failures] == addresses
        for address, reason in error.failures:
            assert f"{address}: {reason.message}" in error.message
            assert "cannot be reached" in reason.message
        assert "\n" not in error.message
        assert error.message.startswith("no bootstrap node answers (")
        assert error.hint == "check the address, and that the node runs"


async def test_bootstrap_nodes_that_do_not_answer_are_waited_for_together(
    autojump_clock: MockClock, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(_address: str) -> NodeId:
        await trio.sleep_forever()

    async with open_peer(hub, 1) as peer:
        monkeypatch.setattr(peer.network, "connect", hang)
        with pytest.raises(BootstrapFailed, match=r": no answer within 5 s; .*: no answer within 5 s\)"):
            await peer.discovery.join([dead(98), dead(99)])
        assert trio.current_time() == DIAL_TIMEOUT_S


async def test_an_address_that_is_none_is_named(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_peer(hub, 1) as a, open_peer(hub, 2) as b:
        for addresses in ([a.address, "nowhere"], ["nowhere"], [dead(99), "nowhere"]):
            with pytest.raises(LocalError, match="'nowhere' is not"):
                await b.discovery.join(addresses)


async def test_a_node_that_was_heard_of_is_dialled_where_the_network_believes_it_to_be(
    autojump_clock: MockClock, open_peers: OpenPeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record may say anything, and who wrote it be anywhere."""
    async with open_peers(2) as (neighbour, ours):
        tried: list[str] = []

        async def connect(address: str) -> NodeId:
            await trio.lowlevel.checkpoint()
            tried.append(address)
            msg = "not there"
            raise ResourceError(msg)

        monkeypatch.setattr(ours.network, "connect", connect)
        sealer = Sealer(KeyPair(bytes([77]) * 32), NETWORK)
        record = NodeRecord((dead(77), "/memory/9"), (), "aci-p2p/1")
        await neighbour.network.publish(exchange_topic(NETWORK), sealer.seal(record, clock()).data)
        await trio.sleep(2)
        assert set(tried) == {f"/p2p/{sealer.node_id}"}


# Finding.


async def test_a_provider_is_found_and_connected(autojump_clock: MockClock, open_peers: OpenPeers) -> None:
    async with open_peers(3) as (_, provider, consumer):
        await provider.announce(provider.capability(), provider.capability(OTHER_ROOT))
        assert provider.node_id not in consumer.network.peers
        (record,) = await consumer.discovery.find_providers(ROOT)
        assert (record.sender, record.body) == (provider.node_id, provider.capability())
        assert provider.node_id in consumer.network.peers
        assert await consumer.found(OTHER_ROOT) == [provider.node_id]
        assert await consumer.found(bytes(32)) == []


async def test_the_addresses_of_a_record_are_learnt(
    autojump_clock: MockClock, open_peers: OpenPeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For when the connection is lost."""
    async with open_peers(3) as (_, provider, consumer):
        addresses = (provider.address, f"/memory/99/p2p/{provider.node_id}")
        await provider.announce(provider.capability(addresses=addresses))
        learnt: list[tuple[NodeId, Sequence[str]]] = []

        def learn(node: NodeId, addresses: Sequence[str]) -> None:
            learnt.append((node, addresses))

        monkeypatch.setattr(consumer.network, "learn_addresses", learn)
        assert await consumer.found() == [provider.node_id]
        assert (provider.node_id, addresses) in learnt


async def test_a_node_record_is_announced_too(autojump_clock: MockClock, open_peers: OpenPeers) -> None:
    async with open_peers(2) as (a, b):
        await b.announce()
        key = node_key(b.node_id)
        value = await a.network.get_record(key)
        assert value is not None
        record = RULES.open(key, value)
        assert record.body == NodeRecord((b.address,), (), "aci-p2p/1")
        assert record.header.expires_at - record.header.issued_at == RECORD_LIFETIME_MS


async def test_a_provider_does_not_find_itself(autojump_clock: MockClock, open_peers: OpenPeers) -> None:
    async with open_peers(3) as (_, a, b):
        await a.announce(a.capability())
        assert await a.found() == []
        await b.announce(b.capability())
        assert await a.found() == [b.node_id]
        assert await b.found() == [a.node_id]


async def test_no_more_providers_than_asked_for(autojump_clock: MockClock, open_peers: OpenPeers) -> None:
    async with open_peers(6) as (consumer, *providers):
        for provider in providers:
            await provider.announce(provider.capability())
        nodes = {provider.node_id for provider in providers}
        assert set(await consumer.found()) == nodes
        some = await consumer.found(limit=3)
        assert len(some) == 3
        assert set(some) < nodes
        assert len(nodes) <= MAX_PROVIDERS


async def test_who_announces_without_a_record_is_not_found(autojump_clock: MockClock, open_peers: OpenPeers) -> None:
    async with open_peers(3) as (consumer, liar, provider):
        await liar.network.provide(ROOT)
        await provider.announce(provider.capability())
        assert await consumer.found() == [provider.node_id]


async def test_a_record_that_does_not_hold_is_ignored(
    autojump_clock: MockClock, open_peers: OpenPeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the nodes answer that keep the records."""
    async with open_peers(4) as (consumer, provider, victim, stranger):
        for peer in (provider, victim):
            await peer.announce(peer.capability())
        honest = consumer.network.get_record
        seal = stranger.sealer.seal
        answers: list[bytes] = [
            b"",
            b"\xff" * 9_000,
            seal(stranger.capability(), clock()).data,
            victim.sealer.seal(victim.capability(OTHER_ROOT), clock()).data,
            victim.sealer.seal(victim.capability(), clock() - RECORD_LIFETIME_MS).data,
            Sealer(victim.sealer._key, "aci-other").seal(victim.capability(), clock()).data,
            victim.sealer.seal(NodeRecord((), (), ""), clock()).data,
        ]

        async def get_record(key: str) -> bytes | None:
            return answers[0] if key == capability_key(ROOT, victim.node_id) else await honest(key)

        monkeypatch.setattr(consumer.network, "get_record", get_record)
        while answers:
            assert await consumer.found() == [provider.node_id]
            del answers[0]
        monkeypatch.undo()
        assert set(await consumer.found()) == {provider.node_id, victim.node_id}


async def test_a_provider_that_is_gone_hides_nobody(
    autojump_clock: MockClock, open_peers: OpenPeers, hub: MemoryHub
) -> None:
    async with open_peers(5) as (_, consumer, a, gone, b):
        for provider in (a, gone, b):
            await provider.announce(provider.capability())
        hub.cut_off(gone.node_id)
        # Its record holds; whether it can be reached is another matter.
        assert set(await consumer.found()) == {a.node_id, gone.node_id, b.node_id}
        assert gone.node_id not in consumer.network.peers


@pytest.mark.parametrize("slow", ["connect", "get_record"])
async def test_a_provider_that_is_slow_hides_nobody(
    autojump_clock: MockClock, open_peers: OpenPeers, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    async with open_peers(5) as (_, consumer, a, tarpit, b):
        addresses = [tarpit.address] * 8
        await a.announce(a.capability())
        await tarpit.announce(tarpit.capability(addresses=addresses))
        await b.announce(b.capability())
        quick = getattr(consumer.network, slow)

        async def answer(key: str) -> object:
            if str(tarpit.node_id) in key:
                await trio.sleep_forever()
            return await quick(key)

        monkeypatch.setattr(consumer.network, slow, answer)
        start = trio.current_time()
        found = await consumer.found()
        assert trio.current_time() - start <= LOOKUP_TIMEOUT_S
        assert {a.node_id, b.node_id} <= set(found)
        assert {a.node_id, b.node_id} <= set(consumer.network.peers)
        # With a record that holds it counts, though it could not be dialled.
        assert (tarpit.node_id in found) is (slow == "connect")


async def test_a_record_makes_nobody_dial_another(autojump_clock: MockClock, open_peers: OpenPeers) -> None:
    async with open_peers(4) as (_, consumer, liar, victim):
        await liar.announce(liar.capability(addresses=[victim.address, "nowhere", liar.address]))
        assert await consumer.found() == [liar.node_id]
        assert victim.node_id not in consumer.network.peers
        assert liar.node_id in consumer.network.peers


async def test_a_lookup_ends_in_time(
    autojump_clock: MockClock, open_peers: OpenPeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_peers(2) as (consumer, _):

        async def hang(_key: bytes, _limit: int) -> Sequence[NodeId]:
            await trio.sleep_forever()

        monkeypatch.setattr(consumer.network, "find_providers", hang)
        start = trio.current_time()
        assert await consumer.found() == []
        assert trio.current_time() - start == LOOKUP_TIMEOUT_S


# Renewal.


async def test_announcements_are_renewed(autojump_clock: MockClock, open_peers: OpenPeers) -> None:
    async with open_peers(3) as (_, provider, consumer):
        await provider.announce(provider.capability())
        key = capability_key(ROOT, provider.node_id)
        issued: list[int] = []
        for _ in range(16 * HOUR_S // 60):
            await trio.sleep(60)
            record = RULES.open_capability(key, await consumer.network.get_record(key) or b"")
            if record.header.issued_at not in issued:
                issued.append(record.header.issued_at)
        gaps = [(later - earlier) / 1_000 for earlier, later in pairwise(issued)]
        assert len(gaps) >= 14
        assert all(REANNOUNCE_S * (1 - JITTER) <= gap <= REANNOUNCE_S * (1 + JITTER) + 2 for gap in gaps)
        # Not all nodes of a network that started together announce together.
        assert max(gaps) - min(gaps) > REANNOUNCE_S * JITTER / 2
        assert await consumer.found() == [provider.node_id]


async def test_what_is_renewed_is_the_latest(autojump_clock: MockClock, open_peers: OpenPeers) -> None:
    async with open_peers(3) as (_, provider, consumer):
        await provider.announce(provider.capability())
        await provider.announce(provider.capability(OTHER_ROOT))
        await trio.sleep(2 * HOUR_S)
        assert await consumer.found() == []
        assert await consumer.found(OTHER_ROOT) == [provider.node_id]


async def test_a_newcomer_keeps_what_is_renewed(
    autojump_clock: MockClock, open_peers: OpenPeers, hub: MemoryHub
) -> None:
    async with open_peers(1) as (provider,), open_peer(hub, 9) as newcomer:
        await provider.announce(provider.capability())
        await newcomer.discovery.join([provider.address])
        hub.cut_off(provider.node_id)
        assert await newcomer.found() == []
        hub.restore(provider.node_id)
        await newcomer.discovery.join([provider.address])
        await trio.sleep(REANNOUNCE_S + 1)
        hub.cut_off(provider.node_id)
        assert await newcomer.found() == [provider.node_id]
        assert await newcomer.network.get_record(node_key(provider.node_id)) is not None


async def test_records_expire_when_nobody_renews_them(
    autojump_clock: MockClock, open_peers: OpenPeers, hub: MemoryHub
) -> None:
    async with open_peers(2) as (_, consumer):
        async with open_peer(hub, 9) as provider:
            await provider.discovery.join([consumer.address])
            await provider.announce(provider.capability())
            await trio.sleep(10)
            # It leaves without a word.
            hub.cut_off(provider.node_id)
        (record,) = await consumer.discovery.find_providers(ROOT)
        left = (record.header.expires_at - clock()) / 1_000
        assert RECORD_LIFETIME_MS / 1_000 - 20 < left < RECORD_LIFETIME_MS / 1_000
        await trio.sleep(left - 10)
        assert await consumer.found() == [provider.node_id]
        await trio.sleep(11)
        assert await consumer.found() == []
        assert await consumer.network.get_record(node_key(provider.node_id)) is None


async def test_a_provider_that_leaves_takes_its_record_back(
    autojump_clock: MockClock, open_peers: OpenPeers, hub: MemoryHub
) -> None:
    async with open_peers(3) as (_, consumer, other):
        async with open_peer(hub, 9) as provider:
            await provider.discovery.join([consumer.address])
            await provider.announce(provider.capability())
            await trio.sleep(100)
            assert await other.found() == [provider.node_id]
        assert await consumer.found() == []
        assert await other.found() == []


async def test_many_records_are_taken_back_while_each_store_drags_on(
    autojump_clock: MockClock, open_peers: OpenPeers, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = [bytes([number]) * 32 for number in range(2 * PUBLISH_AT_ONCE)]
    async with open_peers(2) as (consumer, _):
        async with open_peer(hub, 9) as provider:
            await provider.discovery.join([consumer.address])
            await provider.announce(*map(provider.capability, roots))
            real = provider.network.put_record

            async def put_slowly(key: str, value: bytes) -> None:
                await real(key, value)
                await trio.sleep(10)

            monkeypatch.setattr(provider.network, "put_record", put_slowly)
        for root in roots:
            value = await consumer.network.get_record(capability_key(root, provider.node_id))
            assert value is not None
            assert not RULES.open_capability(capability_key(root, provider.node_id), value).body.slots


def nobody_there(_topic: str) -> Sequence[NodeId]:
    """Who listens to gossip."""
    return ()


@pytest.mark.parametrize("failing", ["put_record", "provide"])
async def test_a_record_that_cannot_be_announced_hinders_no_other(
    autojump_clock: MockClock,
    open_peers: OpenPeers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: str,
) -> None:
    """Nor does it end the node, and later it is announced."""
    async with open_peers(3) as (_, provider, consumer):
        # The DHT is to be all there is.
        monkeypatch.setattr(provider.network, "topic_peers", nobody_there)
        real = getattr(provider.network, failing)
        broken = {ROOT, capability_key(ROOT, provider.node_id), node_key(provider.node_id)}

        async def fail(key: str | bytes, *value: bytes) -> None:
            if key in broken:
                msg = "no room"
                raise ResourceError(msg)
            await real(key, *value)

        monkeypatch.setattr(provider.network, failing, fail)
        await provider.announce(provider.capability(), provider.capability(OTHER_ROOT))
        assert await consumer.found() == []
        assert await consumer.found(OTHER_ROOT) == [provider.node_id]
        # Renewal goes on while it fails, for longer than records live, and succeeds when it can.
        await trio.sleep(4 * HOUR_S)
        assert await consumer.found() == []
        assert await consumer.found(OTHER_ROOT) == [provider.node_id]
        # That is told once, not at every attempt.
        messages = [record.getMessage() for record in caplog.records]
        assert messages.count("model cannot be announced: no room") == 1
        assert messages.count("this node cannot be announced: no room") == (failing == "put_record")
        broken.clear()
        await trio.sleep(REANNOUNCE_S * (1 + JITTER))
        assert await consumer.found() == [provider.node_id]
        assert await consumer.network.get_record(node_key(provider.node_id)) is not None


async def test_who_announced_nothing_renews_nothing(autojump_clock: MockClock, open_peers: OpenPeers) -> None:
    async with open_peers(2) as (a, b):
        await trio.sleep(2 * REANNOUNCE_S)
        assert await a.network.get_record(node_key(b.node_id)) is None
        assert await a.found() == []


async def test_an_idle_node_hardly_wakes(autojump_clock: MockClock, open_peers: OpenPeers) -> None:
    async with open_peers(5) as peers:
        looks = 0

        def describe() -> tuple[NodeRecord, Sequence[CapabilityRecord]]:
            nonlocal looks
            looks += 1
            return NodeRecord((peers[0].address,), (), "aci-p2p/1"), (peers[0].capability(),)

        await peers[0].discovery.announce(describe)
        await trio.sleep(HOUR_S)
        looks = 0
        await trio.sleep(24 * HOUR_S)
        # Now and then, and for each renewal and its exchange.
        assert 24 < looks < 24 * 8
