"""The jobs behind one answer: hedged where the first token is late, tried again where all are busy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import pytest
import trio

from aci_p2p import (
    Chosen,
    Fallback,
    Hedged,
    JobCancelled,
    LocalError,
    NoBids,
    Offered,
    ProviderFault,
    Requirements,
    Waiting,
)
from aci_p2p.client import AnswerStream
from aci_p2p.executor import Executor
from aci_p2p.protocol.bidding import BidBook, Declined, Won
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.protocol.messages import Abort, AbortCode
from aci_p2p.testing import Swarm, ToyExecutor, ToyModel

SLOW, QUICK = 0.1, 100.0
"""Tokens a second."""
OpenSwarm = Callable[..., AbstractAsyncContextManager[Swarm]]
HEDGED = Fallback(hedge_after_ms=2_000)


def each(*executors: Executor) -> Callable[[int], AbstractAsyncContextManager[Executor]]:
    """The n-th provider has the n-th executor."""

    def open_executor(number: int) -> AbstractAsyncContextManager[Executor]:
        return nullcontext(executors[number])

    return open_executor


def paced(*speeds: float) -> Callable[[int], AbstractAsyncContextManager[Executor]]:
    """The n-th provider makes so many tokens a second."""
    return each(*(ToyExecutor(ToyModel(), tokens_per_second=speed) for speed in speeds))


async def collect(stream: AnswerStream) -> list[object]:
    """All updates of a job."""
    return [update async for update in stream.updates]


async def paid(swarm: Swarm) -> list[int]:
    """What each provider was promised, base units."""
    return [await provider.node.store.paid(Party.PROVIDER) for provider in swarm.providers]


async def hear_asks(swarm: Swarm) -> None:
    """Let the consumer's book fill."""
    node = swarm.consumers[0].node
    assert await node.asks.wait_for_asks(swarm.model_root, 60)


def states(swarm: Swarm) -> list[list[State]]:
    """Where each provider's jobs stand."""
    return [[job.state for job in provider.jobs] for provider in swarm.providers]


async def test_another_is_asked_when_the_first_token_is_late(open_swarm: OpenSwarm) -> None:
    async with open_swarm(providers=2, executor=paced(SLOW, QUICK)) as swarm:
        began = trio.current_time()
        async with swarm.consumers[0].stream("Who is quick?", max_tokens=8, fallback=HEDGED) as stream:
            first = stream.job_id
            updates = await collect(stream)
            answer = stream.answer
        # Neither the late one's own time nor its farewell is waited for.
        assert 2 < trio.current_time() - began < 4
        late, quick = swarm.providers
        assert [update for update in updates if isinstance(update, Hedged)] == [Hedged(late.node_id, 2_000)]
        assert [update.provider for update in updates if isinstance(update, Chosen)] == [late.node_id, quick.node_id]
        assert answer.provider == quick.node_id
        assert stream.job_id == answer.receipt.body.job_id != first
        await swarm.settle()
        assert states(swarm) == [[State.CANCELLED], [State.PENDING]]
        assert await paid(swarm) == [0, answer.receipt.body.price]


async def test_the_first_goes_on_when_it_begins_before_the_other(open_swarm: OpenSwarm) -> None:
    async with open_swarm(providers=2, executor=paced(0.3, SLOW)) as swarm:
        answer = await swarm.consumers[0].ask("Who is first?", max_tokens=2, fallback=HEDGED)
        assert answer.provider == swarm.providers[0].node_id
        await swarm.settle()
        assert states(swarm) == [[State.PENDING], [State.CANCELLED]]
        assert await paid(swarm) == [answer.receipt.body.price, 0]


async def test_nobody_else_is_no_harm(open_swarm: OpenSwarm) -> None:
    async with open_swarm(providers=1, executor=paced(SLOW)) as swarm:
        async with swarm.consumers[0].stream("Who else?", max_tokens=2, fallback=HEDGED) as stream:
            updates = await collect(stream)
        assert stream.answer.provider == swarm.providers[0].node_id
        assert sum(isinstance(update, Hedged) for update in updates) == 1


