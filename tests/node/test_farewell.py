"""What a peer says before it leaves is heard, whatever we are sending, and however fast."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from aci_p2p import ACI, Answer, BidSeen, Fallback, NoBids, RemoteError
from aci_p2p.node import Node
from aci_p2p.protocol.lifecycle import Party, State
from tests.node.conftest import ROOT, OpenTestNode, ScriptedExecutor


@pytest.mark.parametrize("pace", [0.00001, 0.001, 0.005])
async def test_a_consumer_that_cancels_amid_tokens_is_not_blamed(
    autojump_clock: MockClock, open_test_node: OpenTestNode, pace: float
) -> None:
    executor = ScriptedExecutor(text=" ".join(["word"] * 4_000), pace=pace)
    async with (
        open_test_node("provider", executor=executor) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        async with aci.stream(model=ROOT.hex(), prompt="count", max_tokens=4_000) as stream:
            assert await anext(stream)
        await trio.sleep(5)
        (job,) = await provider.store.jobs()
        assert (job.state, job.blame, job.detail) == (State.CANCELLED, Party.NOBODY, "the consumer cancelled")
        assert not executor.running


async def ask(aci: ACI, answers: list[Answer | RemoteError]) -> None:
    try:
        answers.append(await aci.inference(model=ROOT.hex(), prompt="count", max_tokens=200))
    except RemoteError as error:
        answers.append(error)


async def drain(provider: Node, grace_s: float) -> float:
    """Drain as a daemon does; the seconds that it took."""
    assert provider.provider is not None
    started = trio.current_time()
    await provider.provider.drain(grace_s)
    return trio.current_time() - started


async def test_a_provider_that_stops_finishes_what_it_runs_and_takes_no_more(
    autojump_clock: MockClock, open_test_node: OpenTestNode
) -> None:
    executor = ScriptedExecutor(text=" ".join(["word"] * 100), pace=0.1)
    answers: list[Answer | RemoteError] = []
    async with (
        open_test_node("provider", executor=executor) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
        trio.open_nursery() as nursery,
    ):
        assert provider.provider is not None
        nursery.start_soon(ask, aci, answers)
        await trio.sleep(3)
        (running,) = provider.provider.progress()
        assert (running.consumer, running.model) == (consumer.node_id, "scripted")
        assert 5 < running.tokens < 100
        assert running.tokens_per_s == pytest.approx(10, rel=0.05)
        assert [record.free_slots for record in provider.provider.capabilities()] == [1]
        nursery.start_soon(drain, provider, 30.0)
        await trio.sleep(0.5)
        assert [record.free_slots for record in provider.provider.capabilities()] == [0]
        with pytest.raises(NoBids):
            await aci.inference(model=ROOT.hex(), prompt="another", fallback=Fallback(busy_wait_ms=0))
        assert not answers
        taken = await drain(provider, 30)
        assert 1 < taken < 10
        statistics = provider.provider.statistics()
        assert (statistics.running, statistics.finished, statistics.draining) == (0, 1, True)
        assert await drain(provider, 30) == 0
        # The receipt comes on a stream of its own.
        await trio.sleep(1)
        statistics = provider.provider.statistics()
    (answer,) = answers
    assert isinstance(answer, Answer)
    assert len(answer.tokens) == 100
    assert statistics.earned == answer.receipt.body.price > 0


async def test_an_award_to_a_provider_that_stops_goes_to_the_next(
    autojump_clock: MockClock, open_test_node: OpenTestNode
) -> None:
    executor = ScriptedExecutor(text="well done")
    async with (
        open_test_node("cheap", executor=executor, price=1) as cheap,
        open_test_node("dear", cheap.addresses[:1], executor=executor, price=5) as dear,
        open_test_node("consumer", cheap.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        assert cheap.provider is not None
        assert dear.provider is not None
        async with aci.stream(model=ROOT.hex(), prompt="hello") as stream:
            async for update in stream.updates:
                if isinstance(update, BidSeen) and update.bid.provider == cheap.node_id:
                    await drain(cheap, 0)
            assert stream.answer.provider == dear.node_id
        assert cheap.provider.statistics().finished == 0


async def test_what_the_grace_period_does_not_finish_is_handed_back(
    autojump_clock: MockClock, open_test_node: OpenTestNode
) -> None:
    executor = ScriptedExecutor(text=" ".join(["word"] * 200), pace=1)
    answers: list[Answer | RemoteError] = []
    async with open_test_node("consumer") as consumer, ACI(consumer) as aci, trio.open_nursery() as nursery:
        async with open_test_node("provider", consumer.addresses[:1], executor=executor) as provider:
            nursery.start_soon(ask, aci, answers)
            await trio.sleep(4)
            assert await drain(provider, 5) == pytest.approx(5)
            assert provider.provider is not None
            assert provider.provider.statistics().running == 1
        await trio.sleep(1)
        (error,) = answers
        assert isinstance(error, RemoteError)
        assert "shutting down" in str(error)
