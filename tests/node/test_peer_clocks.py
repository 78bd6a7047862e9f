"""How far the clocks of connected peers are from ours, by asking them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.clock import virtual_clock
from aci_p2p.dht import RecordRules
from aci_p2p.network import Network
from aci_p2p.network.api import Stream, StreamClosed
from aci_p2p.network.memory import MemoryHub
from aci_p2p.peer_clocks import (
    CLOCK_PROTOCOL,
    MAX_ASKED,
    ClockReading,
    clock_service,
    median_ahead_ms,
    read_peer_clocks,
)
from aci_p2p.protocol.identity import KeyPair

RULES = RecordRules("aci-test", virtual_clock)


@asynccontextmanager
async def open_network(hub: MemoryHub, number: int) -> AsyncGenerator[Network]:
    key = KeyPair(bytes([number]) * 32)
    async with hub.open_network(key, record_validator=RULES.validate, record_selector=RULES.select) as network:
        yield network


def shifted(by_ms: int) -> Callable[[], int]:
    return lambda: virtual_clock() + 10**12 + by_ms


async def test_what_peers_say(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with (
        open_network(hub, 1) as asking,
        open_network(hub, 2) as right,
        open_network(hub, 3) as ahead,
        open_network(hub, 4) as behind,
    ):
        assert await read_peer_clocks(asking, shifted(0)) == []
        with (
            right.serve(CLOCK_PROTOCOL, clock_service(shifted(0))),
            ahead.serve(CLOCK_PROTOCOL, clock_service(shifted(3_600_000))),
            behind.serve(CLOCK_PROTOCOL, clock_service(shifted(-500))),
        ):
            for other in (right, ahead, behind):
                await asking.connect(other.addresses[0])
            readings = {reading.peer: reading for reading in await read_peer_clocks(asking, shifted(0))}
            for network, expected in ((right, 0), (ahead, 3_600_000), (behind, -500)):
                assert readings[network.node_id].ahead_ms == pytest.approx(expected, abs=1)
                assert readings[network.node_id].round_trip_ms == pytest.approx(20, abs=1)
            # One that lies, or is wrong, does not count.
            assert median_ahead_ms(list(readings.values())) == pytest.approx(0, abs=1)
            # We are the one who is wrong.
            assert median_ahead_ms(await read_peer_clocks(asking, shifted(7_200_000))) == pytest.approx(
                -7_200_000, abs=1
            )


async def test_peers_that_do_not_tell(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async def silent(stream: Stream) -> None:
        await trio.sleep_forever()

    async def talks_nonsense(stream: Stream) -> None:
        await stream.receive()
        await stream.send(b"noon")

    async with (
        open_network(hub, 1) as asking,
        open_network(hub, 2) as ignorant,
        open_network(hub, 3) as mute,
        open_network(hub, 4) as foolish,
        open_network(hub, 5) as honest,
    ):
        with (
            mute.serve(CLOCK_PROTOCOL, silent),
            foolish.serve(CLOCK_PROTOCOL, talks_nonsense),
            honest.serve(CLOCK_PROTOCOL, clock_service(shifted(0))),
        ):
            for other in (ignorant, mute, foolish, honest):
                await asking.connect(other.addresses[0])
            started = trio.current_time()
            (reading,) = await read_peer_clocks(asking, shifted(0))
            assert reading.peer == honest.node_id
            assert trio.current_time() - started < 6


async def test_a_question_that_is_none_gets_no_answer(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_network(hub, 1) as asking, open_network(hub, 2) as other:
        with other.serve(CLOCK_PROTOCOL, clock_service(shifted(0))):
            await asking.connect(other.addresses[0])
            async with asking.open_stream(other.node_id, CLOCK_PROTOCOL) as stream:
                await stream.send(b"?")
                with pytest.raises(StreamClosed):
                    await stream.receive()


async def test_only_some_of_many_are_asked(autojump_clock: MockClock, hub: MemoryHub) -> None:
    async with open_network(hub, 1) as asking, AsyncExitStack() as stack:
        for number in range(2, MAX_ASKED + 5):
            other = await stack.enter_async_context(open_network(hub, number))
            stack.enter_context(other.serve(CLOCK_PROTOCOL, clock_service(shifted(0))))
            await asking.connect(other.addresses[0])
        assert len(await read_peer_clocks(asking, shifted(0))) == MAX_ASKED


def test_the_median_of_two_lies_between() -> None:
    peer = KeyPair(bytes(32)).node_id
    assert median_ahead_ms([ClockReading(peer, 10, 1), ClockReading(peer, 30, 1)]) == 20
