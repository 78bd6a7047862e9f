"""yamux: many streams over one encrypted connection.

Replaces py-libp2p's muxer, which does not enforce its receive window, gives up a write after a reader has paused for
five seconds, polls while it waits, and cannot be exchanged (`muxer_multistream` hard-codes it).

Every buffer here is bounded: a stream holds at most one window, a connection at most MAX_BUFFERED_BYTES, and a peer
that makes us queue answers faster than it reads them is disconnected.

Source: https://github.com/hashicorp/yamux/blob/master/spec.md
"""

from __future__ import annotations

import math
import struct
from collections import deque
from typing import TYPE_CHECKING, Protocol

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

PROTOCOL = "/yamux/1.0.0"
"""Protocol id negotiated for the connection."""
WINDOW_BYTES = 256 << 10
"""Receive window of a stream, bytes: the protocol's initial window, never enlarged. 20 Mbit/s at 100 ms."""
MAX_BUFFERED_BYTES = 4 << 20
"""Received and not yet read on one connection, bytes: sixteen full windows."""
MAX_QUEUED_BYTES = 1 << 20
"""Waiting to be sent on one connection, bytes. Data waits at HIGH_WATER_BYTES; only answers to what the peer sends can
grow the queue to this, so the peer is not reading what it asked for."""
HIGH_WATER_BYTES = 128 << 10
"""Data is held back while more than this is waiting to be sent, bytes: two Noise messages."""
FRAME_PAYLOAD_BYTES = 32 << 10
"""Largest data frame that we send, bytes: small enough that streams take turns."""
BATCH_BYTES = 65_519
"""Written at once, bytes: the plaintext of the largest Noise message."""
MAX_OUTBOUND_STREAMS = 512
"""Streams that we keep open on one connection."""
KEEPALIVE_SECONDS = 30.0
"""Time between pings, seconds."""
KEEPALIVE_TIMEOUT_SECONDS = 20.0
"""A peer that does not answer a ping for this long is gone, seconds."""
CLOSE_SECONDS = 0.3
"""How long closing waits for queued frames to leave, seconds."""

_HEADER = struct.Struct(">BBHII")
_DATA, _WINDOW_UPDATE, _PING, _GO_AWAY = range(4)
_SYN, _ACK, _FIN, _RST = 1, 2, 4, 8
_GO_AWAY_NORMAL = 0
_MAX_STREAM_ID = 2**32 - 1


class YamuxError(Exception):
    """The peer broke the yamux protocol or is gone."""


class StreamReset(Exception):  # noqa: N818 - an event, not a mistake
    """The stream was reset, or its connection was lost."""


class StreamEnded(Exception):  # noqa: N818 - an event, not a mistake
    """The peer ended the stream; everything it sent has been read."""


