"""The Kademlia routing table. Pure.

Sources: Maymounkov and Mazieres, "Kademlia" (2002); https://github.com/libp2p/specs/tree/master/kad-dht; the limits per
network after Prünster et al., "Total Eclipse of the Heart" (2022), which filled IPFS tables from few addresses.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from aci_p2p.protocol.identity import NodeId

BUCKET_SIZE = 20
"""Peers in a bucket, and that keep a record (Kademlia's k)."""
MAX_PER_NETWORK_IN_BUCKET = 3
"""Peers of one /24 (IPv6: /48) network in one bucket: whoever rents a network gets a seventh of it."""
MAX_PER_NETWORK = 12
"""Peers of one /24 (IPv6: /48) network in the whole table."""
MAX_STANDBYS = 5
"""Peers that wait for a place in one bucket, the latest of them."""

_CACHED = 8192
_PREFIX = {4: 24, 6: 48}


def position(key: bytes) -> int:
    """Where a key or a binary peer id lies in the 256-bit key space: its SHA-256."""
    return int.from_bytes(hashlib.sha256(key).digest())


@lru_cache(_CACHED)
def position_of(peer: NodeId) -> int:
    """Where a peer lies in the key space."""
    return position(peer.peer_id)


def closest(peers: Iterable[NodeId], target: int, count: int) -> list[NodeId]:
    """The `count` peers nearest to a position, nearest first, by XOR distance."""
    return sorted(peers, key=lambda peer: position_of(peer) ^ target)[:count]


@lru_cache(_CACHED)
def network_of(source: str) -> str | None:
    """What the peers behind one operator have in common: the /24 (IPv6: /48) network of an address.

    `source`: an IP address, a network, or a relay's name, which stands for itself. None for addresses that are not
    global: whoever has those is in our own network, where all nodes may have the same prefix.
    """
    try:
        address = ipaddress.ip_address(source.partition("/")[0])
    except ValueError:
        return source if source.startswith("relay ") else None
    if not address.is_global:
        return None
    return str(ipaddress.ip_network((address, _PREFIX[address.version]), strict=False))


class _Bucket:
    def __init__(self) -> None:
        self.members: dict[NodeId, str | None] = {}
        """Peers and their networks, the one heard from longest ago first."""
        self.standbys: dict[NodeId, str | None] = {}


class RoutingTable:
    """Peers known to speak Kademlia: up to BUCKET_SIZE for each distance, the long-known preferred.

    Peers of one network have few places: with addresses of one network alone, nobody fills a bucket.
    """

    def __init__(self, node_id: NodeId) -> None:
        self._position = position_of(node_id)
        self._buckets: dict[int, _Bucket] = {}
        self._networks: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(len(bucket.members) for bucket in self._buckets.values())

    def __contains__(self, peer: NodeId) -> bool:
        return peer in self._bucket(peer).members

    def add(self, peer: NodeId, network: str | None) -> bool:
        """Add a peer of a network (see `network_of`).

        False when it is there already, is ourselves, its network has enough places, or its bucket is full. In the last
        case it waits for a place: see `oldest_beside`.
        """
        bucket = self._bucket(peer)
        if position_of(peer) == self._position or peer in bucket.members or not self._has_place_for(network, bucket):
            return False
        if len(bucket.members) >= BUCKET_SIZE:
            bucket.standbys.pop(peer, None)
            bucket.standbys[peer] = network
            if len(bucket.standbys) > MAX_STANDBYS:
                del bucket.standbys[next(iter(bucket.standbys))]
            return False
        self._enter(bucket, peer, network)
        return True

    def oldest_beside(self, peer: NodeId) -> NodeId | None:
        """Whom to ask whether it is still there, so that a peer may get its place; None when the peer does not wait."""
        bucket = self._bucket(peer)
        return next(iter(bucket.members)) if peer in bucket.standbys else None

    def heard_from(self, peer: NodeId) -> None:
        """A peer is alive."""
        members = self._bucket(peer).members
        if peer in members:
            members[peer] = members.pop(peer)

    def remove(self, peer: NodeId) -> None:
        """Drop a peer that does not answer; the latest of those that wait for a place gets its."""
        bucket = self._bucket(peer)
        bucket.standbys.pop(peer, None)
        if peer not in bucket.members:
            return
        network = bucket.members.pop(peer)
        if network is not None:
            self._networks[network] -= 1
            if not self._networks[network]:
                del self._networks[network]
        for standby, its_network in reversed(tuple(bucket.standbys.items())):
            if self._has_place_for(its_network, bucket):
                del bucket.standbys[standby]
                self._enter(bucket, standby, its_network)
                return

    def closest(self, target: int, count: int) -> list[NodeId]:
        """The `count` peers nearest to a position, nearest first."""
        return closest((peer for bucket in self._buckets.values() for peer in bucket.members), target, count)

    def _bucket(self, peer: NodeId) -> _Bucket:
        return self._buckets.setdefault((position_of(peer) ^ self._position).bit_length(), _Bucket())

    def _enter(self, bucket: _Bucket, peer: NodeId, network: str | None) -> None:
        bucket.members[peer] = network
        if network is not None:
            self._networks[network] += 1

    def _has_place_for(self, network: str | None, bucket: _Bucket) -> bool:
        if network is None:
            return True
        in_bucket = sum(other == network for other in bucket.members.values())
        return in_bucket < MAX_PER_NETWORK_IN_BUCKET and self._networks[network] < MAX_PER_NETWORK


def diverse(peers: Iterable[tuple[NodeId, str | None]], count: int) -> list[NodeId]:
    """The first `count` of the peers, of each network no more than a bucket would hold."""
    networks: Counter[str] = Counter()
    chosen: list[NodeId] = []
    for peer, network in peers:
        if len(chosen) >= count:
            break
        if network is not None:
            networks[network] += 1
            if networks[network] > MAX_PER_NETWORK_IN_BUCKET:
                continue
        chosen.append(peer)
    return chosen
