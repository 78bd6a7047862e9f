"""Streams between endpoints in one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf

import trio

from aci_p2p.network.api import Stream, StreamClosed
from aci_p2p.network.checks import check_frame
from aci_p2p.protocol.identity import NodeId

WINDOW_BYTES = 256 << 10
"""Bytes in flight in one direction of a stream before `send` waits, as in yamux."""


def _at_once(_frame: bytes) -> float:
    return trio.current_time()


def _perform(action: Callable[[], None]) -> None:
    action()


class Pipe:
    """One direction of a stream: frames become readable, in order, when they arrive."""

    def __init__(self, arrival: Callable[[bytes], float] = _at_once) -> None:
        """`arrival`: when a frame that is sent now arrives, on trio's clock; inf: not before `release`."""
        self._arrival = arrival
        self._frames: deque[tuple[float, bytes | None]] = deque()
        self._buffered = 0
        self._ended = False
        self._unread = False
        self._broken = False
        self._changed = trio.Event()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def send(self, frame: bytes) -> None:
        """Put a frame in, waiting while a window's worth is unread. Raises StreamClosed."""
        await trio.lowlevel.checkpoint()
        while not (self._ended or self._unread) and self._buffered >= WINDOW_BYTES:
            await self._changed.wait()
        if self._ended or self._unread:
            msg = "the peer closed the stream"
            raise StreamClosed(msg)
        self._put(frame)
        self._buffered += len(frame)
        self._notify()

    def _put(self, frame: bytes | None) -> None:
        # Taken out in this order, so that a frame that could arrive before another waits for it.
        self._frames.append((self._arrival(frame or b""), frame))

    async def receive(self) -> bytes:
        """Take the next frame out when it has arrived. Raises StreamClosed."""
        await trio.lowlevel.checkpoint()
        while True:
            if self._broken:
                msg = "the peer reset the stream"
                raise StreamClosed(msg)
            due, frame = self._frames[0] if self._frames else (inf, b"")
            if due > trio.current_time():
                with trio.move_on_at(due):
                    await self._changed.wait()
                continue
            if frame is None:
                msg = "the peer ended the stream"
                raise StreamClosed(msg)
            self._frames.popleft()
            self._buffered -= len(frame)
            self._notify()
            return frame

    def release(self) -> None:
        """Send anew what could not be sent."""
        frames, self._frames = self._frames, deque()
        for due, frame in frames:
            if due == inf:
                self._put(frame)
            else:
                self._frames.append((due, frame))
        self._notify()

    def end(self) -> None:
        """No more frames: what was sent stays readable."""
        if not (self._ended or self._unread):
            self._put(None)
        self._ended = True
        self._notify()

    def refuse(self) -> None:
        """The writer learns that nobody reads any more."""
        self._unread = True
        self._notify()

    def break_off(self) -> None:
        """The reader loses everything, at once."""
        self._broken = True
        self._frames.clear()
        self._notify()


class MemoryStream(Stream):
    """One end of a stream between two endpoints of a hub."""

    def __init__(
        self,
        peer: NodeId,
        incoming: Pipe,
        outgoing: Pipe,
        carry: Callable[[Callable[[], None]], None] = _perform,
    ) -> None:
        """`carry` lets the other end feel something, as soon as the medium allows."""
        self._peer = peer
        self._incoming = incoming
        self._outgoing = outgoing
        self._carry = carry

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
        self._carry(self._incoming.refuse)

    def reset(self) -> None:
        """Lose everything in both directions."""
        self._outgoing.refuse()
        self._incoming.break_off()
        self._carry(self._incoming.refuse)
        self._carry(self._outgoing.break_off)
