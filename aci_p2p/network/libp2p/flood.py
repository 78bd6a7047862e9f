"""How much gossip a neighbour may send us, before anything in it is looked at. Pure: time is an argument.

What is worth its cost is free: each message that we judge valid gives every neighbour the right to bring one of its
size, so an honest burst of any rate, and its copies from the rest of the mesh, cost nobody anything. What is left is
paid from two token buckets, of entries and of bytes: duplicates beyond one a neighbour, invalid and ignored messages,
control messages.
"""

from __future__ import annotations

from dataclasses import dataclass

from aci_p2p.network.buckets import TokenBucket
from aci_p2p.network.limits import MAX_KNOWN_PEERS
from aci_p2p.protocol.identity import NodeId

ENTRIES_PER_SECOND = 100.0
"""Worthless messages and control entries on average. An honest neighbour sends a few control entries a heartbeat and
topic; a hundred forgeries a second cost us 1% of a core."""
ENTRIES_BURST = 4_096.0
"""Worthless entries at once: what a neighbour repeats when it meets us (RECENT_MESSAGES), several times over."""
BYTES_PER_SECOND = 256 * 1024.0
"""Worthless bytes on average: announcements take 16 KiB a heartbeat and topic at most."""
BYTES_BURST = 8 * 1024 * 1024.0
"""Worthless bytes at once: RECENT_MESSAGES of ordinary size several times over."""
RETAIN_SECONDS = BYTES_BURST / BYTES_PER_SECOND
"""How long the account of a peer that left is kept, seconds: then it would be full again."""


@dataclass(slots=True)
class _Account:
    entries: TokenBucket
    bytes: TokenBucket
    seen_entries: int
    seen_bytes: int
    left: float = 0.0


class FloodGuard:
    """One account for each neighbour."""

    def __init__(self) -> None:
        self._accounts: dict[NodeId, _Account] = {}
        self._retained: dict[NodeId, _Account] = {}
        self._valid_entries = 0
        self._valid_bytes = 0

    def add_peer(self, peer: NodeId, now: float) -> None:
        """A peer has connected; `now` in seconds. One that comes back finds its account as it left it."""
        account = self._retained.pop(peer, None)
        if account is None:
            entries = TokenBucket.full(ENTRIES_PER_SECOND, ENTRIES_BURST, now)
            size = TokenBucket.full(BYTES_PER_SECOND, BYTES_BURST, now)
            account = _Account(entries, size, self._valid_entries, self._valid_bytes)
        self._accounts[peer] = account

    def remove_peer(self, peer: NodeId, now: float) -> None:
        """A peer has left."""
        account = self._accounts.pop(peer)
        account.left = now
        self._retained[peer] = account
        while len(self._retained) > MAX_KNOWN_PEERS or now - next(iter(self._retained.values())).left > RETAIN_SECONDS:
            del self._retained[next(iter(self._retained))]

    def admit(self, peer: NodeId, entries: int, size: int, now: float) -> bool:
        """Charge a neighbour for an RPC of so many entries and bytes; False when its account is overdrawn already."""
        account = self._accounts[peer]
        account.entries.refill(now, more=self._valid_entries - account.seen_entries)
        account.bytes.refill(now, more=self._valid_bytes - account.seen_bytes)
        account.seen_entries, account.seen_bytes = self._valid_entries, self._valid_bytes
        if account.entries.level <= 0 or account.bytes.level <= 0:
            return False
        account.entries.level -= entries
        account.bytes.level -= size
        return True

    def circulates(self, size: int) -> None:
        """A new message of so many bytes, framing included, may be on its way from every neighbour."""
        self._valid_entries += 1
        self._valid_bytes += size

    def charge(self, peer: NodeId, size: int) -> None:
        """Take back from the bringer of a message what `circulates` gave it: it was the first, and not valid."""
        account = self._accounts.get(peer)
        if account is not None:
            account.entries.level -= 1
            account.bytes.level -= size
