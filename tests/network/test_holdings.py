"""What connections hold in their buffers, counted together."""

from __future__ import annotations

import trio

from aci_p2p.network.libp2p.holdings import Holdings
from aci_p2p.network.libp2p.yamux import StreamReset, Yamux
from aci_p2p.tasks import open_background
from tests.network.driver import eventually
from tests.network.test_yamux import Served, run, wires


class Greedy:
    """Notes that it was told to end."""

    ended = False

    def give_up(self) -> None:
        self.ended = True


def test_the_one_that_holds_most_gives_up() -> None:
    holdings, small, large = Holdings(10), Greedy(), Greedy()
    holdings.enter(small, 2)
    holdings.enter(large, 3)
    holdings.change(large, 3)
    holdings.change(small, 2)
    assert (holdings.total, small.ended, large.ended) == (10, False, False)
    holdings.change(small, 1)
    assert (holdings.total, small.ended, large.ended) == (5, False, True)
    # What is released after the end was counted with it.
    holdings.change(large, -6)
    holdings.leave(large)
    assert holdings.total == 5
    holdings.leave(small)
    assert holdings.total == 0


async def test_all_that_a_connection_holds_is_counted_and_no_longer_than_it_holds_it() -> None:
    left, right = wires()
    dialler, listener, inbound, holdings = (
        Yamux(left, is_initiator=True),
        Yamux(right, is_initiator=False),
        Served(),
        Holdings(),
    )
    async with open_background() as nursery:
        early = dialler.open_stream()
        nursery.start_soon(dialler.run, Served(), Holdings())
        nursery.start_soon(listener.run, inbound, holdings)
        first, second, third = early, dialler.open_stream(), dialler.open_stream()
        for stream in (first, second, third):
            await stream.write(bytes(100_000))
        served = [await inbound.receive.receive() for _ in range(3)]
        await eventually(lambda: holdings.total == 300_000)
        # Read, dropped, and read after the peer's reset.
        assert await served[0].read_exactly(100_000) == bytes(100_000)
        await eventually(lambda: holdings.total == 200_000)
        served[1].reset()
        await eventually(lambda: holdings.total == 100_000)
        third.reset()
        assert await served[2].read_exactly(100_000) == bytes(100_000)
        await eventually(lambda: holdings.total == 0)
        # What we send, until it has left.
        await served[0].write(bytes(1000))
        assert holdings.total == 1012
        await eventually(lambda: holdings.total == 0)


async def test_half_a_frame_is_counted() -> None:
    left, right = wires()
    listener, holdings = Yamux(right, is_initiator=False), Holdings()
    async with open_background() as nursery:
        nursery.start_soon(listener.run, Served(), holdings)
        await left.write(bytes((0, 0, 0, 1)) + (1).to_bytes(4) + (5).to_bytes(4) + b"abc")
        await eventually(lambda: holdings.total == 15)
        await left.write(b"d")
        await eventually(lambda: holdings.total == 16)


async def test_who_gives_up_ends_at_once() -> None:
    left, right = wires()
    dialler, listener, inbound, holdings = (
        Yamux(left, is_initiator=True),
        Yamux(right, is_initiator=False),
        Served(),
        Holdings(50_000),
    )
    ended = trio.Event()

    async def serve() -> None:
        await listener.run(inbound, holdings)
        ended.set()

    async with open_background() as nursery:
        nursery.start_soon(serve)
        nursery.start_soon(run, dialler, Served())
        stream = dialler.open_stream()
        with trio.fail_after(5):
            await stream.write(bytes(60_000))
            await ended.wait()
            assert listener.is_closed
            assert holdings.total == 0
            try:
                while True:
                    await stream.write(bytes(60_000))
            except StreamReset:
                pass
