"""Streams between endpoints in one process."""

from __future__ import annotations

from collections import deque

import trio

from aci_p2p.network.api import Stream, StreamClosed
from aci_p2p.network.checks import check_frame
from aci_p2p.protocol.identity import NodeId

WINDOW_BYTES = 256 << 10
"""Bytes in flight in one direction of a stream before `send` waits, as in yamux."""


class Pipe:
    """One direction of a stream: frames become readable `latency` after they were sent."""

    def __init__(self, latency: float) -> None:
        self._latency = latency
        self._frames: deque[tuple[float, bytes]] = deque()
        self._buffered = 0
        self._ended = False
        self._broken = False
        self._changed = trio.Event()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def send(self, frame: bytes) -> None:
        """Put a frame in, waiting while a window's worth is unread. Raises StreamClosed."""
        await trio.lowlevel.checkpoint()
        while not (self._ended or self._broken) and self._buffered >= WINDOW_BYTES:
            await self._changed.wait()
        if self._ended or self._broken:
            msg = "the peer closed the stream"
            raise StreamClosed(msg)
        self._frames.append((trio.current_time() + self._latency, frame))
        self._buffered += len(frame)
        self._notify()

    async def receive(self) -> bytes:
        """Take the next frame out when it is due. Raises StreamClosed."""
        await trio.lowlevel.checkpoint()
        while True:
            if self._broken:
                msg = "the peer reset the stream"
                raise StreamClosed(msg)
            if self._frames:
                due, frame = self._frames[0]
                if due <= trio.current_time():
                    self._frames.popleft()
                    self._buffered -= len(frame)
                    self._notify()
                    return frame
                with trio.move_on_at(due):
                    await self._changed.wait()
            elif self._ended:
                msg = "the peer ended the stream"
                raise StreamClosed(msg)
            else:
                await self._changed.wait()

    def end(self) -> None:
        """No more frames: what is buffered stays readable."""
        self._ended = True
        self._notify()

    def break_off(self) -> None:
        """Lose everything, at once."""
        self._broken = True
        self._frames.clear()
        self._notify()


class MemoryStream(Stream):
    """One end of a stream between two endpoints of a hub."""

    def __init__(self, peer: NodeId, incoming: Pipe, outgoing: Pipe) -> None:
        self._peer = peer
        self._incoming = incoming
        self._outgoing = outgoing

    @property
    def peer(self) -> NodeId:
        return self._peer

    async def send(self, frame: bytes) -> None:
        check_frame(frame)
        await self._outgoing.send(frame)

    async def receive(self) -> bytes:
        return await self._incoming.receive()

    def close(self) -> None:
        """End our side; what was sent still arrives."""
        self._outgoing.end()
        self._incoming.break_off()

    def reset(self) -> None:
        """Lose everything in both directions."""
        self._outgoing.break_off()
        self._incoming.break_off()
