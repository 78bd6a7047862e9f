"""The Kademlia routing table and record stores. Pure: time is passed in.

Sources: Maymounkov and Mazieres, "Kademlia" (2002); https://github.com/libp2p/specs/tree/master/kad-dht
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable

from aci_p2p.network.limits import PROVIDER_SECONDS
from aci_p2p.protocol.identity import NodeId

BUCKET_SIZE = 20
"""Peers in a bucket, and that keep a record (Kademlia's k)."""
MAX_RECORDS = 8192
"""Values kept for the network: 32 MiB of the largest."""
RECORD_SECONDS = 48 * 3600.0
"""How long a value is kept, seconds; signed records say themselves when they expire."""
MAX_PROVIDER_KEYS = 4096
"""Keys whose providers are kept for the network."""
MAX_PROVIDERS_PER_KEY = 256
"""Providers kept for one key; later ones are refused until some expire."""
MAX_KEYS_PER_PROVIDER = 256
"""Keys kept for one provider, so that none can crowd out the others."""


def position(key: bytes) -> int:
    """Where a key or a binary peer id lies in the 256-bit key space: its SHA-256."""
    return int.from_bytes(hashlib.sha256(key).digest())


def closest(peers: Iterable[NodeId], target: int, count: int) -> list[NodeId]:
    """The `count` peers nearest to a position, nearest first, by XOR distance."""
    return sorted(peers, key=lambda peer: position(peer.peer_id) ^ target)[:count]


class RoutingTable:
    """Peers known to speak Kademlia: up to BUCKET_SIZE for each distance, the long-known preferred."""

    def __init__(self, node_id: NodeId) -> None:
        self._position = position(node_id.peer_id)
        self._buckets: dict[int, dict[NodeId, None]] = {}

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self._buckets.values())

    def add(self, peer: NodeId) -> bool:
        """Add a peer; False when it is there already, is ourselves or its bucket is full."""
        distance = position(peer.peer_id) ^ self._position
        bucket = self._buckets.setdefault(distance.bit_length(), {})
        if not distance or peer in bucket or len(bucket) >= BUCKET_SIZE:
            return False
        bucket[peer] = None
        return True

    def remove(self, peer: NodeId) -> None:
        """Drop a peer that does not answer."""
        for bucket in self._buckets.values():
            bucket.pop(peer, None)

    def closest(self, target: int, count: int) -> list[NodeId]:
        """The `count` peers nearest to a position, nearest first."""
        return closest((peer for bucket in self._buckets.values() for peer in bucket), target, count)


class RecordStore:
    """Values that we keep for the network, the oldest dropped first."""

    def __init__(self) -> None:
        self._values: OrderedDict[str, tuple[bytes, float]] = OrderedDict()

    def put(self, key: str, value: bytes, now: float) -> None:
        """Keep a value, in place of what was there."""
        self._values[key] = (value, now + RECORD_SECONDS)
        self._values.move_to_end(key)
        if len(self._values) > MAX_RECORDS:
            self._values.popitem(last=False)

    def get(self, key: str, now: float) -> bytes | None:
        """The value, unless it has expired."""
        value, expiry = self._values.get(key, (None, 0.0))
        return value if expiry > now else None


class ProviderStore:
    """Who provides what, the keys announced longest ago dropped first."""

    def __init__(self) -> None:
        self._providers: OrderedDict[bytes, dict[NodeId, float]] = OrderedDict()
        self._keys: Counter[NodeId] = Counter()

    def add(self, key: bytes, provider: NodeId, now: float) -> bool:
        """Keep or refresh an announcement; False when the key or the provider has too many."""
        self._expire(key, now)
        providers = self._providers.setdefault(key, {})
        if provider not in providers:
            if len(providers) >= MAX_PROVIDERS_PER_KEY or self._keys[provider] >= MAX_KEYS_PER_PROVIDER:
                return False
            self._keys[provider] += 1
        providers[provider] = now + PROVIDER_SECONDS
        self._providers.move_to_end(key)
        if len(self._providers) > MAX_PROVIDER_KEYS:
            self._drop(*self._providers.popitem(last=False)[1])
        return True

    def get(self, key: bytes, now: float) -> list[NodeId]:
        """Providers of a key whose announcement has not expired, the newest first."""
        self._expire(key, now)
        providers = self._providers.get(key, {})
        return sorted(providers, key=lambda provider: -providers[provider])

    def _expire(self, key: bytes, now: float) -> None:
        providers = self._providers.get(key, {})
        expired = [provider for provider, expiry in providers.items() if expiry <= now]
        for provider in expired:
            del providers[provider]
        self._drop(*expired)

    def _drop(self, *providers: NodeId) -> None:
        for provider in providers:
            self._keys[provider] -= 1
            if not self._keys[provider]:
                del self._keys[provider]
