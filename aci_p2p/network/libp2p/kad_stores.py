"""What a DHT node keeps for the network: values, and who provides what. Pure: time is passed in.

Both may fill up, by chance or by a flood. What lies farthest from our own place in the key space goes then: for that
other nodes are closer, and who wants to push out a certain record must find keys that lie nearer to all of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from aci_p2p.network.libp2p.kad_table import position
from aci_p2p.network.limits import PROVIDER_SECONDS, RECORD_SECONDS
from aci_p2p.protocol.identity import NodeId

MAX_RECORDS = 8192
"""Values kept for the network: 32 MiB of the largest."""
MAX_RECORDS_PER_PUBLISHER = 129
"""Values kept of one publisher: 128 models and itself."""
MAX_PROVIDER_KEYS = 4096
"""Keys whose providers are kept for the network."""
MAX_PROVIDERS_PER_KEY = 256
"""Providers kept for one key; later ones are refused until some expire."""
MAX_PROVIDERS_PER_NETWORK = 32
"""Providers of one network (see `network_of`) kept for one key, so that none can lock others out of a popular one."""
MAX_KEYS_PER_PROVIDER = 128
"""Keys kept for one provider, so that none can crowd out the others."""


@dataclass(frozen=True, slots=True)
class _Value:
    value: bytes
    expiry: float
    distance: int
    publisher: str


def publisher_of(key: str) -> str:
    """Who alone can sign the value of a key: the last part of ACI's keys names its node."""
    return key.rpartition("/")[2]


class RecordStore:
    """Values that we keep for the network."""

    def __init__(self, own: int) -> None:
        """`own`: our position in the key space."""
        self._own = own
        self._values: dict[str, _Value] = {}
        self._publishers: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._values)

    def put(self, key: str, value: bytes, now: float) -> bool:
        """Keep a value, in place of what was there; False when there is no room for it."""
        kept = _Value(value, now + RECORD_SECONDS, position(key.encode()) ^ self._own, publisher_of(key))
        if key not in self._values and not self._make_room(kept, now):
            return False
        if key not in self._values:
            self._publishers[kept.publisher] += 1
        self._values[key] = kept
        return True

    def get(self, key: str, now: float) -> bytes | None:
        """The value, unless it has expired."""
        kept = self._values.get(key)
        return kept.value if kept is not None and kept.expiry > now else None

    def _make_room(self, coming: _Value, now: float) -> bool:
        if len(self._values) < MAX_RECORDS and self._publishers[coming.publisher] < MAX_RECORDS_PER_PUBLISHER:
            return True
        for key in [key for key, kept in self._values.items() if kept.expiry <= now]:
            self._drop(key)
        if self._publishers[coming.publisher] >= MAX_RECORDS_PER_PUBLISHER:
            return False
        if len(self._values) >= MAX_RECORDS:
            farthest = max(self._values, key=lambda key: self._values[key].distance)
            if self._values[farthest].distance <= coming.distance:
                return False
            self._drop(farthest)
        return True

    def _drop(self, key: str) -> None:
        publisher = self._values.pop(key).publisher
        self._publishers[publisher] -= 1
        if not self._publishers[publisher]:
            del self._publishers[publisher]


@dataclass(frozen=True, slots=True)
class _Announcement:
    expiry: float
    network: str | None


class ProviderStore:
    """Who provides what."""

    def __init__(self, own: int) -> None:
        """`own`: our position in the key space."""
        self._own = own
        self._providers: dict[bytes, dict[NodeId, _Announcement]] = {}
        self._keys: Counter[NodeId] = Counter()

    def add(self, key: bytes, provider: NodeId, network: str | None, now: float) -> bool:
        """Keep or refresh an announcement of a provider in a network; False when there is no room for it."""
        self._expire(key, now)
        providers = self._providers.get(key, {})
        if provider not in providers:
            of_network = sum(one.network == network for one in providers.values()) if network is not None else 0
            is_full = len(providers) >= MAX_PROVIDERS_PER_KEY or of_network >= MAX_PROVIDERS_PER_NETWORK
            if is_full or self._keys[provider] >= MAX_KEYS_PER_PROVIDER or not self._make_room(key, now):
                return False
            self._keys[provider] += 1
        self._providers.setdefault(key, {})[provider] = _Announcement(now + PROVIDER_SECONDS, network)
        return True

    def get(self, key: bytes, now: float) -> list[NodeId]:
        """Providers of a key whose announcement has not expired, the newest first."""
        self._expire(key, now)
        providers = self._providers.get(key, {})
        return sorted(providers, key=lambda provider: -providers[provider].expiry)

    def _make_room(self, key: bytes, now: float) -> bool:
        if key in self._providers or len(self._providers) < MAX_PROVIDER_KEYS:
            return True
        for other in tuple(self._providers):
            self._expire(other, now)
        if len(self._providers) < MAX_PROVIDER_KEYS:
            return True
        farthest = max(self._providers, key=self._distance)
        if self._distance(farthest) <= self._distance(key):
            return False
        self._drop(*self._providers.pop(farthest))
        return True

    def _distance(self, key: bytes) -> int:
        return position(key) ^ self._own

    def _expire(self, key: bytes, now: float) -> None:
        providers = self._providers.get(key, {})
        expired = [provider for provider, one in providers.items() if one.expiry <= now]
        for provider in expired:
            del providers[provider]
        self._drop(*expired)
        if not providers:
            self._providers.pop(key, None)

    def _drop(self, *providers: NodeId) -> None:
        for provider in providers:
            self._keys[provider] -= 1
            if not self._keys[provider]:
                del self._keys[provider]