class Connection(Protocol):
    """The encrypted connection underneath."""

    async def receive(self) -> bytes:
        """The next chunk of bytes."""
        ...

    async def write(self, data: bytes) -> None:
        """Send bytes."""
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class YamuxStream:
    """A bidirectional byte stream with flow control."""

    def __init__(self, muxer: Yamux, stream_id: int) -> None:
        self._muxer = muxer
        self._id = stream_id
        self._received = bytearray()
        self._receive_window = WINDOW_BYTES
        self._send_window = WINDOW_BYTES
        self._ended_by_peer = False
        self._ended_by_us = False
        self._reset = False
        self._changed = trio.Event()

    async def read(self, limit: int) -> bytes:
        """Receive 1 to `limit` bytes. Raises StreamEnded or StreamReset."""
        await trio.lowlevel.checkpoint()
        while not self._received:
            if self._reset:
                msg = "the stream was reset"
                raise StreamReset(msg)
            if self._ended_by_peer:
                msg = "the peer ended the stream"
                raise StreamEnded(msg)
            await self._changed.wait()
        data = bytes(self._received[:limit])
        del self._received[:limit]
        self._muxer._release(self, len(data))  # noqa: SLF001 - two halves of one protocol
        return data

    async def read_exactly(self, count: int) -> bytes:
        """Receive exactly `count` bytes. Raises StreamEnded or StreamReset."""
        data = await self.read(count) if count else b""
        if len(data) == count:
            return data
        chunks = bytearray(data)
        while len(chunks) < count:
            chunks += await self.read(count - len(chunks))
        return bytes(chunks)

    async def write(self, data: bytes) -> None:
        """Send bytes, waiting for the peer's window as long as it takes. Raises StreamReset."""
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while view:
            if self._reset or self._ended_by_us:
                msg = "the stream is closed"
                raise StreamReset(msg)
            size = min(len(view), self._send_window, FRAME_PAYLOAD_BYTES)
            if size == 0:
                await self._changed.wait()
            elif self._muxer.congested:
                await self._muxer.wait_writable()
            else:
                self._send_window -= size
                self._muxer._send(_DATA, 0, self._id, size, view[:size])  # noqa: SLF001
                view = view[size:]

    def close(self) -> None:
        """End our side, drop what is unread and refuse more. Frames already sent still arrive."""
        if not (self._ended_by_us or self._reset):
            self._ended_by_us = True
            self._muxer._send(_WINDOW_UPDATE, _FIN, self._id, 0)  # noqa: SLF001
        self._muxer._forget(self)  # noqa: SLF001

    def reset(self) -> None:
        """Drop the stream in both directions, at once."""
        if not self._reset and not (self._ended_by_us and self._ended_by_peer):
            self._muxer._send(_WINDOW_UPDATE, _RST, self._id, 0)  # noqa: SLF001
        self._break()
        self._muxer._forget(self)  # noqa: SLF001

    def _break(self) -> None:
        self._reset = True
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class Yamux:
    """One end of a multiplexed connection. `run` serves it; nothing else does I/O."""

    def __init__(self, connection: Connection, *, is_initiator: bool) -> None:
        self._connection = connection
        self._next_id = 1 if is_initiator else 2
        self._streams: dict[int, YamuxStream] = {}
        self._outbound = 0
        self._buffered = 0
        self._outgoing: deque[bytes] = deque()
        self._queued = 0
        self._writable = trio.Event()
        self._readable = trio.Event()
        self._closing = False
        self._closed = trio.Event()
        self._pongs = 0

    @property
    def is_closed(self) -> bool:
        """Whether the connection has ended or is ending."""
        return self._closing or self._closed.is_set()

    @property
    def congested(self) -> bool:
        """Whether data should wait because the peer reads more slowly than we write."""
        return self._queued > HIGH_WATER_BYTES

    async def run(self, accept: Callable[[YamuxStream], bool]) -> None:
        """Serve the connection until it ends; raises what ended it, if that was not orderly.

        `accept` is called with each stream that the peer opens and says whether it is taken.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_frames, nursery.cancel_scope)
                nursery.start_soon(self._keep_alive)
                await self._read_frames(accept)
                nursery.cancel_scope.cancel()
        finally:
            self._closed.set()
            for stream in tuple(self._streams.values()):
                stream._break()  # noqa: SLF001
            self._streams.clear()
            self._writable.set()
            await self._connection.close()

    async def close(self) -> None:
        """Say good-bye, give queued frames a moment to leave, and end `run`."""
        if not self.is_closed:
            self._send(_GO_AWAY, 0, 0, _GO_AWAY_NORMAL)
            self._closing = True
            self._readable.set()
        with trio.move_on_after(CLOSE_SECONDS, shield=True):
            await self._closed.wait()

    def open_stream(self) -> YamuxStream:
        """Open a stream; raises StreamReset when the connection is ending or holds too many."""
        if self.is_closed or self._outbound >= MAX_OUTBOUND_STREAMS or self._next_id > _MAX_STREAM_ID:
            msg = "the connection takes no more streams"
            raise StreamReset(msg)
        stream = YamuxStream(self, self._next_id)
        self._streams[self._next_id] = stream
        self._next_id += 2
        self._outbound += 1
        self._send(_WINDOW_UPDATE, _SYN, stream._id, 0)  # noqa: SLF001
        return stream

    async def wait_writable(self) -> None:
        """Wait until data may be queued again, or the connection has ended."""
        while self.congested and not self._closed.is_set():
            await self._writable.wait()

    def _send(self, kind: int, flags: int, stream_id: int, length: int, payload: bytes | memoryview = b"") -> None:
        if self.is_closed:
            return
        frame = _HEADER.pack(0, kind, flags, stream_id, length) + payload
        self._outgoing.append(frame)
        self._queued += len(frame)
        self._readable.set()

    async def _write_frames(self, scope: trio.CancelScope) -> None:
        while True:
            while not self._outgoing:
                if self._closing:
                    scope.cancel()
                    return
                self._readable = trio.Event()
                await self._readable.wait()
            batch = bytearray()
            while self._outgoing and len(batch) + len(self._outgoing[0]) <= BATCH_BYTES:
                batch += self._outgoing.popleft()
            await self._connection.write(bytes(batch))
            self._queued -= len(batch)
            self._writable.set()
            self._writable = trio.Event()

    async def _keep_alive(self) -> None:
        while True:
            await trio.sleep(KEEPALIVE_SECONDS)
            answered = self._pongs
            self._send(_PING, _SYN, 0, 0)
            await trio.sleep(KEEPALIVE_TIMEOUT_SECONDS)
            if self._pongs == answered:
                msg = "the peer does not answer pings"
                raise YamuxError(msg)

    async def _read_frames(self, accept: Callable[[YamuxStream], bool]) -> None:
        buffer = bytearray()
        while not self._closing:
            buffer += await self._connection.receive()
            offset = 0
            while len(buffer) - offset >= _HEADER.size:
                version, kind, flags, stream_id, length = _HEADER.unpack_from(buffer, offset)
                if version != 0 or kind > _GO_AWAY:
                    msg = "not a yamux frame"
                    raise YamuxError(msg)
                end = offset + _HEADER.size
                if kind == _DATA:
                    self._check_window(stream_id, flags, length)
                    end += length
                    if len(buffer) < end:
                        break
                if kind == _GO_AWAY:
                    return
                self._handle(kind, flags, stream_id, length, buffer[offset + _HEADER.size : end], accept)
                offset = end
            del buffer[:offset]
            if self._queued > MAX_QUEUED_BYTES:
                msg = "the peer does not read the answers it asks for"
                raise YamuxError(msg)

    def _check_window(self, stream_id: int, flags: int, length: int) -> None:
        """Refuse data beyond the window before any of it is buffered."""
        stream = self._streams.get(stream_id)
        window = WINDOW_BYTES if stream is None or flags & _SYN else stream._receive_window  # noqa: SLF001
        if length > window or self._buffered + length > MAX_BUFFERED_BYTES:
            msg = "the peer sent more than the receive window"
            raise YamuxError(msg)

    def _handle(
        self,
        kind: int,
        flags: int,
        stream_id: int,
        length: int,
        payload: bytearray,
        accept: Callable[[YamuxStream], bool],
    ) -> None:
        if kind == _PING:
            if flags & _SYN:
                self._send(_PING, _ACK, 0, length)
            else:
                self._pongs += 1
            return
        if flags & _SYN:
            self._accept(stream_id, accept)
        stream = self._streams.get(stream_id)
        if stream is None:
            # Data for a stream that we have closed: tell the peer to stop.
            if payload and not flags & (_RST | _SYN):
                self._send(_WINDOW_UPDATE, _RST, stream_id, 0)
            return
        if kind == _DATA:
            stream._received += payload  # noqa: SLF001
            stream._receive_window -= length  # noqa: SLF001
            self._buffered += length
        else:
            stream._send_window += length  # noqa: SLF001
        if flags & _FIN:
            stream._ended_by_peer = True  # noqa: SLF001
        if flags & _RST:
            stream._break()  # noqa: SLF001
            self._forget(stream)
        stream._notify()  # noqa: SLF001

    def _accept(self, stream_id: int, accept: Callable[[YamuxStream], bool]) -> None:
        if stream_id == 0 or stream_id % 2 == self._next_id % 2 or stream_id in self._streams:
            msg = "the peer opened a stream with an id that is not its to use"
            raise YamuxError(msg)
        stream = YamuxStream(self, stream_id)
        self._streams[stream_id] = stream
        if accept(stream):
            self._send(_WINDOW_UPDATE, _ACK, stream_id, 0)
        else:
            stream.reset()

    def _release(self, stream: YamuxStream, count: int) -> None:
        """Bytes were read: once half a window is free, tell the peer."""
        self._buffered -= count
        freed = WINDOW_BYTES - stream._receive_window - len(stream._received)  # noqa: SLF001
        if freed >= math.ceil(WINDOW_BYTES / 2) and not stream._ended_by_peer and stream._id in self._streams:  # noqa: SLF001
            stream._receive_window += freed  # noqa: SLF001
            self._send(_WINDOW_UPDATE, 0, stream._id, freed)  # noqa: SLF001

    def _forget(self, stream: YamuxStream) -> None:
        if self._streams.pop(stream._id, None) is not None:  # noqa: SLF001
            self._outbound -= stream._id % 2 == self._next_id % 2  # noqa: SLF001
            self._buffered -= len(stream._received)  # noqa: SLF001
            stream._received.clear()  # noqa: SLF001
