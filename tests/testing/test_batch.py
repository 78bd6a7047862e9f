"""Many questions at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext

import pytest
import trio

from aci_p2p import ACI, AciError, Fallback, LocalError, NoBids, Requirements, UnknownModel
from aci_p2p.client import Answer
from aci_p2p.executor import Executor
from aci_p2p.protocol.lifecycle import State
from aci_p2p.testing import Swarm, ToyExecutor, ToyModel

OpenSwarm = Callable[..., AbstractAsyncContextManager[Swarm]]
QUESTIONS = [f"Question {number}?" for number in range(12)]


async def test_all_are_answered_a_few_at_a_time(open_swarm: OpenSwarm) -> None:
    running = most = 0
    async with open_swarm(providers=2, slots=4, asks=True) as swarm, ACI(swarm.consumers[0].node) as aci:
        alone = [await aci.inference(prompt=question, model=swarm.model, max_tokens=4) for question in QUESTIONS]
        outcomes: dict[int, Answer] = {}
        async with aci.batch(QUESTIONS, at_once=3, model=swarm.model, max_tokens=4) as results:
            async for result in results:
                assert isinstance(result.outcome, Answer)
                outcomes[result.number] = result.outcome
                running = sum(job.state not in (State.PENDING, State.FINAL) for job in swarm.consumers[0].jobs)
                most = max(most, running)
        assert [outcomes[number].text for number in range(12)] == [answer.text for answer in alone]
        assert 1 < most <= 3
        await swarm.settle()


async def test_more_than_there_are_slots(open_swarm: OpenSwarm) -> None:
    """Who finds no slot asks again when it was told to."""
    slow = ToyExecutor(ToyModel(), tokens_per_second=4)

    def open_executor(_number: int) -> AbstractAsyncContextManager[Executor]:
        return nullcontext(slow)

    async with (
        open_swarm(providers=1, slots=2, asks=True, executor=open_executor) as swarm,
        ACI(swarm.consumers[0].node) as aci,
    ):
        await swarm.consumers[0].node.asks.wait_for_asks(swarm.model_root, 60)
        patient = Fallback(busy_wait_ms=60_000)
        async with aci.batch(QUESTIONS, at_once=8, model=swarm.model, max_tokens=4, fallback=patient) as results:
            outcomes = [result.outcome async for result in results]
        assert [type(outcome) for outcome in outcomes] == [Answer] * 12


async def test_a_failure_ends_none_of_the_others(open_swarm: OpenSwarm) -> None:
    async with open_swarm(providers=1) as swarm, ACI(swarm.consumers[0].node) as aci:
        long = "word " * 2_000
        async with aci.batch(["Short?", long, "Short again?"], model=swarm.model, max_tokens=2) as results:
            outcomes = {result.number: result.outcome async for result in results}
        assert isinstance(outcomes[0], Answer)
        assert isinstance(outcomes[1], AciError)
        assert isinstance(outcomes[2], Answer)


async def test_leaving_early_cancels_the_rest(open_swarm: OpenSwarm) -> None:
    async with open_swarm(providers=1, slots=4) as swarm, ACI(swarm.consumers[0].node) as aci:
        async with aci.batch(QUESTIONS, at_once=4, model=swarm.model, max_tokens=200) as results:
            async for _ in results:
                break
        await swarm.settle()
        states = {job.state for job in swarm.consumers[0].jobs}
        assert State.CANCELLED in states
        assert len(swarm.consumers[0].jobs) < len(QUESTIONS)


async def test_nothing_is_asked_when_something_makes_no_sense(open_swarm: OpenSwarm) -> None:
    async with open_swarm(providers=1) as swarm, ACI(swarm.consumers[0].node) as aci:
        with pytest.raises(LocalError, match="empty"):
            async with aci.batch(["Hello?", " "], model=swarm.model):
                pass
        with pytest.raises(LocalError, match="several"):
            async with aci.batch("Hello?", model=swarm.model):
                pass
        with pytest.raises(LocalError, match="at once"):
            async with aci.batch(QUESTIONS, at_once=0, model=swarm.model):
                pass
        with pytest.raises(UnknownModel):
            async with aci.batch(QUESTIONS, model="none"):
                pass
        async with aci.batch([], model=swarm.model) as results:
            assert [result async for result in results] == []
        assert swarm.consumers[0].jobs == []


async def test_all_may_fail(open_swarm: OpenSwarm) -> None:
    async with open_swarm(providers=1, asks=True) as swarm, ACI(swarm.consumers[0].node) as aci:
        await swarm.consumers[0].node.asks.wait_for_asks(swarm.model_root, 60)
        began = trio.current_time()
        poor = Requirements(max_price=1)
        async with aci.batch(QUESTIONS, model=swarm.model, requirements=poor) as results:
            outcomes = [result.outcome async for result in results]
        assert {type(outcome) for outcome in outcomes} <= {NoBids}
        assert trio.current_time() - began < 10
