"""How much gossip a neighbour may send us, before anything in it is looked at. Pure: time is an argument.

What is worth its cost is free: each message that we do not reject gives every neighbour the right to bring one of its
size, so an honest burst of any rate, and its copies from the rest of the mesh, cost nobody anything. What is left is
paid from an account of entries and bytes: duplicates beyond one a neighbour, invalid messages, control messages. Who
overdraws it floods, for no honest neighbour is led to.

Ignored messages have an account of their own, and overdrawing that is nobody's fault: an attacker that tells two honest
nodes different things makes each of them send the other what it ignores. They are only kept from taking our time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from aci_p2p.network.limits import MAX_KNOWN_PEERS
from aci_p2p.protocol.identity import NodeId

ENTRIES_PER_SECOND = 100.0
"""Worthless messages and control entries on average. An honest neighbour sends a few control entries a heartbeat and
topic; a hundred forgeries a second cost us 1% of a core."""
MAX_ENTRIES = 2_048.0
"""Worthless entries that an account holds: twice what a neighbour repeats when it meets us (RECENT_MESSAGES)."""
BYTES_PER_SECOND = 256 * 1024.0
"""Worthless bytes on average: announcements take 16 KiB a heartbeat and topic at most."""
MAX_BYTES = 4 * 1024 * 1024.0
"""Worthless bytes that an account holds: twice what an outbox holds of the messages that a neighbour repeats."""
IGNORED_PER_SECOND = 100.0
"""Ignored messages on average; they cost as much as forgeries."""
MAX_IGNORED = 2_048.0
"""Ignored messages at once: a burst by an author who is over its limit here and not where it came from."""
RETAIN_SECONDS = max(MAX_ENTRIES / ENTRIES_PER_SECOND, MAX_BYTES / BYTES_PER_SECOND, MAX_IGNORED / IGNORED_PER_SECOND)
"""How long the account of a peer that left is kept, seconds: then it would be full again."""


class Admission(Enum):
    """What becomes of an RPC."""

    ADMITTED = "admitted"
    """It is handled."""
    THROTTLED = "throttled"
    """It is dropped, for its sender brings too much that we ignore."""
    FLOODING = "flooding"
    """It is dropped, and its sender to blame."""


@dataclass(slots=True)
class _Account:
    updated: float
    credited_entries: int
    credited_bytes: int
    entries: float = MAX_ENTRIES
    bytes: float = MAX_BYTES
    ignored: float = MAX_IGNORED


class FloodGuard:
    """One account for each neighbour."""

    def __init__(self) -> None:
        self._accounts: dict[NodeId, _Account] = {}
        self._retained: dict[NodeId, tuple[float, _Account]] = {}
        self._circulated_entries = 0
        self._circulated_bytes = 0

    def add_peer(self, peer: NodeId, now: float) -> None:
        """A peer has connected; `now` in seconds. One that comes back soon finds its account as it left it."""
        _, account = self._retained.pop(peer, (now, None))
        self._accounts[peer] = account or _Account(now, self._circulated_entries, self._circulated_bytes)

    def remove_peer(self, peer: NodeId, now: float) -> None:
        """A peer has left."""
        self._retained[peer] = (now, self._accounts.pop(peer))
        while len(self._retained) > MAX_KNOWN_PEERS or next(iter(self._retained.values()))[0] < now - RETAIN_SECONDS:
            del self._retained[next(iter(self._retained))]

    def admit(self, peer: NodeId, entries: int, size: int, now: float) -> Admission:
        """Charge a neighbour for an RPC of so many entries and bytes, unless its account is overdrawn already.

        An account is filled up when it is empty, not before: this is called for every RPC.
        """
        account = self._accounts[peer]
        if account.entries <= 0 or account.bytes <= 0 or account.ignored <= 0:
            self._fill_up(account, now)
            if account.entries <= 0 or account.bytes <= 0:
                return Admission.FLOODING
            if account.ignored <= 0:
                return Admission.THROTTLED
        account.entries -= entries
        account.bytes -= size
        return Admission.ADMITTED

    def _fill_up(self, account: _Account, now: float) -> None:
        elapsed = now - account.updated
        circulated = self._circulated_entries - account.credited_entries
        account.entries = min(account.entries + ENTRIES_PER_SECOND * elapsed + circulated, MAX_ENTRIES)
        circulated = self._circulated_bytes - account.credited_bytes
        account.bytes = min(account.bytes + BYTES_PER_SECOND * elapsed + circulated, MAX_BYTES)
        account.ignored = min(account.ignored + IGNORED_PER_SECOND * elapsed, MAX_IGNORED)
        account.updated = now
        account.credited_entries, account.credited_bytes = self._circulated_entries, self._circulated_bytes

    def circulates(self, size: int) -> None:
        """A new message of so many bytes, framing included, may be on its way from every neighbour."""
        self._circulated_entries += 1
        self._circulated_bytes += size

    def ignore(self, peer: NodeId) -> None:
        """A neighbour was the first to bring a message that we ignored."""
        account = self._accounts.get(peer)
        if account is not None:
            account.ignored -= 1
