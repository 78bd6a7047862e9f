"""Sharing out what one endpoint serves among the peers that ask. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import trio

from aci_p2p.network.limits import MAX_STREAMS, MAX_STREAMS_PER_PEER
from aci_p2p.protocol.identity import NodeId

S = TypeVar("S")


class InboundStreams(Generic[S]):
    """The streams that are being served: at most MAX_STREAMS_PER_PEER of each peer, and MAX_STREAMS in all."""

    def __init__(self, is_needed: Callable[[S], bool] = lambda _stream: False) -> None:
        """`is_needed` says which streams are ended last."""
        self._is_needed = is_needed
        self._of_peer: dict[NodeId, dict[S, trio.CancelScope]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._of_peer.values()))

    def is_full_for(self, peer: NodeId) -> bool:
        """Whether a peer has as many as it may have."""
        return len(self._of_peer.get(peer, ())) >= MAX_STREAMS_PER_PEER

    def add(self, peer: NodeId, stream: S) -> trio.CancelScope | None:
        """Enter another stream; the scope in which it is to be served, None when it is not taken.

        When all are taken, a stream of the peer that has most is cancelled in its favour.
        """
        streams = self._of_peer.get(peer, {})
        if self.is_full_for(peer) or (len(self) >= MAX_STREAMS and not self._make_room_beside(len(streams))):
            return None
        scope = streams[stream] = trio.CancelScope()
        self._of_peer[peer] = streams
        return scope

    def _make_room_beside(self, count: int) -> bool:
        """End a stream of the peer that has most, in favour of one that has `count`; False if that is no fairer."""
        streams = max(self._of_peer.values(), key=len)
        if len(streams) <= count + 1:
            return False
        # The oldest that nobody needs, if there is one.
        chosen = min(streams, key=self._is_needed)
        streams.pop(chosen).cancel()
        return True

    def remove(self, peer: NodeId, stream: S) -> None:
        """A stream is over."""
        streams = self._of_peer.get(peer, {})
        streams.pop(stream, None)
        if not streams:
            self._of_peer.pop(peer, None)
