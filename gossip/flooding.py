"""Telling who floods a topic from who passes a flood on. Pure.

A check ignores messages of an author who has MAX_PER_SENDER live ones already (`protocol/replay.py`). Its forwarder may
be honest: to that one the author may have sent others. But no honest node accepts, and so forwards, more than
MAX_PER_SENDER live messages of one author itself. Who brings us clearly more has them from nobody but the author.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from aci_p2p.protocol.envelope import Header
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.replay import MAX_PER_SENDER

MAX_FORWARDED: Final = MAX_PER_SENDER * 3 // 2
"""Live messages of one author beyond its limit that one neighbour may bring; half more, since clocks differ."""
MAX_WITNESSED: Final = 256
"""Pairs of neighbour and author watched; the least recent make room."""


class FloodWitness:
    """Counts live messages beyond their author's limit, by the neighbour that brought them."""

    def __init__(self) -> None:
        self._expiries: OrderedDict[tuple[NodeId, NodeId], list[int]] = OrderedDict()

    def is_flooding(self, forwarder: NodeId, header: Header, now: int) -> bool:
        """Count a message whose author is over its limit; whether its forwarder is a flooder (`now`: Unix ms)."""
        pair = (forwarder, header.sender)
        expiries = self._expiries.setdefault(pair, [])
        self._expiries.move_to_end(pair)
        if len(self._expiries) > MAX_WITNESSED:
            self._expiries.popitem(last=False)
        if len(expiries) >= MAX_FORWARDED:
            expiries[:] = [expires_at for expires_at in expiries if expires_at > now]
            if len(expiries) >= MAX_FORWARDED:
                return True
        expiries.append(header.expires_at)
        return False
