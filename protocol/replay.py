"""Remembering what was seen, so that a message has its effect once."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from aci_p2p.protocol.envelope import Header
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.validation import Decision, Reason, require

MAX_PER_SENDER: Final = 512
"""Live messages of one sender: 8 per second over the 60 s that an offer lives. More is a flood."""
MAX_SENDERS: Final = 8_192
"""Senders remembered; beyond it, those heard least recently are forgotten."""


class ReplayGuard:
    """Recognises envelopes seen before, by sender and sequence number. Bounded; a flood by one sender costs only it."""

    def __init__(self) -> None:
        self._seen: OrderedDict[NodeId, dict[int, int]] = OrderedDict()

    def check(self, header: Header, now: int) -> None:
        """Raise MessageRefused if the message was seen or its sender floods. Does not remember it."""
        seen = self._seen.get(header.sender, {})
        # Seen before; its forwarder may not know.
        require(header.sequence not in seen, Decision.IGNORE, Reason.REPLAYED)
        if len(seen) >= MAX_PER_SENDER:
            self._forget_expired(header.sender, now)
        # No more live messages than an honest sender has.
        require(len(seen) < MAX_PER_SENDER, Decision.IGNORE, Reason.FLOODED)

    def remember(self, header: Header, now: int) -> None:
        """Remember a message whose signature was verified, until it expires."""
        self._seen.setdefault(header.sender, {})[header.sequence] = header.expires_at
        self._seen.move_to_end(header.sender)
        if len(self._seen) > MAX_SENDERS:
            self._seen.popitem(last=False)
        if len(self._seen[header.sender]) >= MAX_PER_SENDER:
            self._forget_expired(header.sender, now)

    def _forget_expired(self, sender: NodeId, now: int) -> None:
        seen = self._seen[sender]
        for sequence in [number for number, expires_at in seen.items() if expires_at <= now]:
            del seen[sequence]

    def __len__(self) -> int:
        return sum(len(seen) for seen in self._seen.values())
