"""Queries over kept streams: when one is used again, given up, or closed. Without a wire, in virtual time."""

from __future__ import annotations

from typing import cast

import pytest
import trio
from google.protobuf.message import DecodeError
from trio.testing import MockClock, wait_all_tasks_blocked

from aci_p2p.network.libp2p import kad_streams
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.kad_streams import KEEP_SECONDS, QueryStreams
from aci_p2p.network.libp2p.upstream import KademliaMessage as KadMessage
from aci_p2p.network.libp2p.varint import prefixed
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset
from aci_p2p.protocol.identity import NodeId
from aci_p2p.tasks import open_background
from tests.network.driver import make_key

PEER = make_key(2).node_id


class EchoHost:
    """Opens streams that send back, byte by byte, what is written to them."""

    def __init__(self) -> None:
        self.opened: list[EchoStream] = []
        self.failure: type[Exception] | None = None
        self.prepend = b""

    async def open_stream(self, _peer: NodeId, _protocol: str, *, eager: bool) -> EchoStream:
        assert eager
        await trio.lowlevel.checkpoint()
        self.opened.append(EchoStream(self.failure))
        self.opened[-1]._received = self.prepend
        return self.opened[-1]

    @property
    def open_streams(self) -> int:
        """Streams that were not closed."""
        return sum(not stream.closed for stream in self.opened)


class EchoStream:
    """Sends back what is written to it, a round trip later."""

    def __init__(self, failure: type[Exception] | None) -> None:
        self.failure = failure
        self.delay = 0.1
        self.closed = False
        self._received = b""

    async def write(self, data: bytes) -> None:
        assert not self.closed
        self._received += data
        await trio.lowlevel.checkpoint()

    async def read_exactly(self, count: int) -> bytes:
        await trio.sleep(self.delay)
        if self.failure:
            raise self.failure
        data, self._received = self._received[:count], self._received[count:]
        return data

    def close(self) -> None:
        self.closed = True


def query(number: int) -> KadMessage:
    return KadMessage(type=KadMessage.FIND_NODE, key=bytes([number]))


@pytest.fixture
def host() -> EchoHost:
    return EchoHost()


@pytest.fixture
def streams(host: EchoHost) -> QueryStreams:
    return QueryStreams(cast("Host", host), "/test", 1_000)


async def test_a_stream_is_used_again(autojump_clock: MockClock, host: EchoHost, streams: QueryStreams) -> None:
    async with open_background() as tasks:
        tasks.start_soon(streams.run)
        for number in range(9):
            assert await streams.ask(PEER, [query(number)]) == query(number)
        assert len(host.opened) == 1
        await streams.ask(make_key(3).node_id, [query(1)])
        assert len(host.opened) == 2


async def test_queries_at_one_time_have_streams_of_their_own(
    autojump_clock: MockClock, host: EchoHost, streams: QueryStreams
) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(streams.ask, PEER, [query(number)])
    assert len(host.opened) == 5
    assert host.open_streams == 1


@pytest.mark.parametrize("failure", [EndOfStream, StreamReset])
async def test_where_the_peer_has_ended_it_the_query_goes_over_another(
    autojump_clock: MockClock, host: EchoHost, streams: QueryStreams, failure: type[Exception]
) -> None:
    await streams.ask(PEER, [query(1)])
    host.opened[0].failure = failure
    assert await streams.ask(PEER, [query(2)]) == query(2)
    assert [stream.closed for stream in host.opened] == [True, False]
    # Where a new one ends, too, it is the peer that does not answer.
    host.opened[1].failure = host.failure = failure
    with pytest.raises(failure):
        await streams.ask(PEER, [query(3)])
    assert len(host.opened) == 3
    assert host.open_streams == 0


async def test_the_answer_to_a_query_that_was_given_up_is_nobodys(
    autojump_clock: MockClock, host: EchoHost, streams: QueryStreams
) -> None:
    await streams.ask(PEER, [query(1)])
    with trio.move_on_after(0.05):
        await streams.ask(PEER, [query(2)])
    assert host.opened[0].closed
    assert await streams.ask(PEER, [query(3)]) == query(3)


async def test_malformed_answers_end_the_stream(
    autojump_clock: MockClock, host: EchoHost, streams: QueryStreams
) -> None:
    await streams.ask(PEER, [query(1)])
    host.opened[0]._received = prefixed(b"\xff\xff")
    with pytest.raises(DecodeError):
        await streams.ask(PEER, [query(2)])
    assert host.opened[0].closed


async def test_what_was_answered_too_much_is_not_taken_for_the_next_answer(
    autojump_clock: MockClock, host: EchoHost, streams: QueryStreams
) -> None:
    await streams.ask(PEER, [query(1)])
    host.opened[0]._received = prefixed(query(1).SerializeToString())
    assert await streams.ask(PEER, [query(2)]) == query(2)
    assert [stream.closed for stream in host.opened] == [True, False]


async def test_who_answers_something_else_is_asked_on_a_new_stream_each_time(
    autojump_clock: MockClock, host: EchoHost, streams: QueryStreams
) -> None:
    for number in range(2):
        host.prepend = prefixed(KadMessage(type=KadMessage.PING).SerializeToString())
        assert (await streams.ask(PEER, [query(number)])).type == KadMessage.PING
    assert [stream.closed for stream in host.opened] == [True, True]


async def test_where_another_connection_is_better_the_stream_is_left(
    autojump_clock: MockClock, host: EchoHost, streams: QueryStreams
) -> None:
    await streams.ask(PEER, [query(1)])
    streams.drop(PEER)
    streams.drop(PEER)
    assert host.open_streams == 0
    assert await streams.ask(PEER, [query(2)]) == query(2)


async def test_what_nobody_needs_is_closed(autojump_clock: MockClock, host: EchoHost, streams: QueryStreams) -> None:
    async with open_background() as tasks:
        tasks.start_soon(streams.run)
        await wait_all_tasks_blocked()
        await streams.ask(PEER, [query(1)])
        await trio.sleep(KEEP_SECONDS / 2)
        # Each query prolongs it.
        await streams.ask(PEER, [query(2)])
        await trio.sleep(KEEP_SECONDS - 0.01)
        assert host.open_streams == 1
        await trio.sleep(0.02)
        assert host.open_streams == 0
        assert await streams.ask(PEER, [query(3)]) == query(3)
        assert len(host.opened) == 2
        await trio.sleep(KEEP_SECONDS + 0.01)
        assert host.open_streams == 0


async def test_a_stream_in_use_is_not_closed(autojump_clock: MockClock, host: EchoHost, streams: QueryStreams) -> None:
    async with open_background() as tasks:
        tasks.start_soon(streams.run)
        await streams.ask(PEER, [query(1)])
        await trio.sleep(KEEP_SECONDS - 0.01)
        host.opened[0].delay = 1.0
        assert await streams.ask(PEER, [query(2)]) == query(2)


async def test_kept_streams_are_bounded(
    autojump_clock: MockClock, host: EchoHost, streams: QueryStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kad_streams, "MAX_KEPT", 3)
    for number in range(2, 8):
        await streams.ask(make_key(number).node_id, [query(number)])
    assert [stream.closed for stream in host.opened] == [True] * 3 + [False] * 3
