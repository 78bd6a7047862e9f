"""Encrypted connections: what follows the handshake, over streams that deliver as they like."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MemoryReceiveStream, MemorySendStream, memory_stream_pair

from aci_p2p.network.libp2p.secure import MAX_PLAINTEXT_BYTES, ConnectionLost, RawChannel, SecureChannel, Security
from aci_p2p.protocol.identity import KeyPair

DIALLER, LISTENER = KeyPair(bytes(32)), KeyPair(bytes([1]) * 32)
TAG_BYTES = 16


class Pipe:
    """One side of a connection whose reads return `most` bytes at most, and which keeps what was sent."""

    def __init__(self, stream: trio.StapledStream[MemorySendStream, MemoryReceiveStream]) -> None:
        self._stream = stream
        self.most = 1 << 20
        self.sent: list[bytes] = []

    async def receive_some(self, max_bytes: int) -> bytes | bytearray:
        return await self._stream.receive_some(min(max_bytes, self.most))

    async def send_all(self, data: bytes) -> None:
        self.sent.append(data)
        await self._stream.send_all(data)

    async def aclose(self) -> None:
        await self._stream.aclose()


@asynccontextmanager
async def connected() -> AsyncGenerator[tuple[SecureChannel, Pipe, SecureChannel, Pipe]]:
    """Both ends of an encrypted connection, each with what is under it."""
    pipes = [Pipe(stream) for stream in memory_stream_pair()]
    ends: dict[int, SecureChannel] = {}

    async def listen() -> None:
        ends[1] = await Security(LISTENER).secure_inbound(pipes[1])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        ends[0] = await Security(DIALLER).secure_outbound(pipes[0], LISTENER.node_id)
    yield ends[0], pipes[0], ends[1], pipes[1]
    for end in ends.values():
        await end.close()


async def test_each_side_knows_the_other() -> None:
    async with connected() as (dialler, _, listener, _):
        assert (dialler.peer, listener.peer) == (LISTENER.node_id, DIALLER.node_id)


@pytest.mark.parametrize("most", [1, 3, 1 << 20])
async def test_bytes_arrive_in_both_directions_however_they_are_cut(most: int) -> None:
    data = Random(1).randbytes(2 * MAX_PLAINTEXT_BYTES + 1)  # noqa: S311 - is to repeat
    async with connected() as (dialler, below_dialler, listener, below_listener):
        for sender, below_receiver, receiver in (
            (dialler, below_listener, listener),
            (listener, below_dialler, dialler),
        ):
            below_receiver.most = most
            await sender.write(data)
            assert await receiver.read_exactly(len(data)) == data


async def test_a_write_is_one_write_below_of_as_few_messages_as_it_takes() -> None:
    async with connected() as (dialler, below, _, _):
        below.sent.clear()
        await dialler.write(bytes(MAX_PLAINTEXT_BYTES + 1))
        (sent,) = below.sent
        first = MAX_PLAINTEXT_BYTES + TAG_BYTES
        assert int.from_bytes(sent[:2], "big") == first
        assert int.from_bytes(sent[2 + first : 4 + first], "big") == 1 + TAG_BYTES
        assert len(sent) == 4 + first + 1 + TAG_BYTES


async def test_what_has_come_is_received_at_once() -> None:
    async with connected() as (dialler, _, listener, _):
        for part in (b"one ", b"two ", b"three"):
            await dialler.write(part)
        assert await listener.read_exactly(2) == b"on"
        assert await listener.receive() == b"e two three"


async def test_a_message_that_is_not_genuine_ends_the_connection() -> None:
    async with connected() as (dialler, below, listener, _):
        below.sent.clear()
        await dialler.write(b"first")
        assert await listener.receive() == b"first"
        await dialler.write(b"second")
        # The first again, which counts as another one, behind one that is genuine, and in one read with it.
        await below.send_all(below.sent[0])
        await dialler.write(b"third")
        assert await listener.receive() == b"second"
        for _ in range(2):
            with pytest.raises(ConnectionLost, match="not genuine"):
                await listener.receive()


async def test_bytes_before_a_message_that_is_not_genuine_can_be_read() -> None:
    async with connected() as (dialler, below, listener, _):
        await dialler.write(b"ab")
        await below.send_all(b"\x00\x00")
        assert await listener.read_exactly(1) == b"a"
        with pytest.raises(ConnectionLost, match="not genuine"):
            await listener.read_exactly(2)
        assert await listener.receive() == b"b"
        with pytest.raises(ConnectionLost, match="not genuine"):
            await listener.read_exactly(1)


@pytest.mark.parametrize("left", [0, 1, 2, 10])
async def test_an_end_within_a_message(left: int) -> None:
    async with connected() as (_, below, listener, _):
        await below.send_all(b"\x00\x20".ljust(10, b"x")[:left])
        await below.aclose()
        with pytest.raises(ConnectionLost, match="the peer closed the connection"):
            await listener.receive()
        with pytest.raises(ConnectionLost):
            await listener.read_exactly(1)
        with pytest.raises(ConnectionLost):
            for _ in range(2):
                await listener.write(b"anybody there?")


class Plain:
    """No cipher at all."""

    def encrypt(self, data: bytes) -> bytes:
        return data

    def decrypt(self, data: bytes) -> bytes:
        return data


async def test_an_empty_message_ends_the_connection() -> None:
    """Nobody sends one, and many of them would keep us busy."""
    one, other = memory_stream_pair()
    channel = SecureChannel(RawChannel(one, is_initiator=True), Plain(), LISTENER.node_id)
    await other.send_all(b"\x00\x01a\x00\x00")
    assert await channel.receive() == b"a"
    for _ in range(2):
        with pytest.raises(ConnectionLost, match="empty"):
            await channel.receive()


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=8), st.integers(1, 700))
@settings(max_examples=50)
def test_messages_are_taken_apart_as_they_were_put_together(parts: list[bytes], most: int) -> None:
    async def main() -> None:
        one, other = memory_stream_pair()
        pipe = Pipe(one)
        pipe.most = most
        channel = RawChannel(pipe, is_initiator=True)
        await other.send_all(b"".join(len(part).to_bytes(2, "big") + part for part in parts))
        found: list[bytes] = []
        while len(found) < len(parts):
            messages = await channel.read_messages()
            assert messages
            found += messages
        assert found == parts

    trio.run(main)
