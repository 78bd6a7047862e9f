"""Remembering what was seen, so that a message has its effect once."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from aci_p2p.protocol.envelope import Header
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.validation import Decision, Reason, require

MAX_PER_SENDER: Final = 512
"""Live messages of one sender: 8 per second over the 60 s that an offer lives. More is a flood."""
MAX_REMEMBERED: Final = 65_536
"""Messages remembered in all, below 40 MB; beyond it, the senders heard least recently are forgotten."""


class ReplayGuard:
    """Recognises envelopes seen before, by sender and sequence number. Bounded; a flood by one sender costs only it."""

    def __init__(self) -> None:
        self._seen: OrderedDict[NodeId, dict[int, int]] = OrderedDict()
        self._count = 0

    def check(self, header: Header, now: int) -> None:
        """Raise MessageRefused if the message was seen or its sender floods. Does not remember it."""
        seen = self._seen.get(header.sender, {})
        # Seen before; its forwarder may not know.
        require(header.sequence not in seen, Decision.IGNORE, Reason.REPLAYED)
        if len(seen) >= MAX_PER_SENDER:
            self._forget_expired(header.sender, now)
        # No more live messages than an honest sender has.
        require(len(seen) < MAX_PER_SENDER, Decision.IGNORE, Reason.FLOODED)

    def remember(self, header: Header) -> None:
        """Remember a message whose signature was verified, until it expires."""
        seen = self._seen.setdefault(header.sender, {})
        self._count += header.sequence not in seen
        seen[header.sequence] = header.expires_at
        self._seen.move_to_end(header.sender)
        while self._count > MAX_REMEMBERED:
            _, forgotten = self._seen.popitem(last=False)
            self._count -= len(forgotten)

    def _forget_expired(self, sender: NodeId, now: int) -> None:
        seen = self._seen[sender]
        for sequence in [number for number, expires_at in seen.items() if expires_at <= now]:
            del seen[sequence]
            self._count -= 1

    def __len__(self) -> int:
        return self._count
