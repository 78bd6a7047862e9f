"""The muxer alone, over a connection in memory and in virtual time."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from aci_p2p.network.libp2p import yamux
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, Yamux, YamuxError, YamuxStream
from aci_p2p.tasks import open_background
from tests.network.attack import ACK, DATA, FIN, HEADER, PING, RST, SYN, WINDOW_UPDATE, frame


class Lost(Exception):
    """The test's connection has ended."""


class Wire:
    """One end of a connection: chunks sent are chunks received."""

    def __init__(self, outgoing: trio.MemorySendChannel[bytes], incoming: trio.MemoryReceiveChannel[bytes]) -> None:
        self._outgoing = outgoing
        self._incoming = incoming

    async def receive(self) -> bytes:
        try:
            return await self._incoming.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise Lost from None

    async def write(self, data: bytes) -> None:
        try:
            await self._outgoing.send(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise Lost from None

    async def close(self) -> None:
        self._outgoing.close()
        self._incoming.close()


def wires(chunks: int = 1000) -> tuple[Wire, Wire]:
    """Both ends of a connection with room for so many chunks in each direction."""
    there, from_there = trio.open_memory_channel[bytes](chunks)
    back, from_back = trio.open_memory_channel[bytes](chunks)
    return Wire(there, from_back), Wire(back, from_there)


async def until_lost(wire: Wire) -> None:
    """Read until the other side hangs up."""
    with pytest.raises(Lost):
        while True:
            await wire.receive()


class Served:
    """Takes the streams that the other side opens."""

    def __init__(self) -> None:
        self.send, self.receive = trio.open_memory_channel[YamuxStream](1000)

    def __call__(self, stream: YamuxStream) -> bool:
        self.send.send_nowait(stream)
        return True


def refuse(_stream: YamuxStream) -> bool:
    """Takes no stream."""
    return False


async def run(muxer: Yamux, accept: Served) -> None:
    """Serve a connection and take its end as it comes."""
    try:
        await muxer.run(accept)
    except* (Lost, YamuxError):
        pass


@asynccontextmanager
async def pair() -> AsyncGenerator[tuple[Yamux, Yamux, Served]]:
    """Two muxers that talk to each other; the second one's inbound streams."""
    left, right = wires()
    dialler, listener, inbound = Yamux(left, is_initiator=True), Yamux(right, is_initiator=False), Served()
    async with open_background() as nursery:
        nursery.start_soon(run, dialler, Served())
        nursery.start_soon(run, listener, inbound)
        yield dialler, listener, inbound


@asynccontextmanager
async def by_hand() -> AsyncGenerator[tuple[Wire, Yamux, Served]]:
    """A muxer on the listening side and the raw connection to it."""
    left, right = wires()
    listener, inbound = Yamux(right, is_initiator=False), Served()
    async with open_background() as nursery:
        nursery.start_soon(run, listener, inbound)
        yield left, listener, inbound


async def frames(wire: Wire, count: int) -> list[tuple[int, int, int, int]]:
    """The next frame headers (kind, flags, stream id, length), payloads passed over."""
    headers: list[tuple[int, int, int, int]] = []
    buffer = bytearray()
    while len(headers) < count:
        buffer += await wire.receive()
        while len(buffer) >= HEADER.size:
            _, kind, flags, stream_id, length = HEADER.unpack_from(buffer)
            headers.append((kind, flags, stream_id, length))
            del buffer[: HEADER.size + (length if kind == DATA else 0)]
    return headers


async def test_bytes_arrive(autojump_clock: MockClock) -> None:
    async with pair() as (dialler, _, inbound):
        ours = dialler.open_stream()
        await ours.write(b"hello")
        theirs = await inbound.receive.receive()
        assert await theirs.read_exactly(5) == b"hello"
        await theirs.write(b"back")
        assert await ours.read(100) == b"back"


@given(st.lists(st.binary(min_size=1, max_size=70_000), min_size=1, max_size=6), st.integers(1, 40_000))
def test_any_bytes_arrive_in_any_pieces(chunks: list[bytes], limit: int) -> None:
    async def exchange() -> None:
        async with pair() as (dialler, _, inbound):
            stream = dialler.open_stream()

            async def write() -> None:
                for chunk in chunks:
                    await stream.write(chunk)
                stream.close()

            received = bytearray()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                theirs = await inbound.receive.receive()
                with pytest.raises(EndOfStream):
                    while True:
                        received += await theirs.read(limit)
            assert received == b"".join(chunks)

    trio.run(exchange, clock=MockClock(autojump_threshold=0))


async def test_reader_that_pauses_for_minutes_does_not_break_the_writer(autojump_clock: MockClock) -> None:
    data = bytes(1 << 20)
    async with pair() as (dialler, _, inbound), trio.open_nursery() as nursery:
        stream = dialler.open_stream()
        nursery.start_soon(stream.write, data)
        theirs = await inbound.receive.receive()
        await trio.sleep(600)
        assert await theirs.read_exactly(len(data)) == data


async def test_writer_waits_for_the_window(autojump_clock: MockClock) -> None:
    async with pair() as (dialler, _, inbound):
        stream = dialler.open_stream()
        await stream.write(bytes(yamux.WINDOW_BYTES))
        with trio.move_on_after(10) as scope:
            await stream.write(b"x")
        assert scope.cancelled_caught
        theirs = await inbound.receive.receive()
        await theirs.read_exactly(yamux.WINDOW_BYTES)
        await stream.write(b"x")


async def test_stalled_stream_does_not_hold_up_others(autojump_clock: MockClock) -> None:
    async with pair() as (dialler, _, inbound):
        stalled, live = dialler.open_stream(), dialler.open_stream()
        await stalled.write(bytes(yamux.WINDOW_BYTES))
        await live.write(b"hello")
        await inbound.receive.receive()
        theirs = await inbound.receive.receive()
        assert await theirs.read_exactly(5) == b"hello"


async def test_what_waits_to_be_sent_is_bounded(autojump_clock: MockClock) -> None:
    left, right = wires(chunks=0)
    listener, inbound = Yamux(right, is_initiator=False), Served()
    async with open_background() as nursery:
        nursery.start_soon(run, listener, inbound)
        await left.write(frame(WINDOW_UPDATE, SYN, 1, 0) + frame(WINDOW_UPDATE, 0, 1, 2**31))
        stream = await inbound.receive.receive()
        with trio.move_on_after(10) as scope:
            await stream.write(bytes(16 << 20))
        assert scope.cancelled_caught
        assert listener._queued <= yamux.HIGH_WATER_BYTES + yamux.FRAME_PAYLOAD_BYTES + 2 * HEADER.size


async def test_tiny_frames_leave_others_their_turn(autojump_clock: MockClock) -> None:
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with by_hand() as (wire, _, _), trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        await wire.write(frame(PING, SYN, 0, 7) * 5000)
        await frames(wire, 5000)
        assert turns >= 5000 // yamux.FRAMES_A_TURN
        nursery.cancel_scope.cancel()


async def test_what_must_come_first_is_checked_and_not_read(autojump_clock: MockClock) -> None:
    refused: list[YamuxStream] = []
    async with pair() as (dialler, _, inbound):
        stream = dialler.open_stream()
        stream.expect(b"hello", lambda: refused.append(stream))
        remote = await inbound.receive.receive()
        await remote.write(b"hel")
        with trio.move_on_after(1):
            await stream.read(10)
        await remote.write(b"lo, you")
        assert await stream.read(10) == b", you"
        bad = dialler.open_stream()
        bad.expect(b"hello", lambda: refused.append(bad))
        remote = await inbound.receive.receive()
        await remote.write(b"help")
        with pytest.raises(StreamReset):
            await bad.read(10)
        with pytest.raises(StreamReset):
            await remote.read(10)
        assert refused == [bad]
        ended = dialler.open_stream()
        ended.expect(b"hello", lambda: refused.append(ended))
        remote = await inbound.receive.receive()
        remote.close()
        with pytest.raises(EndOfStream):
            await ended.read(10)
        assert refused == [bad, ended]


async def test_half_close(autojump_clock: MockClock) -> None:
    async with pair() as (dialler, _, inbound):
        ours = dialler.open_stream()
        await ours.write(b"last words")
        ours.close()
        theirs = await inbound.receive.receive()
        assert await theirs.read(100) == b"last words"
        with pytest.raises(EndOfStream):
            await theirs.read(100)
        with pytest.raises(StreamReset):
            await ours.write(b"more")


async def test_writing_to_a_closed_stream_is_answered_with_a_reset(autojump_clock: MockClock) -> None:
    async with pair() as (dialler, _, inbound):
        ours = dialler.open_stream()
        theirs = await inbound.receive.receive()
        ours.close()
        await theirs.write(b"are you there?")
        await trio.sleep(1)
        with pytest.raises(StreamReset):
            await theirs.write(b"hello?")


async def test_what_came_before_a_reset_is_readable(autojump_clock: MockClock) -> None:
    async with by_hand() as (wire, _, inbound):
        await wire.write(frame(DATA, SYN, 1, 5, b"hello") + frame(WINDOW_UPDATE, RST, 1, 0))
        stream = await inbound.receive.receive()
        assert await stream.read(100) == b"hello"
        with pytest.raises(StreamReset):
            await stream.read(100)


async def test_end_of_the_connection_resets_its_streams(autojump_clock: MockClock) -> None:
    async with pair() as (dialler, listener, inbound):
        ours = dialler.open_stream()
        theirs = await inbound.receive.receive()
        await listener.close()
        await trio.sleep(1)
        for stream in (ours, theirs):
            with pytest.raises(StreamReset):
                await stream.read(1)
        assert dialler.is_closed
        with pytest.raises(StreamReset):
            dialler.open_stream()
        with pytest.raises(StreamReset):
            await dialler.ping()


async def test_what_is_queued_leaves_before_the_connection_closes(autojump_clock: MockClock) -> None:
    async with pair() as (dialler, _, inbound):
        ours = dialler.open_stream()
        await ours.write(b"farewell")
        ours.close()
        await dialler.close()
        theirs = await inbound.receive.receive()
        assert await theirs.read_exactly(8) == b"farewell"


async def test_closing_does_not_wait_for_a_peer_that_does_not_read(autojump_clock: MockClock) -> None:
    left, _ = wires(chunks=0)
    muxer = Yamux(left, is_initiator=True)
    async with open_background() as nursery:
        nursery.start_soon(run, muxer, Served())
        await trio.testing.wait_all_tasks_blocked()
        started = trio.current_time()
        await muxer.close()
        assert trio.current_time() - started <= yamux.CLOSE_SECONDS


async def test_silent_peer_is_given_up(autojump_clock: MockClock) -> None:
    left, _ = wires()
    with pytest.raises(ExceptionGroup) as caught:
        await Yamux(left, is_initiator=True).run(Served())
    assert caught.group_contains(YamuxError, match="pings")
    assert trio.current_time() >= yamux.KEEPALIVE_SECONDS + yamux.KEEPALIVE_TIMEOUT_SECONDS


async def test_answer_counts_for_the_ping_that_was_asked(autojump_clock: MockClock) -> None:
    async with by_hand() as (wire, listener, _), trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(listener.ping)
            ((_, _, _, number),) = await frames(wire, 1)
            await wire.write(frame(PING, ACK, 0, number + 1))
            await trio.sleep(0.25)
            await wire.write(frame(PING, ACK, 0, number) * 2)
            await trio.testing.wait_all_tasks_blocked()
            assert not nursery.child_tasks
            assert listener.round_trip == pytest.approx(0.25)
            listener.round_trip = None
    assert not listener._pings


async def test_peer_that_sends_and_is_slow_to_answer_is_alive(autojump_clock: MockClock) -> None:
    async with by_hand() as (wire, listener, _):
        for _ in range(60):
            await trio.sleep(5)
            await wire.write(frame(WINDOW_UPDATE, 0, 77, 1))
        assert not listener.is_closed
        fell_silent = trio.current_time()
        await until_lost(wire)
        longest = 2 * yamux.KEEPALIVE_SECONDS + yamux.KEEPALIVE_TIMEOUT_SECONDS
        assert yamux.KEEPALIVE_TIMEOUT_SECONDS <= trio.current_time() - fell_silent <= longest


async def test_connection_knows_when_nothing_is_on_it(autojump_clock: MockClock) -> None:
    async with pair() as (dialler, listener, inbound), trio.open_nursery() as nursery:
        await listener.wait_idle()
        first, second = dialler.open_stream(), dialler.open_stream()
        theirs = [await inbound.receive.receive() for _ in range(2)]
        done = 0

        async def wait() -> None:
            nonlocal done
            await listener.wait_idle()
            done += 1

        nursery.start_soon(wait)
        nursery.start_soon(wait)
        assert (dialler.is_in_use, listener.is_in_use) == (False, False)
        theirs[0].mark_in_use()
        assert (dialler.is_in_use, listener.is_in_use) == (False, True)
        # The dialler opened it, so for the listener it need not stay.
        assert not listener.is_needed
        first.mark_in_use()
        assert dialler.is_needed
        first.reset()
        await trio.sleep(1)
        assert (listener.stream_count, listener.is_in_use, done) == (1, False, 0)
        theirs[1].close()
        await trio.sleep(1)
        assert done == 2
        second.close()
        dialler.open_stream()
        await inbound.receive.receive()
        nursery.start_soon(wait)
        await trio.sleep(1)
        assert done == 2
        await dialler.close()
        await trio.sleep(1)
        assert done == 3


async def test_idle_connection_stays(autojump_clock: MockClock) -> None:
    async with pair() as (dialler, listener, _):
        await trio.sleep(3600)
        await dialler.ping()
        assert not listener.is_closed


async def test_frames_on_the_wire(autojump_clock: MockClock) -> None:
    async with by_hand() as (wire, _, inbound):
        await wire.write(frame(PING, SYN, 0, 7))
        assert await frames(wire, 1) == [(PING, ACK, 0, 7)]
        await wire.write(frame(WINDOW_UPDATE, SYN, 1, 0))
        assert await frames(wire, 1) == [(WINDOW_UPDATE, ACK, 1, 0)]
        stream = await inbound.receive.receive()
        await stream.write(b"hello")
        stream.close()
        assert await frames(wire, 2) == [(DATA, 0, 1, 5), (WINDOW_UPDATE, FIN, 1, 0)]
        await wire.write(frame(DATA, 0, 1, 5, b"hello"))
        assert await frames(wire, 1) == [(WINDOW_UPDATE, RST, 1, 0)]


async def test_window_is_extended_when_half_is_read(autojump_clock: MockClock) -> None:
    half = yamux.WINDOW_BYTES // 2
    async with by_hand() as (wire, _, inbound):
        await wire.write(frame(DATA, SYN, 1, half, bytes(half)))
        stream = await inbound.receive.receive()
        await stream.read_exactly(half - 1)
        assert await frames(wire, 1) == [(WINDOW_UPDATE, ACK, 1, 0)]
        await stream.read_exactly(1)
        assert await frames(wire, 1) == [(WINDOW_UPDATE, 0, 1, half)]


@pytest.mark.parametrize("beyond", [0, 1])
async def test_window_is_enforced_to_the_byte(autojump_clock: MockClock, beyond: int) -> None:
    async with by_hand() as (wire, listener, _):
        await wire.write(frame(WINDOW_UPDATE, SYN, 1, 0))
        rest = yamux.WINDOW_BYTES + beyond
        while rest:
            size = min(rest, 50_000)
            await wire.write(frame(DATA, 0, 1, size, bytes(size)))
            rest -= size
        await trio.sleep(1)
        assert listener.is_closed == bool(beyond)


async def test_peer_window_of_nothing_is_no_deadlock(autojump_clock: MockClock) -> None:
    async with by_hand() as (wire, listener, inbound):
        await wire.write(frame(WINDOW_UPDATE, SYN, 1, 0))
        stream = await inbound.receive.receive()
        with trio.move_on_after(10) as scope:
            await stream.write(bytes(2 * yamux.WINDOW_BYTES))
        assert scope.cancelled_caught
        stream.reset()
        assert not listener.is_closed
        await frames(wire, 2)


async def test_split_frames_are_put_together(autojump_clock: MockClock) -> None:
    async with by_hand() as (wire, _, inbound):
        for byte in frame(DATA, SYN, 1, 5, b"hello"):
            await wire.write(bytes([byte]))
        stream = await inbound.receive.receive()
        assert await stream.read_exactly(5) == b"hello"


async def test_outbound_streams_are_bounded_and_given_back(autojump_clock: MockClock) -> None:
    async with pair() as (dialler, _, _):
        streams = [dialler.open_stream() for _ in range(yamux.MAX_OUTBOUND_STREAMS)]
        with pytest.raises(StreamReset):
            dialler.open_stream()
        streams[0].close()
        streams[1].reset()
        for _ in range(2):
            dialler.open_stream()
        with pytest.raises(StreamReset):
            dialler.open_stream()


async def test_refused_stream_is_reset(autojump_clock: MockClock) -> None:
    left, right = wires()
    dialler, listener = Yamux(left, is_initiator=True), Yamux(right, is_initiator=False)
    async with open_background() as nursery:
        nursery.start_soon(dialler.run, Served())
        nursery.start_soon(listener.run, refuse)
        stream = dialler.open_stream()
        with pytest.raises(StreamReset):
            await stream.read(1)
        assert listener.stream_count == 0


async def test_nothing_is_kept_of_streams_that_are_over(autojump_clock: MockClock) -> None:
    async with pair() as (dialler, listener, inbound):
        for number in range(50):
            ours = dialler.open_stream()
            await ours.write(bytes(1000))
            theirs = await inbound.receive.receive()
            if number % 2:
                theirs.close()
                ours.close()
            else:
                ours.reset()
                theirs.reset()
        await dialler.ping()
        assert dialler.stream_count == listener.stream_count == 0
        assert listener._buffered == 0