async def test_leaving_early_cancels_both(open_swarm: OpenSwarm) -> None:
    async with open_swarm(providers=2, executor=paced(SLOW, SLOW)) as swarm:
        async with swarm.consumers[0].stream("Who cares?", max_tokens=2, fallback=HEDGED) as stream:
            async for update in stream.updates:
                if isinstance(update, Chosen) and update.provider == swarm.providers[1].node_id:
                    break
        with pytest.raises(JobCancelled):
            _ = stream.answer
        await swarm.settle()
        assert states(swarm) == [[State.CANCELLED], [State.CANCELLED]]
        assert await paid(swarm) == [0, 0]


class Dying(ToyExecutor):
    """Dies some seconds into every answer, before its first token."""

    def __init__(self, seconds: float) -> None:
        """`seconds` until then."""
        super().__init__(ToyModel(), tokens_per_second=1 / seconds, fail_after=0)


async def test_the_other_takes_the_place_of_one_that_dies(open_swarm: OpenSwarm) -> None:
    executors = [Dying(4), ToyExecutor(ToyModel(), tokens_per_second=SLOW), ToyExecutor(ToyModel())]
    async with open_swarm(providers=3, executor=each(*executors)) as swarm:
        async with swarm.consumers[0].stream("Who is left?", max_tokens=2, fallback=HEDGED) as stream:
            updates = await collect(stream)
        # The third would have been quick, but two may not become three.
        chosen = [update.provider for update in updates if isinstance(update, Chosen)]
        assert chosen == [provider.node_id for provider in swarm.providers[:2]]
        assert stream.answer.provider == swarm.providers[1].node_id


async def test_no_more_providers_begin_than_may(open_swarm: OpenSwarm) -> None:
    """One has failed and one is late: with two allowed, that is all; with three, who failed has no second chance."""
    for allowed, hedges in ((2, 0), (3, 1)):
        executors = [Dying(0.5), ToyExecutor(ToyModel(), tokens_per_second=SLOW), ToyExecutor(ToyModel())]
        async with open_swarm(providers=3, executor=each(*executors)) as swarm:
            patience = Fallback(providers=allowed, hedge_after_ms=2_000)
            async with swarm.consumers[0].stream("Who is left?", max_tokens=2, fallback=patience) as stream:
                updates = await collect(stream)
            assert sum(isinstance(update, Hedged) for update in updates) == hedges
            assert stream.answer.provider == swarm.providers[1 + hedges].node_id


async def test_a_hedge_that_found_nobody_leaves_the_first_its_failover(open_swarm: OpenSwarm) -> None:
    """The other may cost more than what the first leaves of the price, and still be affordable in its place."""
    async with open_swarm(providers=2, executor=each(Dying(4), ToyExecutor(ToyModel()))) as swarm:
        consumer, limit = swarm.consumers[0], Requirements(max_price=79_000)
        question, patience = "What is the price?", Fallback(hedge_after_ms=2_000)
        async with consumer.stream(question, max_tokens=1, requirements=limit, fallback=patience) as stream:
            updates = await collect(stream)
        assert any(isinstance(update, Hedged) for update in updates)
        assert stream.answer.provider == swarm.providers[1].node_id


@pytest.mark.parametrize(("first_s", "second_s"), [(9, 3), (4, 9)])
async def test_when_both_fail_the_second_error_counts(open_swarm: OpenSwarm, first_s: float, second_s: float) -> None:
    executors = [Dying(first_s), Dying(second_s)]
    async with open_swarm(providers=2, executor=each(*executors)) as swarm:
        with pytest.raises(ProviderFault) as caught:
            await swarm.consumers[0].ask("Who lives?", fallback=Fallback(providers=2, hedge_after_ms=2_000))
        assert caught.value.provider == swarm.providers[1].node_id


