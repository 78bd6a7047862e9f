"""Joining, announcing and finding over the in-memory network, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Final

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.clock import virtual_clock
from aci_p2p.dht import BootstrapFailed, Discovery, RecordRules, capability_key, joining, node_key, open_discovery
from aci_p2p.dht.address_cache import AddressCache
from aci_p2p.dht.announcing import JITTER, REANNOUNCE_S
from aci_p2p.dht.bootstrap import MAX_BACK_OFF_S
from aci_p2p.dht.discovery import RECORD_LIFETIME_MS, TICK_S, DiscoveryOptions
from aci_p2p.dht.joining import DIAL_TIMEOUT_S, FIRST_SAVE_S, SAVE_S, START_WAIT_S
from aci_p2p.dht.search import LOOKUP_TIMEOUT_S, MAX_PROVIDERS, PATIENCE_S
from aci_p2p.files import write_atomically
from aci_p2p.network import Network
from aci_p2p.network.memory import MemoryHub
from aci_p2p.protocol.envelope import Sealer
from aci_p2p.protocol.errors import LocalError, ResourceError
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.messages import CapabilityRecord, NodeRecord
from tests.protocol.driver import ENGINE, NETWORK, NOW, PRICES

ROOT: Final = bytes([5]) * 32
OTHER_ROOT: Final = bytes([6]) * 32
HOUR_S: Final = 3_600


def clock() -> int:
    """Virtual time, from NOW."""
    return NOW + virtual_clock()


RULES: Final = RecordRules(NETWORK, clock)


@dataclass(frozen=True)
class Peer:
    """A node that discovers."""

    network: Network
    discovery: Discovery
    sealer: Sealer

    @property
    def node_id(self) -> NodeId:
        return self.network.node_id

    @property
    def address(self) -> str:
        return self.network.addresses[0]

    def capability(self, root: bytes = ROOT, addresses: Sequence[str] | None = None) -> CapabilityRecord:
        return CapabilityRecord(
            model_root=root, model_name="model", context=8_192, engine=ENGINE, **PRICES, slots=4, free_slots=4,
            price_curve=(), addresses=tuple(self.network.addresses if addresses is None else addresses),
        )  # fmt: skip

    async def announce(self, *capabilities: CapabilityRecord) -> None:
        await self.discovery.announce(lambda: (NodeRecord((self.address,), (), "aci-p2p/1"), capabilities))

    async def found(self, root: bytes = ROOT, **limit: int) -> list[NodeId]:
        """The providers of a model, each with its own record."""
        records = await self.discovery.find_providers(root, **limit)
        assert all(record.body.model_root == root for record in records)
        return [record.sender for record in records]


OpenPeers = Callable[[int], AbstractAsyncContextManager[list[Peer]]]


@pytest.fixture
def hub() -> MemoryHub:
    return MemoryHub(latency=0.01)


@asynccontextmanager
async def open_peer(hub: MemoryHub, number: int, options: DiscoveryOptions | None = None) -> AsyncGenerator[Peer]:
    key = KeyPair(number.to_bytes(32))
    sealer = Sealer(key, NETWORK)
    async with (
        hub.open_network(key, record_validator=RULES.validate, record_selector=RULES.select) as network,
        open_discovery(network, sealer, RULES, clock, options, Random(number)) as discovery,  # noqa: S311
    ):
        yield Peer(network, discovery, sealer)


@pytest.fixture
def open_peers(hub: MemoryHub) -> OpenPeers:
    """Opens peers of which each has joined through the first."""

    @asynccontextmanager
    async def open_all(count: int) -> AsyncGenerator[list[Peer]]:
        async with AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(open_peer(hub, number)) for number in range(1, count + 1)]
            for peer in peers[1:]:
                await peer.discovery.join([peers[0].address])
            yield peers

    return open_all


def dead(number: int) -> str:
    """The address of nobody."""
    return f"/memory/{number}/p2p/{KeyPair(number.to_bytes(32)).node_id}"


# Joining.


async def test_joining_through_all_bootstrap_nodes(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_peer(hub, 1) as a, open_peer(hub, 2) as b, open_peer(hub, 3) as c:
        await c.discovery.join([b.address, a.address])
        assert set(c.network.peers) == {a.node_id, b.node_id}
        await c.discovery.join([])


async def test_joining_with_a_dead_bootstrap_node(autojump_clock: MockClock, hub: MemoryHub) -> None:
    for addresses in (lambda a: [dead(99), a], lambda a: [a, dead(99)]):
        async with open_peer(hub, 1) as a, open_peer(hub, 2) as b:
            await b.discovery.join(addresses(a.address))
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
        for _ in range(3 * HOUR_S // 60):
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
        assert HOUR_S - 20 < left < HOUR_S
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
        monkeypatch.setattr(provider.network, "topic_peers", lambda _topic: ())
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
        await trio.sleep(2 * HOUR_S)
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


# Staying in the network.


async def test_a_node_starts_without_anybody_and_finds_its_bootstrap_later(
    autojump_clock: MockClock, hub: MemoryHub
) -> None:
    async with open_peer(hub, 2) as late:
        # The address that the first one is going to have.
        key = KeyPair((1).to_bytes(32))
        start = trio.current_time()
        await late.discovery.join([f"/memory/2/p2p/{key.node_id}"], require=False)
        assert trio.current_time() - start <= START_WAIT_S
        await trio.sleep(2 * HOUR_S)
        (report,) = late.discovery.bootstrap_report()
        assert report.reached is False
        assert report.attempts > 20
        async with open_peer(hub, 1) as first:
            assert first.address == f"/memory/2/p2p/{key.node_id}"
            await trio.sleep(MAX_BACK_OFF_S + TICK_S)
            assert first.node_id in late.network.peers
            (report,) = late.discovery.bootstrap_report()
            assert (report.reached, report.failures) == (True, ())


async def test_a_node_that_lost_everybody_comes_back(
    autojump_clock: MockClock, open_peers: OpenPeers, hub: MemoryHub
) -> None:
    async with open_peers(3) as (first, second, third):
        hub.cut_off(third.node_id)
        assert third.network.peers == ()
        await trio.sleep(HOUR_S)
        hub.restore(third.node_id)
        await trio.sleep(MAX_BACK_OFF_S + TICK_S)
        # By its bootstrap, and by whom it had met.
        assert third.network.peers
        assert first.network.peers
        assert second.network.peers


async def test_those_known_from_before_are_asked_when_the_bootstrap_is_gone(
    autojump_clock: MockClock, open_peers: OpenPeers, hub: MemoryHub
) -> None:
    async with open_peers(3) as (first, second, third):
        await second.network.connect(third.address)
        await trio.sleep(10)
        hub.cut_off(first.node_id)
        hub.disconnect(second.node_id, third.node_id)
        assert third.network.peers == ()
        await trio.sleep(5 * TICK_S)
        assert third.network.peers == (second.node_id,)


async def test_nodes_heard_of_over_gossip_become_peers(
    autojump_clock: MockClock, open_peers: OpenPeers, hub: MemoryHub
) -> None:
    async with open_peers(3) as (first, second, third):
        for peer in (first, second, third):
            await peer.announce()
        await trio.sleep(10)
        assert {record.sender for record in third.discovery.known_nodes()} == {first.node_id, second.node_id}
        assert second.node_id in third.network.peers


@dataclass(frozen=True)
class Home:
    """Where the cache of a node lies."""

    path: Path

    @property
    def options(self) -> DiscoveryOptions:
        return DiscoveryOptions(cache=self.path, threads=False)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "state" / "addresses.json")


async def test_with_every_bootstrap_down_a_node_comes_back_from_its_cache(
    autojump_clock: MockClock, open_peers: OpenPeers, hub: MemoryHub, home: Home
) -> None:
    async with open_peers(4) as (first, *others):
        async with open_peer(hub, 9, home.options) as node:
            await node.discovery.join([first.address])
            await node.network.connect(others[0].address)
        hub.cut_off(first.node_id)
        async with open_peer(hub, 9, home.options) as node:
            start = trio.current_time()
            await node.discovery.join([first.address])
            assert node.network.peers == (others[0].node_id,)
            assert trio.current_time() - start < 1


async def test_the_cache_is_written_soon_and_then_seldom(
    autojump_clock: MockClock, open_peers: OpenPeers, hub: MemoryHub, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[float] = []

    def write(path: Path, data: bytes) -> None:
        writes.append(trio.current_time())
        write_atomically(path, data)

    monkeypatch.setattr(joining, "write_atomically", write)
    async with open_peers(2) as (first, second), open_peer(hub, 9, home.options) as node:
        start = trio.current_time()
        await node.discovery.join([first.address])
        await trio.sleep(FIRST_SAVE_S + 2 * TICK_S)
        assert len(writes) == 1
        assert writes[0] - start <= FIRST_SAVE_S + 2 * TICK_S
        # Nothing new.
        await trio.sleep(HOUR_S)
        assert len(writes) == 1
        await node.network.connect(second.address)
        await trio.sleep(SAVE_S)
        assert len(writes) == 2
    # And at the end, for when they were seen last.
    assert len(writes) == 3
    cached = AddressCache.decode(home.path.read_bytes(), clock())
    assert {one.peer for one in cached.peers} == {first.node_id, second.node_id}
    assert all(clock() - one.seen < 2_000 for one in cached.peers)


async def test_a_damaged_cache_is_told_and_replaced(
    autojump_clock: MockClock, open_peers: OpenPeers, hub: MemoryHub, home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    home.path.parent.mkdir()
    home.path.write_bytes(b"{half")
    async with open_peers(1) as (first,), open_peer(hub, 9, home.options) as node:
        assert "the address cache is damaged" in caplog.text
        await node.discovery.join([first.address])
    assert AddressCache.decode(home.path.read_bytes(), clock()).peers[0].peer == first.node_id


async def test_a_cache_that_cannot_be_kept_hinders_nobody(
    autojump_clock: MockClock, open_peers: OpenPeers, hub: MemoryHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    options = DiscoveryOptions(cache=tmp_path / "file" / "addresses.json", threads=False)
    async with open_peers(1) as (first,), open_peer(hub, 9, options) as node:
        await node.discovery.join([first.address])
        assert node.network.peers == (first.node_id,)
    assert "the address cache cannot be read" in caplog.text
    assert "the address cache is not kept" in caplog.text


async def test_offline_contacts_only_who_is_named(
    autojump_clock: MockClock, open_peers: OpenPeers, hub: MemoryHub, home: Home
) -> None:
    async with open_peers(3) as (first, provider, other):
        for peer in (first, provider, other):
            await peer.announce(*([peer.capability()] if peer is provider else []))
        async with open_peer(hub, 9, home.options) as node:
            await node.discovery.join([other.address])
        async with open_peer(hub, 9, replace(home.options, offline=True, mdns=True)) as node:
            await node.discovery.join([first.address])
            # What the DHT says is of use, but nobody of whom it tells is dialled.
            assert await node.found() == [provider.node_id]
            await trio.sleep(HOUR_S)
            assert node.network.peers == (first.node_id,)
            assert node.discovery.known_nodes() == []


# Other ways to a provider.


async def test_a_provider_is_found_when_the_dht_fails(
    autojump_clock: MockClock, open_peers: OpenPeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find_nobody(_key: bytes, _limit: int) -> Sequence[NodeId]:
        return ()

    async with open_peers(4) as (_, provider, consumer, other):
        monkeypatch.setattr(consumer.network, "find_providers", find_nobody)
        await provider.announce(provider.capability())
        await trio.sleep(10)
        assert await consumer.found() == [provider.node_id]
        assert await other.found(OTHER_ROOT) == []


async def test_a_search_does_not_wait_for_the_slow(
    autojump_clock: MockClock, open_peers: OpenPeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_peers(4) as (_, consumer, quick, tarpit):
        for provider in (quick, tarpit):
            await provider.announce(provider.capability())
        connect = consumer.network.connect

        async def slow(address: str) -> NodeId:
            if str(tarpit.node_id) in address:
                await trio.sleep(3)
            return await connect(address)

        monkeypatch.setattr(consumer.network, "connect", slow)
        start = trio.current_time()
        assert await consumer.found() == [quick.node_id, tarpit.node_id]
        assert PATIENCE_S <= trio.current_time() - start < PATIENCE_S + 0.5
        # Who wants no more than there are does not wait at all.
        start = trio.current_time()
        assert await consumer.found(limit=1) == [quick.node_id]
        assert trio.current_time() - start < PATIENCE_S
        # The other one is connected all the same.
        await trio.sleep(4)
        assert tarpit.node_id in consumer.network.peers


async def test_searches_at_once_for_one_model_are_one(
    autojump_clock: MockClock, open_peers: OpenPeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_peers(3) as (_, provider, consumer):
        await provider.announce(provider.capability())
        find, asked = consumer.network.find_providers, 0

        async def count(key: bytes, limit: int) -> Sequence[NodeId]:
            nonlocal asked
            asked += 1
            return await find(key, limit)

        monkeypatch.setattr(consumer.network, "find_providers", count)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(consumer.found)
        assert asked == 1
        await consumer.found()
        assert asked == 2


async def test_the_free_come_before_the_busy(autojump_clock: MockClock, open_peers: OpenPeers) -> None:
    async with open_peers(4) as (consumer, *providers):
        for index, provider in enumerate(providers):
            await provider.announce(replace(provider.capability(), free_slots=4 if index == 1 else 0))
        assert (await consumer.found())[0] == providers[1].node_id
        assert len(await consumer.found()) == 3


async def test_what_changes_is_announced(autojump_clock: MockClock, open_peers: OpenPeers) -> None:
    async with open_peers(3) as (_, provider, consumer):
        current = provider.capability()
        await provider.discovery.announce(lambda: (NodeRecord((), (), "aci-p2p/1"), (current,)))
        await trio.sleep(20)
        current = replace(current, free_slots=0)
        await trio.sleep(2 * TICK_S)
        (record,) = await consumer.discovery.find_providers(ROOT)
        assert record.body.free_slots == 0
