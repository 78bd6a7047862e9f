"""How the streams that one endpoint serves are shared out among its peers."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.network import PeerUnreachable, Stream, StreamClosed, inbound
from aci_p2p.network.inbound import InboundStreams
from aci_p2p.network.memory import MemoryHub
from tests.network.driver import ECHO, STRANGER, Opener, echo, make_key, open_on, wait_for_ever

WAIT = "/test/wait/1"
FIRST, SECOND, THIRD = (make_key(number).node_id for number in (1, 2, 3))


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbound, "MAX_STREAMS", 8)
    monkeypatch.setattr(inbound, "MAX_STREAMS_PER_PEER", 4)


async def test_the_peer_that_has_most_makes_room(autojump_clock: MockClock) -> None:
    streams = InboundStreams[str](lambda stream: stream == "a0")
    scopes = {name: streams.add(FIRST, name) for name in ("a0", "a1", "a2", "a3")}
    assert streams.is_full_for(FIRST)
    assert streams.add(FIRST, "a4") is None
    for name in ("b0", "b1", "b2", "b3"):
        assert streams.add(SECOND, name) is not None
    assert streams.add(THIRD, "c0") is not None
    assert len(streams) == 8
    cancelled = [name for name, scope in scopes.items() if scope is not None and scope.cancel_called]
    # The oldest of those that nobody needs.
    assert cancelled == ["a1"]


def test_who_has_nearly_as_many_as_others_gets_no_more() -> None:
    streams = InboundStreams[int]()
    for number in range(4):
        assert streams.add(FIRST, number) is not None
    for number in range(3):
        assert streams.add(SECOND, number) is not None
    assert streams.add(THIRD, 0) is not None
    assert streams.add(SECOND, 3) is None
    assert streams.add(THIRD, 1) is not None
    assert [streams.is_full_for(peer) for peer in (FIRST, SECOND, THIRD)] == [False] * 3


def test_nothing_is_kept_of_streams_that_are_over() -> None:
    streams = InboundStreams[int]()
    for number in range(4):
        streams.add(FIRST, number)
    for number in range(4):
        streams.remove(FIRST, number)
        streams.remove(STRANGER, number)
    assert not streams._of_peer


async def test_two_peers_cannot_hold_all_streams_of_an_endpoint(autojump_clock: MockClock, open_memory: Opener) -> None:
    async with AsyncExitStack() as stack:
        served, *holders, honest = [await stack.enter_async_context(open_memory(number)) for number in range(1, 5)]
        stack.enter_context(served.serve(WAIT, wait_for_ever))
        stack.enter_context(served.serve(ECHO, echo))
        held: list[Stream] = []
        for holder in holders:
            await holder.connect(served.addresses[0])
            held += [await stack.enter_async_context(holder.open_stream(served.node_id, WAIT)) for _ in range(4)]
            with pytest.raises(PeerUnreachable):
                await stack.enter_async_context(holder.open_stream(served.node_id, WAIT))
        await honest.connect(served.addresses[0])
        async with honest.open_stream(served.node_id, ECHO) as stream:
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"
        with pytest.raises(StreamClosed):
            await held[0].receive()
        with trio.move_on_after(1) as scope:
            await held[-1].receive()
        assert scope.cancelled_caught
        assert served.statistics().streams == 7


async def test_a_stream_that_is_no_longer_served_when_it_arrives_is_reset(autojump_clock: MockClock) -> None:
    hub = MemoryHub(latency=1)
    async with open_on(hub, 1) as a, open_on(hub, 2) as b:
        await a.connect(b.addresses[0])
        async with AsyncExitStack() as stack:
            with b.serve(ECHO, echo):
                stream = await stack.enter_async_context(a.open_stream(b.node_id, ECHO))
                await trio.sleep(0.5)
            with trio.fail_after(5), pytest.raises(StreamClosed):
                await stream.receive()
