"""The routing table and the stores of the DHT node alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.network.libp2p import kad_table
from aci_p2p.network.libp2p.kad_table import ProviderStore, RecordStore, RoutingTable, closest, position
from aci_p2p.network.limits import PROVIDER_SECONDS
from aci_p2p.protocol.identity import NodeId
from tests.network.driver import make_key

US = make_key(0x5E1F).node_id
NOW = 1000.0
node_ids = st.builds(NodeId, st.binary(min_size=32, max_size=32))


@given(st.lists(node_ids, max_size=60, unique=True), st.binary(max_size=40), st.integers(0, 30))
def test_table_finds_the_closest_by_xor(peers: list[NodeId], key: bytes, count: int) -> None:
    table = RoutingTable(US)
    kept = [peer for peer in peers if table.add(peer)]
    target = position(key)
    expected = sorted(kept, key=lambda peer: position(peer.peer_id) ^ target)[:count]
    assert table.closest(target, count) == expected == closest(kept, target, count)
    assert len(table) == len(kept)


def test_bucket_keeps_those_known_longest() -> None:
    table = RoutingTable(US)
    peers = [make_key(number).node_id for number in range(1, 101)]
    half = [peer for peer in peers if (position(peer.peer_id) ^ position(US.peer_id)).bit_length() == 256]
    added = [table.add(peer) for peer in half]
    assert added == [number < kad_table.BUCKET_SIZE for number in range(len(half))]


def test_table_leaves_us_and_known_peers_out() -> None:
    table = RoutingTable(US)
    peer = make_key(1).node_id
    assert not table.add(US)
    assert table.add(peer)
    assert not table.add(peer)
    table.remove(peer)
    assert len(table) == 0
    assert table.add(peer)


def test_record_expires() -> None:
    store = RecordStore()
    store.put("/aci/x", b"value", NOW)
    assert store.get("/aci/x", NOW + kad_table.RECORD_SECONDS - 1) == b"value"
    assert store.get("/aci/x", NOW + kad_table.RECORD_SECONDS) is None
    assert store.get("/aci/y", NOW) is None


def test_records_are_bounded_and_the_oldest_goes_first() -> None:
    store = RecordStore()
    for number in range(kad_table.MAX_RECORDS):
        store.put(f"/aci/{number}", b"v", NOW)
    store.put("/aci/0", b"refreshed", NOW)
    store.put("/aci/new", b"v", NOW)
    assert store.get("/aci/0", NOW) == b"refreshed"
    assert store.get("/aci/1", NOW) is None
    assert store.get("/aci/2", NOW) == b"v"


def test_announcement_expires_unless_refreshed() -> None:
    store = ProviderStore()
    first, second = make_key(1).node_id, make_key(2).node_id
    store.add(b"key", first, NOW)
    store.add(b"key", second, NOW + 10)
    assert store.get(b"key", NOW + 20) == [second, first]
    store.add(b"key", first, NOW + 30)
    assert store.get(b"key", NOW + PROVIDER_SECONDS + 20) == [first]
    assert store.get(b"key", NOW + PROVIDER_SECONDS + 30) == []


def test_providers_of_a_key_are_bounded() -> None:
    store = ProviderStore()
    peers = [make_key(number).node_id for number in range(1, kad_table.MAX_PROVIDERS_PER_KEY + 2)]
    assert [store.add(b"key", peer, NOW) for peer in peers] == [True] * kad_table.MAX_PROVIDERS_PER_KEY + [False]
    assert store.add(b"key", peers[0], NOW)
    assert store.add(b"key", peers[-1], NOW + PROVIDER_SECONDS)


def test_keys_of_a_provider_are_bounded() -> None:
    store = ProviderStore()
    flooder, other = make_key(1).node_id, make_key(2).node_id
    keys = [bytes([number // 256, number % 256]) for number in range(kad_table.MAX_KEYS_PER_PROVIDER + 1)]
    assert [store.add(key, flooder, NOW) for key in keys] == [True] * kad_table.MAX_KEYS_PER_PROVIDER + [False]
    assert store.add(keys[-1], other, NOW)
    assert store.get(keys[0], NOW + PROVIDER_SECONDS) == []
    assert store.add(keys[-1], flooder, NOW + PROVIDER_SECONDS)


def test_keys_are_bounded_and_the_oldest_goes_first() -> None:
    store = ProviderStore()
    for number in range(kad_table.MAX_PROVIDER_KEYS + 1):
        store.add(number.to_bytes(4), make_key(1 + number // 200).node_id, NOW)
    assert store.get((0).to_bytes(4), NOW) == []
    assert store.get((1).to_bytes(4), NOW) == [make_key(1).node_id]
