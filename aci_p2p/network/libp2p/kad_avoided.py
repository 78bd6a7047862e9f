"""Peers that a DHT node does not ask for a while. Pure: time is passed in.

Who cannot be reached is asked again when it connects anew. Who stays connected and yet lets one request after the other
time out holds up every lookup and every store, and would be back at once if all that it had to do was to say hello.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

from aci_p2p.network.buckets import TokenBucket
from aci_p2p.network.limits import MAX_KNOWN_PEERS
from aci_p2p.protocol.identity import NodeId

AVOID_SECONDS = 60.0
"""How long a peer that did not answer is not asked again, unless it connects anew, seconds."""
FAILURES_FORGIVEN = 3.0
"""Requests that a connected peer may leave without an answer at once: it may be busy."""
FAILURES_PER_SECOND = 1 / 600
"""Requests that a connected peer may leave without an answer in the long run, per second."""
LONG_AVOID_SECONDS = 1800.0
"""How long a peer that left more without an answer is not asked again, whatever it does, seconds."""

V = TypeVar("V")


class Avoided:
    """Who is not asked, at most MAX_KNOWN_PEERS of either kind."""

    def __init__(self) -> None:
        self._until: OrderedDict[NodeId, float] = OrderedDict()
        self._failing: OrderedDict[NodeId, float] = OrderedDict()
        self._patience: OrderedDict[NodeId, TokenBucket] = OrderedDict()

    def add(self, peer: NodeId, now: float) -> None:
        """A peer cannot be reached, or does not serve our protocol."""
        _put(self._until, peer, now + AVOID_SECONDS)

    def failed(self, peer: NodeId, now: float) -> None:
        """A connected peer did not answer a request; those that it was sent at the same time do not count."""
        is_new = self._until.get(peer, now) <= now
        self.add(peer, now)
        if not is_new:
            return
        patience = self._patience.get(peer) or TokenBucket.full(FAILURES_PER_SECOND, FAILURES_FORGIVEN, now)
        _put(self._patience, peer, patience)
        if not patience.take(1, now):
            _put(self._failing, peer, now + LONG_AVOID_SECONDS)

    def forgive(self, peer: NodeId, now: float) -> bool:
        """A peer has connected anew; False when it has failed too often to be asked again."""
        self._until.pop(peer, None)
        return self._failing.get(peer, now) <= now

    def peers(self, now: float) -> set[NodeId]:
        """Those who are not asked now."""
        return {peer for several in (self._until, self._failing) for peer, until in several.items() if until > now}


def _put(table: OrderedDict[NodeId, V], peer: NodeId, value: V) -> None:
    table[peer] = value
    table.move_to_end(peer)
    if len(table) > MAX_KNOWN_PEERS:
        table.popitem(last=False)
