"""Peers that answered lately and where, so that a node comes back when every bootstrap node is down. No I/O."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, cast

from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import SECOND
from aci_p2p.protocol.publications import MAX_ADDRESS_BYTES, MAX_ADDRESSES

MAX_CACHED: Final = 256
"""Peers that are remembered, the latest; one in ten alive is plenty to come back."""
MAX_UNDIALLED: Final = MAX_CACHED // 2
"""Of which so many may have dialled us only: whoever comes with ever new identities displaces no others. Where they
say that they can be dialled, nobody has seen."""
MAX_AGE_MS: Final = 30 * 24 * 3_600 * SECOND
"""Milliseconds that a peer is remembered: few addresses hold longer than a month."""
MAX_FILE_BYTES: Final = MAX_CACHED * (MAX_ADDRESSES * (MAX_ADDRESS_BYTES + 16) + 256)
"""Bytes of the largest file."""

_VERSION: Final = 1


class CacheDamaged(LocalError):
    """The address cache holds something else than addresses."""

    code = "cache_damaged"


@dataclass(frozen=True, slots=True)
class CachedPeer:
    """A peer that answered."""

    peer: NodeId
    """Its identity."""
    addresses: tuple[str, ...]
    """Multiaddrs with `/p2p/`, those that have worked first."""
    seen: int
    """When it was connected last, Unix milliseconds."""
    dialled: bool = False
    """Whether it was we who dialled, so that it was where it says."""


class AddressCache:
    """At most MAX_CACHED peers: those that we have dialled first, and the latest of both kinds first."""

    def __init__(self, peers: Iterable[CachedPeer] = ()) -> None:
        self._peers = {peer.peer: peer for peer in peers}

    @property
    def peers(self) -> tuple[CachedPeer, ...]:
        """What is remembered, the best first."""
        return tuple(sorted(self._peers.values(), key=lambda cached: (not cached.dialled, -cached.seen)))

    def note(self, peer: NodeId, addresses: Sequence[str], now: int, *, dialled: bool = False) -> None:
        """A peer is connected, because we have `dialled` it or it us, and says that it can be dialled there."""
        usable = tuple(address for address in addresses if len(address) <= MAX_ADDRESS_BYTES)[:MAX_ADDRESSES]
        if usable:
            dialled = dialled or (peer in self._peers and self._peers[peer].dialled)
            self._peers[peer] = CachedPeer(peer, usable, now, dialled)
        if len(self._peers) > MAX_CACHED:
            undialled = [cached for cached in self._peers.values() if not cached.dialled]
            others = [cached for cached in self._peers.values() if cached.dialled]
            replaceable = undialled if len(undialled) > MAX_UNDIALLED else others
            del self._peers[min(replaceable, key=lambda cached: cached.seen).peer]

    def encode(self) -> bytes:
        """The file: JSON, for people, too."""
        peers = [
            {
                "peer": str(cached.peer),
                "addresses": list(cached.addresses),
                "seen": cached.seen,
                "dialled": cached.dialled,
            }
            for cached in self.peers
        ]
        return json.dumps({"version": _VERSION, "peers": peers}, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes, now: int) -> AddressCache:
        """Read a file; peers last seen over MAX_AGE_MS ago are forgotten. Raises CacheDamaged."""
        try:
            return cls(_read(data, now))
        except (ValueError, TypeError, KeyError, RecursionError, LocalError) as error:
            msg = f"the address cache is damaged: {error}"
            raise CacheDamaged(msg) from error


def _read(data: bytes, now: int) -> list[CachedPeer]:
    if len(data) > MAX_FILE_BYTES:
        msg = f"{len(data)} bytes"
        raise ValueError(msg)
    value = json.loads(data)
    if value["version"] != _VERSION:
        msg = f"version {value['version']!r}"
        raise ValueError(msg)
    found: list[CachedPeer] = []
    for entry in cast("list[dict[str, object]]", value["peers"])[:MAX_CACHED]:
        name, addresses, seen = entry["peer"], entry["addresses"], entry["seen"]
        if not isinstance(name, str) or not isinstance(addresses, list) or type(seen) is not int:
            msg = "an entry is none"
            raise ValueError(msg)
        peer = NodeId.parse(name)
        kept = tuple(address for address in cast("list[object]", addresses) if _is_address(address, peer))
        # A clock that was set back must not keep a peer for ever.
        if now - MAX_AGE_MS < seen and kept:
            places = cast("tuple[str, ...]", kept)[:MAX_ADDRESSES]
            found.append(CachedPeer(peer, places, min(seen, now), entry.get("dialled") is True))
    return found


def _is_address(value: object, peer: NodeId) -> bool:
    return isinstance(value, str) and len(value) <= MAX_ADDRESS_BYTES and value.endswith(f"/p2p/{peer}")
