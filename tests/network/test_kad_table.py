"""The routing table of the DHT node alone."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.network.libp2p.kad_table import (
    BUCKET_SIZE,
    MAX_PER_NETWORK,
    MAX_PER_NETWORK_IN_BUCKET,
    MAX_STANDBYS,
    RoutingTable,
    closest,
    diverse,
    network_of,
    position,
)
from aci_p2p.protocol.identity import NodeId
from tests.network.driver import make_key

US = make_key(0x5E1F).node_id
NET, OTHER_NET = "8.8.8.0/24", "9.9.9.0/24"
node_ids = st.builds(NodeId, st.binary(min_size=32, max_size=32))


def distance_class(peer: NodeId) -> int:
    """Which bucket a peer belongs in."""
    return (position(peer.peer_id) ^ position(US.peer_id)).bit_length()


def peers_at(bits: int, count: int) -> list[NodeId]:
    """Peers that belong in one bucket."""
    every = (NodeId(number.to_bytes(32)) for number in itertools.count(1))
    return list(itertools.islice((peer for peer in every if distance_class(peer) == bits), count))


@given(st.lists(node_ids, max_size=60, unique=True), st.binary(max_size=40), st.integers(0, 30))
def test_table_finds_the_closest_by_xor(peers: list[NodeId], key: bytes, count: int) -> None:
    table = RoutingTable(US)
    kept = [peer for peer in peers if table.add(peer, None)]
    target = position(key)
    expected = sorted(kept, key=lambda peer: position(peer.peer_id) ^ target)[:count]
    assert table.closest(target, count) == expected == closest(kept, target, count)
    assert len(table) == len(kept)


def test_bucket_keeps_those_known_longest() -> None:
    table = RoutingTable(US)
    peers = peers_at(256, 2 * BUCKET_SIZE)
    assert [table.add(peer, None) for peer in peers] == [True] * BUCKET_SIZE + [False] * BUCKET_SIZE
    # Another bucket is not concerned.
    assert table.add(peers_at(255, 1)[0], None)


def test_table_leaves_us_and_known_peers_out() -> None:
    table = RoutingTable(US)
    peer = make_key(1).node_id
    assert not table.add(US, None)
    assert table.add(peer, None)
    assert peer in table
    assert not table.add(peer, None)
    table.remove(peer)
    assert len(table) == 0
    assert peer not in table
    assert table.add(peer, None)


def test_the_one_heard_from_longest_ago_is_asked_for_its_place() -> None:
    table = RoutingTable(US)
    first, second, *peers = peers_at(256, BUCKET_SIZE + 1)
    for peer in (first, second, *peers):
        table.add(peer, None)
    newcomer = peers[-1]
    assert table.oldest_beside(newcomer) == first
    assert table.oldest_beside(second) is None
    table.heard_from(first)
    assert table.oldest_beside(newcomer) == second
    # Nobody is there only because it was heard from.
    table.heard_from(newcomer)
    assert newcomer not in table


def test_who_waits_gets_the_place_of_one_that_is_gone() -> None:
    table = RoutingTable(US)
    peers = peers_at(256, BUCKET_SIZE + MAX_STANDBYS + 2)
    for peer in peers:
        table.add(peer, None)
    for number in range(1, MAX_STANDBYS + 2):
        table.remove(peers[number])
        # The latest first; the two that waited longest were forgotten.
        assert (peers[-number] in table) is (number <= MAX_STANDBYS)
    assert len(table) == BUCKET_SIZE - 1
    assert table.oldest_beside(peers[-1]) is None


def test_who_waits_and_is_gone_itself_gets_no_place() -> None:
    table = RoutingTable(US)
    peers = peers_at(256, BUCKET_SIZE + 1)
    for peer in peers:
        table.add(peer, None)
    table.remove(peers[-1])
    table.remove(peers[0])
    assert len(table) == BUCKET_SIZE - 1


def test_one_network_has_few_places_in_a_bucket() -> None:
    table = RoutingTable(US)
    peers = peers_at(256, BUCKET_SIZE)
    added = [table.add(peer, NET) for peer in peers[:10]]
    assert added == [True] * MAX_PER_NETWORK_IN_BUCKET + [False] * (10 - MAX_PER_NETWORK_IN_BUCKET)
    # Those refused do not wait either.
    assert table.oldest_beside(peers[9]) is None
    assert table.add(peers[10], OTHER_NET)
    assert table.add(peers[11], None)
    table.remove(peers[0])
    assert table.add(peers[5], NET)


def test_one_network_has_few_places_in_the_table() -> None:
    table = RoutingTable(US)
    buckets = [peers_at(bits, 2) for bits in range(256, 256 - MAX_PER_NETWORK // 2 - 1, -1)]
    peers = [peer for bucket in buckets for peer in bucket]
    assert [table.add(peer, NET) for peer in peers] == [True] * MAX_PER_NETWORK + [False] * 2
    assert table.add(peers[-1], OTHER_NET)


def test_a_place_that_becomes_free_goes_to_no_crowded_network() -> None:
    table = RoutingTable(US)
    peers = peers_at(256, BUCKET_SIZE + 2)
    networks = [NET, NET, *[None] * (BUCKET_SIZE - 2), OTHER_NET, NET]
    for peer, network in zip(peers, networks, strict=True):
        table.add(peer, network)
    # The latest waits with a network that has two places; it takes the third.
    table.remove(peers[2])
    assert peers[-1] in table
    # Now its network has three, and another waits.
    late = peers_at(256, BUCKET_SIZE + 4)[-2:]
    assert not table.add(late[0], NET)
    table.remove(peers[3])
    assert peers[-2] in table


def test_an_attacker_in_one_network_cannot_fill_the_table() -> None:
    table = RoutingTable(US)
    honest = [make_key(number).node_id for number in range(100, 130)]
    for peer in (make_key(number).node_id for number in range(1000, 1400)):
        table.add(peer, NET)
    assert len(table) == MAX_PER_NETWORK
    assert sum(table.add(peer, f"network {index}") for index, peer in enumerate(honest)) >= BUCKET_SIZE


@pytest.mark.parametrize(
    ("source", "network"),
    [
        ("8.8.8.8", "8.8.8.0/24"),
        ("8.8.9.8", "8.8.9.0/24"),
        ("2a00:1450:4001::1", "2a00:1450:4001::/48"),
        ("2a00:1450:4001:80b::/64", "2a00:1450:4001::/48"),
        ("127.0.0.1", None),
        ("10.1.2.3", None),
        ("192.168.1.1", None),
        ("fd00::1", None),
        ("::1", None),
        ("loopback", None),
        ("relay 12D3KooW", "relay 12D3KooW"),
    ],
)
def test_networks(source: str, network: str | None) -> None:
    assert network_of(source) == network


def test_a_diverse_choice() -> None:
    peers = [make_key(number).node_id for number in range(12)]
    crowd = [(peer, NET) for peer in peers[:6]]
    others = [(peer, None) for peer in peers[6:]]
    assert diverse([*crowd, *others], 20) == [*peers[:3], *peers[6:]]
    assert diverse([*crowd, *others], 5) == [*peers[:3], *peers[6:8]]
    assert diverse(crowd, 0) == []
