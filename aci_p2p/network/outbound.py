"""Keeping to what peers serve. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

from aci_p2p.network.api import NoFreeStream
from aci_p2p.network.limits import MAX_STREAMS_TO_PEER
from aci_p2p.protocol.identity import NodeId


class OutboundStreams:
    """The streams that we have open: at most MAX_STREAMS_TO_PEER to each peer, which resets those beyond its own limit.

    A peer that has to do so again and again has nothing more to do with us.
    """

    def __init__(self) -> None:
        self._open: Counter[NodeId] = Counter()

    @contextmanager
    def opening(self, peer: NodeId) -> Generator[None]:
        """A stream to a peer is opened and used within the block. Raises NoFreeStream."""
        if self._open[peer] >= MAX_STREAMS_TO_PEER:
            msg = f"{peer.short} serves {MAX_STREAMS_TO_PEER} of our streams already"
            raise NoFreeStream(msg, hint="wait for one of them to end")
        self._open[peer] += 1
        try:
            yield
        finally:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]
