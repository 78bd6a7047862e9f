"""The queue between gossip and its consumer: bounded, and patient with a consumer that works."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.network import GossipMessage
from aci_p2p.network.delivery import MAX_PATIENCE_SECONDS, PATIENCE_PER_SECOND, QueuedSubscription
from tests.network.driver import STRANGER
from tests.network.test_contract_gossip import accept


def message(number: int) -> GossipMessage:
    """A message of its own for each number."""
    return GossipMessage(STRANGER, b"%d" % number)


@pytest.fixture
def queue() -> QueuedSubscription:
    """A full queue of two."""
    queue = QueuedSubscription(accept, 2)
    states: list[bool] = []
    for number in range(2):
        assert queue.deliver(message(number))
        states.append(queue.is_full)
    assert states == [False, True]
    return queue


async def consume(queue: QueuedSubscription) -> None:
    """Take one, so that the consumer is known to work, and fill the queue again."""
    await queue.receive()
    assert queue.deliver(message(2))


async def waited(queue: QueuedSubscription) -> float:
    """Seconds that a reader waits for room."""
    started = trio.current_time()
    await queue.wait_for_room()
    return trio.current_time() - started


async def test_without_a_consumer_nobody_waits(autojump_clock: MockClock, queue: QueuedSubscription) -> None:
    assert not queue.is_worth_waiting_for
    assert await waited(queue) == 0
    assert not queue.deliver(message(2))
    assert queue.dropped == 1
    assert [(await queue.receive()).data for _ in range(2)] == [b"1", b"2"]


async def test_a_consumer_that_works_is_waited_for(autojump_clock: MockClock, queue: QueuedSubscription) -> None:
    await consume(queue)
    assert queue.is_worth_waiting_for
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            await trio.sleep(MAX_PATIENCE_SECONDS / 2)
            await queue.receive()

        assert await waited(queue) == pytest.approx(MAX_PATIENCE_SECONDS / 2)
    assert queue.deliver(message(3))
    assert queue.dropped == 0


async def test_patience_ends_with_a_consumer_that_stopped(autojump_clock: MockClock, queue: QueuedSubscription) -> None:
    await consume(queue)
    assert await waited(queue) == pytest.approx(MAX_PATIENCE_SECONDS)
    assert not queue.is_worth_waiting_for
    await trio.sleep(100)
    assert await waited(queue) == 0
    await consume(queue)
    assert await waited(queue) == pytest.approx(MAX_PATIENCE_SECONDS)


async def test_readers_that_wait_together_lose_patience_as_one(
    autojump_clock: MockClock, queue: QueuedSubscription
) -> None:
    await consume(queue)
    async with trio.open_nursery() as nursery:
        for _ in range(9):
            nursery.start_soon(queue.wait_for_room)
        await trio.sleep(MAX_PATIENCE_SECONDS / 2)
        await queue.receive()
    assert queue.deliver(message(3))
    # Half of it is left, and what has come since.
    left = MAX_PATIENCE_SECONDS / 2 * (1 + PATIENCE_PER_SECOND)
    assert await waited(queue) == pytest.approx(left, rel=0.01)


async def test_a_consumer_without_a_turn_is_given_one(autojump_clock: MockClock, queue: QueuedSubscription) -> None:
    """All patience is gone in one turn of the loop, as when other processes have the processor."""
    await consume(queue)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            await trio.sleep(MAX_PATIENCE_SECONDS)
            await queue.receive()

        await queue.wait_for_room()
    assert queue.deliver(message(3))
    assert queue.dropped == 0


async def test_slow_consumers_take_so_much_of_the_readers_time(autojump_clock: MockClock) -> None:
    queue = QueuedSubscription(accept, 1)
    total, started = 0.0, trio.current_time()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            while True:
                await queue.receive()
                await trio.sleep(0.03)

        for number in range(2000):
            total += await waited(queue)
            queue.deliver(message(number))
            await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    elapsed = trio.current_time() - started
    assert queue.dropped > 1000
    assert 0.5 * PATIENCE_PER_SECOND < total / elapsed < PATIENCE_PER_SECOND + MAX_PATIENCE_SECONDS / elapsed + 0.01
