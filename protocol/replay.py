"""Remembering what was seen, so that a message has its effect once."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, TypeAlias

from aci_p2p.protocol.envelope import Header
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.validation import Decision, Reason, require

MAX_PER_SENDER: Final = 512
"""Live messages of one sender on one topic: 8 per second over the 60 s that an offer lives. More is a flood."""
MAX_REMEMBERED: Final = 65_536
"""Messages remembered in all, below 40 MB; beyond it, the senders heard least recently are forgotten."""


_Key: TypeAlias = tuple[NodeId, int, bytes]
"""Sender, kind of message, weights root."""


class ReplayGuard:
    """Recognises envelopes seen before, by sender and sequence number. Bounded; a flood by one sender costs only it.

    There is a topic for each kind of message and model.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[_Key, dict[int, int]] = OrderedDict()
        self._count = 0

    def check(self, model_root: bytes, header: Header, now: int) -> None:
        """Raise MessageRefused if the message was seen or its sender floods its topic. Does not remember it."""
        key = _key(model_root, header)
        seen = self._seen.get(key, {})
        # Seen before; its forwarder may not know.
        require(header.sequence not in seen, Decision.IGNORE, Reason.REPLAYED)
        if len(seen) >= MAX_PER_SENDER:
            self._forget_expired(key, now)
        # No more live messages than an honest sender has.
        require(len(seen) < MAX_PER_SENDER, Decision.IGNORE, Reason.FLOODED)

    def remember(self, model_root: bytes, header: Header) -> None:
        """Remember a message whose signature was verified, until it expires."""
        key = _key(model_root, header)
        seen = self._seen.setdefault(key, {})
        self._count += header.sequence not in seen
        seen[header.sequence] = header.expires_at
        self._seen.move_to_end(key)
        while self._count > MAX_REMEMBERED:
            _, forgotten = self._seen.popitem(last=False)
            self._count -= len(forgotten)

    def _forget_expired(self, key: _Key, now: int) -> None:
        seen = self._seen[key]
        for sequence in [number for number, expires_at in seen.items() if expires_at <= now]:
            del seen[sequence]
            self._count -= 1

    def __len__(self) -> int:
        return self._count


def _key(model_root: bytes, header: Header) -> _Key:
    return header.sender, header.kind, model_root
