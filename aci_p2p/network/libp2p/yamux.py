"""yamux: many streams over one encrypted connection.

Takes the place of py-libp2p's muxer, which does not enforce its receive window, gives up a write after a reader has
paused for five seconds, polls while it waits, and cannot be exchanged (`muxer_multistream` hard-codes it).

Every buffer here is bounded: a stream holds at most one window, a connection at most MAX_BUFFERED_BYTES, and a peer
that makes us queue answers faster than it reads them is disconnected. All connections together are, too (`holdings`).

Source: https://github.com/hashicorp/yamux/blob/master/spec.md
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import trio

from aci_p2p.network.libp2p.holdings import Holdings
from aci_p2p.network.libp2p.secure import MAX_PLAINTEXT_BYTES

PROTOCOL = "/yamux/1.0.0"
"""Protocol id negotiated for the connection."""
WINDOW_BYTES = 256 << 10
"""Receive window of a stream, bytes: the protocol's initial window, never enlarged. 20 Mbit/s at 100 ms."""
MAX_BUFFERED_BYTES = 4 << 20
"""Received and not yet read on one connection, bytes: sixteen full windows."""
MAX_QUEUED_BYTES = 1 << 20
"""Waiting to be sent on one connection, bytes: beyond HIGH_WATER_BYTES only answers that the peer asks for, unread."""
HIGH_WATER_BYTES = 128 << 10
"""Data is held back while more than this is waiting to be sent, bytes: two Noise messages."""
FRAME_PAYLOAD_BYTES = 32 << 10
"""Largest data frame that we send, bytes: small enough that streams take turns."""
BATCH_BYTES = MAX_PLAINTEXT_BYTES
"""Written at once, bytes: one Noise message."""
MAX_OUTBOUND_STREAMS = 512
"""Streams that we keep open on one connection."""
KEEPALIVE_SECONDS = 15.0
"""Time between pings, seconds: what a NAT forgets, it forgets after some 30."""
KEEPALIVE_TIMEOUT_SECONDS = 15.0
"""A peer that does not answer a ping for this long is gone, seconds: one that vanished counts as connected for 30."""
FRAMES_A_TURN = 128
"""Frames handled before other tasks get a turn: a peer that sends tiny ones does not stop the event loop."""
CLOSE_SECONDS = 0.3
"""How long closing waits for queued frames to leave, seconds."""

_HEADER = struct.Struct(">BBHII")
_VERSION = 0
_DATA, _WINDOW_UPDATE, _PING, _GO_AWAY = range(4)
_SYN, _ACK, _FIN, _RST = 1, 2, 4, 8
_GO_AWAY_NORMAL = 0
_MAX_STREAM_ID = 2**32 - 1


class YamuxError(Exception):
    """The peer broke the yamux protocol or is gone."""


class StreamReset(Exception):
    """The stream was reset, or its connection was lost."""


class EndOfStream(Exception):
    """The peer ended the stream; everything it sent has been read."""


class Connection(Protocol):
    """The encrypted connection underneath."""

    async def receive(self) -> bytes | bytearray:
        """The next chunk of bytes."""
        ...

    async def write(self, data: bytes) -> None:
        """Send bytes."""
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class _Header(NamedTuple):
    version: int
    kind: int
    flags: int
    stream_id: int
    length: int


class _State:
    """What the muxer keeps of a stream; its two sides are `Yamux` (the wire) and `YamuxStream` (the user)."""

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id
        self.received = bytearray()
        self.receive_window = WINDOW_BYTES
        self.send_window = WINDOW_BYTES
        self.ended_by_peer = False
        self.ended_by_us = False
        self.reset = False
        self.in_use = False
        self.expected = b""
        self.on_refusal: Callable[[], None] = lambda: None
        self.changed = trio.Event()

    def notify(self) -> None:
        """Wake whoever waits for data, for window or for the end."""
        self.changed.set()
        self.changed = trio.Event()

    def break_off(self) -> None:
        """The stream is lost in both directions."""
        self.reset = True
        self.notify()


