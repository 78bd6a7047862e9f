"""Getting into the network again and again; the address cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.dht import joining
from aci_p2p.dht.address_cache import AddressCache
from aci_p2p.dht.bootstrap import MAX_BACK_OFF_S
from aci_p2p.dht.discovery import DiscoveryOptions
from aci_p2p.dht.joining import DIAL_TIMEOUT_S, FIRST_SAVE_S, GRACE_S, SAVE_S, START_WAIT_S
from aci_p2p.files import write_atomically
from aci_p2p.network import Network
from aci_p2p.network.memory import MemoryHub
from aci_p2p.protocol.errors import ResourceError
from aci_p2p.protocol.identity import KeyPair, NodeId
from tests.dht.driver import HOUR_S, Home, OpenPeers, clock, dead, open_peer


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
            await trio.sleep(MAX_BACK_OFF_S + 1)
            assert first.node_id in late.network.peers
            (report,) = late.discovery.bootstrap_report()
            assert (report.reached, report.failures) == (True, ())


@pytest.fixture
def black_holes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses where nobody ever says anything."""
    holes: list[str] = []

    async def dial(network: Network, address: str) -> NodeId:
        if address not in holes:
            return await joining_dial(network, address)
        await trio.sleep(DIAL_TIMEOUT_S)
        msg = "no answer"
        raise ResourceError(msg)

    joining_dial = joining.dial
    monkeypatch.setattr(joining, "dial", dial)
    return holes


def write_cache(path: Path, addresses: list[str]) -> None:
    """A cache of these, the first as the latest that was seen."""
    cache = AddressCache()
    for age, address in enumerate(addresses):
        cache.note(NodeId.parse(address.rpartition("/")[2]), (address,), clock() - age)
    write_atomically(path, cache.encode())


@pytest.mark.parametrize("where", ["named", "named among the dead", "cached last", "cached first", "named and cached"])
async def test_who_is_gone_does_not_hold_up_joining(
    where: str, autojump_clock: MockClock, hub: MemoryHub, home: Home, black_holes: list[str]
) -> None:
    black_holes += [dead(number) for number in range(1_000, 1_250)]
    async with open_peer(hub, 1) as alive:
        first, last = where in {"cached first", "named and cached"}, where == "cached last"
        write_cache(home.path, [alive.address] * first + black_holes + [alive.address] * last)
        named = [alive.address] if "named" in where else []
        if "dead" in where:
            named = [*(dead(number) for number in range(2_000, 2_040)), *named]
            black_holes += named[:-1]
        async with open_peer(hub, 2, home.options) as node:
            # The cache is tried as soon as the node runs.
            await trio.sleep(0.5 if "cached" in where else 0.05)
            start = trio.current_time()
            await node.discovery.join(named)
            assert node.network.peers == (alive.node_id,)
            waves = len(black_holes) // 16 * 0.1 if where == "cached last" else 0.4
            assert trio.current_time() - start < waves + GRACE_S + 0.1
            if first:
                assert trio.current_time() - start < GRACE_S + 0.01


async def test_a_node_that_lost_everybody_comes_back(
    autojump_clock: MockClock, open_peers: OpenPeers, hub: MemoryHub
) -> None:
    async with open_peers(3) as (first, second, third):
        hub.cut_off(third.node_id)
        assert not third.network.peers
        await trio.sleep(HOUR_S)
        hub.restore(third.node_id)
        await trio.sleep(MAX_BACK_OFF_S + 1)
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
        assert not third.network.peers
        await trio.sleep(5)
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
        await trio.sleep(FIRST_SAVE_S + 2)
        assert len(writes) == 1
        assert writes[0] - start <= FIRST_SAVE_S + 2
        # Nothing new.
        await trio.sleep(HOUR_S)
        assert len(writes) == 1
        await second.network.connect(node.address)
        await trio.sleep(SAVE_S)
        assert len(writes) == 2
    # And at the end, for when they were seen last.
    assert len(writes) == 3
    cached = AddressCache.decode(home.path.read_bytes(), clock())
    assert {one.peer: one.dialled for one in cached.peers} == {first.node_id: True, second.node_id: False}
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