async def test_both_together_cost_no_more_than_one_may(open_swarm: OpenSwarm) -> None:
    async with open_swarm(providers=2, executor=paced(SLOW, QUICK)) as swarm:
        consumer = swarm.consumers[0]
        cheap = await consumer.ask("What is the price?", max_tokens=1, fallback=Fallback(hedge_after_ms=60_000))
        (enough,) = [bid.worst_price for bid in cheap.receipt.body.bids if bid.provider == cheap.provider]
        limit = Requirements(max_price=enough)
        async with consumer.stream("What is the price?", max_tokens=1, requirements=limit, fallback=HEDGED) as stream:
            updates = await collect(stream)
        assert not any(isinstance(update, Hedged) for update in updates)
        assert stream.answer.provider == cheap.provider == swarm.providers[0].node_id


async def test_what_is_full_is_asked_again(open_swarm: OpenSwarm) -> None:
    async with open_swarm(providers=1, slots=1, asks=True, executor=paced(5.0)) as swarm:
        consumer = swarm.consumers[0]
        await hear_asks(swarm)
        async with trio.open_nursery() as nursery, consumer.stream("First?", max_tokens=20) as first:
            await anext(first)
            nursery.start_soon(collect, first)
            with pytest.raises(NoBids) as caught:
                await consumer.ask("At once?", max_tokens=2, fallback=Fallback(busy_wait_ms=0))
            assert caught.value.retry_at is not None
            async with consumer.stream("Second?", max_tokens=2) as second:
                updates = await collect(second)
        kinds = [type(update) for update in updates if isinstance(update, Offered | Waiting)]
        # An offer, a wait and so on, and in the end the answer.
        assert kinds[:2] == [Offered, Waiting]
        assert kinds[-1] is Offered
        assert second.answer.tokens
        await swarm.settle()


async def test_waiting_has_an_end(open_swarm: OpenSwarm) -> None:
    async with open_swarm(providers=1, slots=1, asks=True, executor=paced(SLOW)) as swarm:
        consumer = swarm.consumers[0]
        await hear_asks(swarm)
        async with consumer.stream("First?", max_tokens=20) as first:
            async for update in first.updates:
                if isinstance(update, Chosen):
                    break
            began = trio.current_time()
            with pytest.raises(NoBids):
                await consumer.ask("Second?", max_tokens=2, fallback=Fallback(busy_wait_ms=6_000))
            assert 5 < trio.current_time() - began < 8


@pytest.mark.parametrize("told", [0, 1])
async def test_who_says_that_it_is_busy_and_is_not_gets_few_offers(
    open_swarm: OpenSwarm, monkeypatch: pytest.MonkeyPatch, told: int
) -> None:
    real = BidBook.take

    def take(book: BidBook, frame: bytes, now: int) -> Won | Declined:
        won = real(book, frame, now)
        assert isinstance(won, Won)
        book.release(won)
        return Declined(Abort(won.offer.body.job_id, AbortCode.BUSY, "come again", told))

    monkeypatch.setattr(BidBook, "take", take)
    async with open_swarm(providers=1) as swarm:
        with pytest.raises(NoBids):
            await swarm.consumers[0].ask("Who is busy?", fallback=Fallback(busy_wait_ms=10_000))
        # It says when, or it does not; asked again after 1, 2 and 4 s at most.
        assert len(swarm.consumers[0].jobs) == (4 if told else 1)


async def test_what_was_left_is_no_answer(open_swarm: OpenSwarm) -> None:
    async with open_swarm(providers=1) as swarm:
        async with swarm.consumers[0].stream("Hello?", max_tokens=200) as stream:
            await anext(stream)
        with pytest.raises(JobCancelled):
            _ = stream.answer


@pytest.mark.parametrize(
    "options", [{"hedge_after_ms": -1}, {"busy_wait_ms": -1}, {"providers": 1, "hedge_after_ms": 1_000}]
)
def test_impossible_patience_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LocalError):
        Fallback(**options)