class YamuxStream:
    """A bidirectional byte stream with flow control."""

    def __init__(self, muxer: Yamux, state: _State) -> None:
        self._muxer = muxer
        self._state = state

    @property
    def is_in_use(self) -> bool:
        """Whether somebody needs this stream."""
        return self._state.in_use

    def mark_in_use(self) -> None:
        """Somebody needs this stream, and so its connection."""
        self._state.in_use = True

    def expect(self, first: bytes, on_refusal: Callable[[], None]) -> None:
        """What the peer sends first must be this, and is not read by anybody.

        The stream is reset otherwise, and `on_refusal` called; also when it ends before.
        """
        self._state.expected, self._state.on_refusal = first, on_refusal

    async def read(self, limit: int) -> bytes:
        """Receive 1 to `limit` bytes. Raises EndOfStream or StreamReset. Loses nothing when cancelled."""
        while self._state.expected:
            await self._take_expected(self._state.expected)
        return await self._take(limit)

    async def _take_expected(self, expected: bytes) -> None:
        try:
            first = await self._take(len(expected))
        except (EndOfStream, StreamReset):
            self._state.on_refusal()
            raise
        if not expected.startswith(first):
            self._state.on_refusal()
            self.reset()
            msg = "the peer did not begin as it must"
            raise StreamReset(msg)
        self._state.expected = expected[len(first) :]

    async def _take(self, limit: int) -> bytes:
        state = self._state
        if state.received or state.reset or state.ended_by_peer:
            await trio.lowlevel.checkpoint()
        while not state.received:
            if state.reset:
                msg = "the stream was reset"
                raise StreamReset(msg)
            if state.ended_by_peer:
                msg = "the peer ended the stream"
                raise EndOfStream(msg)
            await state.changed.wait()
        data = bytes(state.received[:limit])
        del state.received[:limit]
        self._muxer.release(state, len(data))
        return data

    async def read_exactly(self, count: int) -> bytes:
        """Receive exactly `count` bytes. Raises EndOfStream or StreamReset."""
        data = bytearray()
        while len(data) < count:
            data += await self.read(count - len(data))
        return bytes(data)

    async def write(self, data: bytes) -> None:
        """Send bytes, waiting for the peer's window as long as it takes. Raises StreamReset."""
        await trio.lowlevel.checkpoint()
        state = self._state
        view = memoryview(data)
        while view:
            if state.reset or state.ended_by_us:
                msg = "the stream is closed"
                raise StreamReset(msg)
            size = min(len(view), state.send_window, FRAME_PAYLOAD_BYTES)
            if size == 0:
                await state.changed.wait()
            elif self._muxer.congested:
                await self._muxer.wait_writable()
            else:
                state.send_window -= size
                self._muxer.send(_DATA, 0, state.stream_id, size, view[:size])
                view = view[size:]

    def close(self) -> None:
        """End our side, drop what is unread and refuse more. What was written still arrives."""
        state = self._state
        if not (state.ended_by_us or state.reset):
            state.ended_by_us = True
            self._muxer.send(_WINDOW_UPDATE, _FIN, state.stream_id, 0)
        self._muxer.forget(state)

    def reset(self) -> None:
        """Drop the stream in both directions, at once."""
        state = self._state
        if not state.reset and not state.ended_by_us:
            self._muxer.send(_WINDOW_UPDATE, _RST, state.stream_id, 0)
        state.break_off()
        self._muxer.forget(state)


