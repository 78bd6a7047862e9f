"""What the DHT node keeps for the network, alone."""

from __future__ import annotations

import pytest

from aci_p2p.network.libp2p import kad_stores
from aci_p2p.network.libp2p.kad_stores import ProviderStore, RecordStore
from aci_p2p.network.libp2p.kad_table import position
from aci_p2p.network.limits import PROVIDER_SECONDS, RECORD_SECONDS
from tests.network.driver import make_key

NOW = 1000.0
OWN = position(b"us")
FIRST, SECOND = make_key(1).node_id, make_key(2).node_id


def by_distance(keys: list[str]) -> list[str]:
    """The nearest to us first."""
    return sorted(keys, key=lambda key: position(key.encode()) ^ OWN)


def test_record_expires() -> None:
    store = RecordStore(OWN)
    assert store.put("/aci/x", b"value", NOW)
    assert store.get("/aci/x", NOW + RECORD_SECONDS - 1) == b"value"
    assert store.get("/aci/x", NOW + RECORD_SECONDS) is None
    assert store.get("/aci/y", NOW) is None


def test_a_full_store_keeps_what_is_nearest_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kad_stores, "MAX_RECORDS", 50)
    store = RecordStore(OWN)
    keys = [f"/aci/{number}/{number}" for number in range(100)]
    nearest = by_distance(keys)
    for key in keys:
        store.put(key, b"v", NOW)
        assert len(store) <= 50
    assert {key for key in keys if store.get(key, NOW)} == set(nearest[:50])
    # There is always room for a newer value of what is kept, never for what lies farther.
    assert store.put(nearest[49], b"newer", NOW)
    assert store.get(nearest[49], NOW) == b"newer"
    assert not store.put(nearest[50], b"v", NOW)
    assert len(store) == 50


def test_a_full_store_gives_the_place_of_what_has_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kad_stores, "MAX_RECORDS", 2)
    store = RecordStore(OWN)
    near, middle, far = by_distance(["/aci/1/a", "/aci/2/b", "/aci/3/c"])
    store.put(near, b"v", NOW)
    store.put(middle, b"v", NOW + 10)
    assert not store.put(far, b"v", NOW + 20)
    assert store.put(far, b"v", NOW + RECORD_SECONDS)
    assert store.get(middle, NOW + RECORD_SECONDS) == b"v"


def test_records_of_a_publisher_are_bounded() -> None:
    store = RecordStore(OWN)
    keys = [f"/aci/capability/{number}/flooder" for number in range(kad_stores.MAX_RECORDS_PER_PUBLISHER + 1)]
    assert [store.put(key, b"v", NOW) for key in keys] == [True] * kad_stores.MAX_RECORDS_PER_PUBLISHER + [False]
    assert store.put("/aci/capability/0/other", b"v", NOW)
    assert store.put(keys[0], b"newer", NOW + 1)
    later = NOW + RECORD_SECONDS
    assert store.put(keys[-1], b"v", later)
    assert len(store) == 2
    assert store.get(keys[0], later) == b"newer"


def test_announcement_expires_unless_refreshed() -> None:
    store = ProviderStore(OWN)
    store.add(b"key", FIRST, None, NOW)
    store.add(b"key", SECOND, None, NOW + 10)
    assert store.get(b"key", NOW + 20) == [SECOND, FIRST]
    store.add(b"key", FIRST, None, NOW + 30)
    assert store.get(b"key", NOW + PROVIDER_SECONDS + 20) == [FIRST]
    assert store.get(b"key", NOW + PROVIDER_SECONDS + 30) == []


def test_providers_of_a_key_are_bounded() -> None:
    store = ProviderStore(OWN)
    peers = [make_key(number).node_id for number in range(1, kad_stores.MAX_PROVIDERS_PER_KEY + 2)]
    added = [store.add(b"key", peer, None, NOW) for peer in peers]
    assert added == [True] * kad_stores.MAX_PROVIDERS_PER_KEY + [False]
    assert store.add(b"key", peers[0], None, NOW)
    assert store.add(b"key", peers[-1], None, NOW + PROVIDER_SECONDS)


def test_one_network_cannot_lock_others_out_of_a_key() -> None:
    store = ProviderStore(OWN)
    crowd = [make_key(number).node_id for number in range(1, 2 + kad_stores.MAX_PROVIDERS_PER_NETWORK)]
    added = [store.add(b"key", peer, "8.8.8.0/24", NOW) for peer in crowd]
    assert added == [True] * kad_stores.MAX_PROVIDERS_PER_NETWORK + [False]
    assert store.add(b"key", crowd[-1], "9.9.9.0/24", NOW)
    assert store.add(b"other", crowd[0], "8.8.8.0/24", NOW)


def test_keys_of_a_provider_are_bounded() -> None:
    store = ProviderStore(OWN)
    keys = [bytes([number // 256, number % 256]) for number in range(kad_stores.MAX_KEYS_PER_PROVIDER + 1)]
    assert [store.add(key, FIRST, None, NOW) for key in keys] == [True] * kad_stores.MAX_KEYS_PER_PROVIDER + [False]
    assert store.add(keys[-1], SECOND, None, NOW)
    assert store.get(keys[0], NOW + PROVIDER_SECONDS) == []
    assert store.add(keys[-1], FIRST, None, NOW + PROVIDER_SECONDS)


def test_keys_are_bounded_and_the_farthest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kad_stores, "MAX_PROVIDER_KEYS", 50)
    store = ProviderStore(OWN)
    keys = [number.to_bytes(4) for number in range(100)]
    nearest = sorted(keys, key=lambda key: position(key) ^ OWN)
    for key in keys:
        store.add(key, FIRST, None, NOW)
    assert {key for key in keys if store.get(key, NOW)} == set(nearest[:50])
    # What was dropped counts no more against its provider.
    monkeypatch.setattr(kad_stores, "MAX_KEYS_PER_PROVIDER", 51)
    monkeypatch.setattr(kad_stores, "MAX_PROVIDER_KEYS", 51)
    assert store.add(nearest[50], FIRST, None, NOW)
    assert not store.add(nearest[51], SECOND, None, NOW)
    # When all have expired there is room again.
    assert store.add(nearest[51], SECOND, None, NOW + PROVIDER_SECONDS)
