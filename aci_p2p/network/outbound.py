"""Keeping to what peers serve. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

from aci_p2p.network.api import NoFreeStream
from aci_p2p.network.limits import MAX_STREAMS_TO_PEER
from aci_p2p.protocol.identity import NodeId


class OutboundStreams:
    """The streams that we have open: at most MAX_STREAMS_TO_PEER of a protocol to each peer.

    Those beyond its own limit a peer resets, and it throws out who tries again and again.
    """

    def __init__(self) -> None:
        self._open: Counter[tuple[NodeId, str]] = Counter()

    @contextmanager
    def opening(self, peer: NodeId, protocol: str) -> Generator[None]:
        """A stream to a connected peer is opened and used within the block. Raises NoFreeStream."""
        place = (peer, protocol)
        if self._open[place] >= MAX_STREAMS_TO_PEER:
            msg = f"{peer.short} serves {MAX_STREAMS_TO_PEER} of our streams already"
            raise NoFreeStream(msg, hint="wait for one of them to end")
        self._open[place] += 1
        try:
            yield
        finally:
            self._open[place] -= 1
            if not self._open[place]:
                del self._open[place]