class Yamux:
    """One end of a multiplexed connection. `run` serves it; nothing else does I/O."""

    def __init__(self, connection: Connection, *, is_initiator: bool) -> None:
        self._connection = connection
        self._next_id = 1 if is_initiator else 2
        self._accept: Callable[[YamuxStream], bool] = lambda _: False
        self._streams: dict[int, _State] = {}
        self._outbound = 0
        self._buffered = 0
        self._outgoing: deque[bytes] = deque()
        self._queued = 0
        self._writable = trio.Event()
        self._pending = trio.Event()
        self._closing = False
        self._closed = trio.Event()
        self._idle = trio.Event()
        self._pings: dict[int, float] = {}
        self._last_ping = 0
        self._ponged = trio.Event()
        self._heard = 0.0
        self._holdings = Holdings()
        self._scope = trio.CancelScope()
        self.round_trip: float | None = None

    @property
    def is_closed(self) -> bool:
        """Whether the connection has ended or is ending."""
        return self._closing or self._closed.is_set()

    @property
    def stream_count(self) -> int:
        """Streams open in both directions."""
        return len(self._streams)

    @property
    def is_in_use(self) -> bool:
        """Whether a stream is open that somebody needs."""
        return any(state.in_use for state in self._streams.values())

    @property
    def is_needed(self) -> bool:
        """Whether a stream is open that we opened because somebody needs it."""
        return any(state.in_use and self._is_ours(state.stream_id) for state in self._streams.values())

    @property
    def congested(self) -> bool:
        """Whether data should wait because the peer reads more slowly than we write."""
        return self._queued > HIGH_WATER_BYTES

    async def run(self, accept: Callable[[YamuxStream], bool], holdings: Holdings | None = None) -> None:
        """Serve the connection until it ends; raises what ended it, if that was not orderly.

        `accept` is called with each stream that the peer opens and says whether it is taken. `holdings` counts what
        this and other connections hold.
        """
        self._accept = accept
        self._holdings = holdings or self._holdings
        self._holdings.enter(self, self._queued)
        with self._scope:
            await self._serve()

    def give_up(self) -> None:
        """End `run` at once: we hold too much for the peer."""
        self._closing = True
        self._scope.cancel()

    async def _serve(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_frames, nursery.cancel_scope)
                nursery.start_soon(self._keep_alive)
                await self._read_frames()
                nursery.cancel_scope.cancel()
        finally:
            self._holdings.leave(self)
            self._closed.set()
            self._writable.set()
            self._ponged.set()
            self._idle.set()
            for state in self._streams.values():
                state.break_off()
            self._streams.clear()
            await self._connection.close()

    async def close(self) -> None:
        """Say good-bye, give queued frames a moment to leave, and end `run`."""
        if not self.is_closed:
            self.send(_GO_AWAY, 0, 0, _GO_AWAY_NORMAL)
            self._closing = True
        with trio.move_on_after(CLOSE_SECONDS):
            await self._closed.wait()

    def open_stream(self) -> YamuxStream:
        """Open a stream; raises StreamReset when the connection is ending or holds too many."""
        if self.is_closed or self._outbound >= MAX_OUTBOUND_STREAMS or self._next_id > _MAX_STREAM_ID:
            msg = "the connection takes no more streams"
            raise StreamReset(msg)
        state = self._streams[self._next_id] = _State(self._next_id)
        self._next_id += 2
        self._outbound += 1
        self.send(_WINDOW_UPDATE, _SYN, state.stream_id, 0)
        return YamuxStream(self, state)

    async def ping(self) -> None:
        """Wait for the peer to answer a ping. Raises StreamReset when the connection ends first.

        How long it took is kept as `round_trip`, seconds.
        """
        number = self._last_ping = (self._last_ping + 1) % 2**32
        self._pings[number] = trio.current_time()
        self.send(_PING, _SYN, 0, number)
        try:
            while number in self._pings:
                if self._closed.is_set():
                    msg = "the connection has ended"
                    raise StreamReset(msg)
                await self._ponged.wait()
        finally:
            self._pings.pop(number, None)

    async def wait_idle(self) -> None:
        """Wait until no stream is open, or the connection has ended."""
        while self._streams and not self._closed.is_set():
            await self._idle.wait()

    async def wait_writable(self) -> None:
        """Wait until data may be queued again, or the connection has ended."""
        while self.congested and not self._closed.is_set():
            await self._writable.wait()

    def send(self, kind: int, flags: int, stream_id: int, length: int, payload: bytes | memoryview = b"") -> None:
        """Queue a frame. Those of a connection that is ending go nowhere."""
        if self.is_closed:
            return
        frame = _HEADER.pack(_VERSION, kind, flags, stream_id, length) + payload
        self._outgoing.append(frame)
        self._queued += len(frame)
        self._holdings.change(self, len(frame))
        self._pending.set()

    def release(self, state: _State, count: int) -> None:
        """The user has read `count` bytes of a stream: once half its window is free, tell the peer."""
        self._buffered -= count
        self._holdings.change(self, -count)
        freed = WINDOW_BYTES - state.receive_window - len(state.received)
        if freed >= WINDOW_BYTES // 2 and not state.ended_by_peer and state.stream_id in self._streams:
            state.receive_window += freed
            self.send(_WINDOW_UPDATE, 0, state.stream_id, freed)

    def forget(self, state: _State) -> None:
        """A stream is over for us: drop what is unread; data that still arrives for it is answered with a reset."""
        self._drop(state)
        self._buffered -= len(state.received)
        self._holdings.change(self, -len(state.received))
        state.received.clear()

    def _drop(self, state: _State) -> None:
        if self._streams.pop(state.stream_id, None) is not None:
            self._outbound -= self._is_ours(state.stream_id)
            if not self._streams:
                self._idle.set()
                self._idle = trio.Event()

    def _is_ours(self, stream_id: int) -> bool:
        return stream_id % 2 == self._next_id % 2

    async def _write_frames(self, scope: trio.CancelScope) -> None:
        while True:
            while not self._outgoing:
                if self._closing:
                    scope.cancel()
                    return
                self._pending = trio.Event()
                await self._pending.wait()
            batch = bytearray()
            while self._outgoing and len(batch) + len(self._outgoing[0]) <= BATCH_BYTES:
                batch += self._outgoing.popleft()
            await self._connection.write(bytes(batch))
            self._queued -= len(batch)
            self._holdings.change(self, -len(batch))
            self._writable.set()
            self._writable = trio.Event()

    async def _keep_alive(self) -> None:
        while True:
            await trio.sleep(KEEPALIVE_SECONDS)
            asked = trio.current_time()
            try:
                with trio.fail_after(KEEPALIVE_TIMEOUT_SECONDS):
                    await self.ping()
            except trio.TooSlowError as error:
                # On a slow line the answer may be behind much data, but then there is data.
                if self._heard < asked:
                    msg = "the peer does not answer pings"
                    raise YamuxError(msg) from error

    async def _read_frames(self) -> None:
        buffer = bytearray()
        handled = incomplete = 0
        while True:
            buffer += await self._connection.receive()
            self._heard = trio.current_time()
            self._holdings.change(self, -incomplete)
            offset = 0
            while len(buffer) - offset >= _HEADER.size:
                header = _Header(*_HEADER.unpack_from(buffer, offset))
                end = offset + _HEADER.size + self._payload_length(header)
                if len(buffer) < end:
                    break
                if header.kind == _GO_AWAY:
                    return
                self._handle(header, buffer[offset + _HEADER.size : end])
                offset = end
                handled += 1
                if not handled % FRAMES_A_TURN:
                    await trio.lowlevel.checkpoint()
            del buffer[:offset]
            incomplete = len(buffer)
            self._holdings.change(self, incomplete)
            if self._queued > MAX_QUEUED_BYTES:
                msg = "the peer does not read the answers it asks for"
                raise YamuxError(msg)

    def _payload_length(self, header: _Header) -> int:
        """Bytes that follow a header; raises YamuxError, before they are read, when they are too many."""
        if header.version != _VERSION or header.kind > _GO_AWAY:
            msg = "not a yamux frame"
            raise YamuxError(msg)
        if header.kind != _DATA:
            return 0
        state = self._streams.get(header.stream_id)
        window = WINDOW_BYTES if state is None else state.receive_window
        if header.length > window or self._buffered + header.length > MAX_BUFFERED_BYTES:
            msg = "the peer sent more than the receive window"
            raise YamuxError(msg)
        return header.length

    def _handle(self, header: _Header, payload: bytearray) -> None:
        if header.kind == _PING:
            if header.flags & _SYN:
                self.send(_PING, _ACK, 0, header.length)
            elif (sent := self._pings.pop(header.length, None)) is not None:
                self.round_trip = trio.current_time() - sent
                self._ponged.set()
                self._ponged = trio.Event()
            return
        if header.flags & _SYN:
            self._accept_stream(header.stream_id)
        state = self._streams.get(header.stream_id)
        if state is None:
            if payload and not header.flags & (_SYN | _RST):
                self.send(_WINDOW_UPDATE, _RST, header.stream_id, 0)
            return
        if header.kind == _DATA:
            state.received += payload
            state.receive_window -= len(payload)
            self._buffered += len(payload)
            self._holdings.change(self, len(payload))
        else:
            state.send_window += header.length
        state.ended_by_peer |= bool(header.flags & _FIN)
        if header.flags & _RST:
            # What came before the reset stays readable.
            state.reset = True
            self._drop(state)
        state.notify()

    def _accept_stream(self, stream_id: int) -> None:
        if stream_id == 0 or self._is_ours(stream_id) or stream_id in self._streams:
            msg = "the peer opened a stream with an id that is not its to use"
            raise YamuxError(msg)
        state = self._streams[stream_id] = _State(stream_id)
        stream = YamuxStream(self, state)
        if self._accept(stream):
            self.send(_WINDOW_UPDATE, _ACK, stream_id, 0)
        else:
            stream.reset()
