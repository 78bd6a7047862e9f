"""Whole jobs between nodes over the in-memory network, in virtual time."""

from __future__ import annotations

import gc
import logging
import re
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock

from aci_p2p import (
    ACI,
    ImpossibleJob,
    JobCancelled,
    NoBids,
    Node,
    NotConnected,
    PromptRefused,
    ProviderFault,
    Requirements,
    Turn,
    UnknownModel,
)
from aci_p2p.clock import virtual_clock
from aci_p2p.consumer import Offered, RunningJob
from aci_p2p.executor.api import ExecutorFailed, ModelUnavailable, PromptTooLong
from aci_p2p.network.api import StreamClosed
from aci_p2p.network.memory import MemoryHub
from aci_p2p.protocol.envelope import Envelope, Sealer, open_envelope
from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.job import JOB_PROTOCOL, BidSeen, Chosen, Deliver
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.protocol.messages import Abort, AbortCode, Award, Bid, Offer
from aci_p2p.protocol.proof import ProofInvalid, encode_proof
from aci_p2p.served_job import ServedJob
from tests.node.conftest import ROOT, OpenTestNode, ScriptedExecutor, due
from tests.scenarios.messages import make_offer

if TYPE_CHECKING:
    from trio import TaskStatus

MODEL = ROOT.hex()


async def states(node: Node, job_id: bytes, role: Party) -> list[State]:
    """The stored path of a job."""
    return [state for state, _ in await node.store.history(job_id, role)]


async def test_answer_with_proof_and_receipt(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor(), price=7) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        answer = await aci.inference(model=MODEL, prompt="count", max_tokens=10)
        assert answer.text == "one two three four"
        assert answer.tokens == (0, 1, 2, 3)
        assert answer.provider == provider.node_id
        assert answer.receipt.body.price == due(10 * 1 + 4 * 7)
        assert (await aci.verify_proof(answer.proof)).proof.sender == provider.node_id
        data = encode_proof(answer.proof)
        with pytest.raises(ProofInvalid):
            await aci.verify_proof(data[:-1] + bytes([data[-1] ^ 1]))
        job_id = answer.receipt.body.job_id
        await trio.sleep(1)
        path = [State.AWARDED, State.ACCEPTED, State.STREAMING, State.COMMITTED, State.REVEALED, State.RECEIPTED]
        path.append(State.PENDING)
        assert await states(provider, job_id, Party.PROVIDER) == path
        path.remove(State.COMMITTED)
        assert await states(consumer, job_id, Party.CONSUMER) == [
            State.OFFERED, *path[:3], State.COMMITTED, *path[3:],
        ]  # fmt: skip
        for node, role in ((provider, Party.PROVIDER), (consumer, Party.CONSUMER)):
            record = await node.store.get_job(job_id, role)
            assert record is not None
            assert (record.price, record.blame) == (due(38), Party.NOBODY)
            assert record.receipt == answer.receipt.data
        assert provider.provider is not None
        assert provider.provider.statistics().finished == 1


async def test_the_prompt_is_as_long_as_the_executor_says(
    autojump_clock: MockClock, open_test_node: OpenTestNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts the prompt when it reads it: nothing tokenises the conversation again."""
    executor = ScriptedExecutor(input_tokens=37)
    monkeypatch.setattr(executor, "encode", None)
    async with (
        open_test_node("provider", executor=executor, price=7) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        answer = await aci.inference(model=MODEL, prompt="count", max_tokens=10)
        assert (await aci.verify_proof(answer.proof)).proof.body.input_tokens == 37
        assert answer.receipt.body.price == due(37 * 1 + 4 * 7)


async def test_a_client_with_its_own_node(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor()) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
    ):
        aci = ACI(consumer)
        with pytest.raises(LocalError, match="outside"):
            _ = aci.node
        async with aci, aci.stream(model=MODEL, prompt="count") as stream:
            assert [part async for part in stream] == ["one ", "two ", "three ", "four"]
            assert stream.answer.text == "one two three four"


async def test_updates_come_in_order(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor()) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
        aci.stream(model=MODEL, prompt=[Turn("system", "be brief"), Turn("user", "count")]) as stream,
    ):
        updates = [update async for update in stream.updates]
    assert [type(update) for update in updates] == [Offered, BidSeen, Chosen, *[Deliver] * 4]


async def test_the_cheapest_of_several_wins(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with AsyncExitStack() as stack:
        bootstrap = await stack.enter_async_context(open_test_node("bootstrap"))
        providers = [
            await stack.enter_async_context(
                open_test_node(f"p{price}", bootstrap.addresses[:1], executor=ScriptedExecutor(), price=price)
            )
            for price in (9, 5, 7)
        ]
        consumer = await stack.enter_async_context(open_test_node("consumer", bootstrap.addresses[:1]))
        aci = await stack.enter_async_context(ACI(consumer))
        started = trio.current_time()
        answer = await aci.inference(model=MODEL, prompt="count")
        assert answer.provider == providers[1].node_id
        assert len(answer.receipt.body.bids) == 3
        # All known providers have bid, so the window of a second is not waited out.
        assert trio.current_time() - started < 0.9


async def test_jobs_at_once_beyond_the_slots_all_finish(
    autojump_clock: MockClock, open_test_node: OpenTestNode
) -> None:
    answers: list[str] = []
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(open_test_node("a", executor=ScriptedExecutor(), price=1, slots=1))
        await stack.enter_async_context(
            open_test_node("b", first.addresses[:1], executor=ScriptedExecutor(), price=2, slots=5)
        )
        consumer = await stack.enter_async_context(open_test_node("consumer", first.addresses[:1]))
        aci = await stack.enter_async_context(ACI(consumer))

        async def ask(number: int) -> None:
            answers.append((await aci.inference(model=MODEL, prompt=f"count {number}")).text)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(ask, number)
    assert answers == ["one two three four"] * 5


async def test_sampling_seed_is_shared_and_only_used_when_sampling(
    autojump_clock: MockClock, open_test_node: OpenTestNode
) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor()) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        answer = await aci.inference(model=MODEL, prompt="count", temperature=0.7)
        verified = await aci.verify_proof(answer.proof)
        assert verified.proof.body.temperature_milli == 700
        assert len(verified.proof.body.seed) == 32


FAILURES: list[tuple[ScriptedExecutor, type[Exception], str, State, State, Party]] = [
    (
        ScriptedExecutor(fail_at=2), ProviderFault, "after 2 tokens: the computation failed",
        State.PROVIDER_FAULT, State.PROVIDER_FAULT, Party.PROVIDER,
    ),
    (
        ScriptedExecutor(finish=None), ProviderFault, "after 4 tokens: the computation failed",
        State.PROVIDER_FAULT, State.PROVIDER_FAULT, Party.PROVIDER,
    ),
    (
        ScriptedExecutor(fail_at=0, error=PromptTooLong("9000 tokens, 8192 at most")), PromptRefused, "9000 tokens",
        State.CANCELLED, State.CANCELLED, Party.NOBODY,
    ),
    (
        ScriptedExecutor(fail_at=0, error=LocalError("the template refuses")), PromptRefused, "template refuses",
        State.CANCELLED, State.CANCELLED, Party.NOBODY,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("executor", "error", "match", "theirs", "ours", "blame"), FAILURES)
async def test_execution_failures(
    autojump_clock: MockClock,
    open_test_node: OpenTestNode,
    executor: ScriptedExecutor,
    error: type[Exception],
    match: str,
    theirs: State,
    ours: State,
    blame: Party,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "aci_p2p.provider")
    async with (
        open_test_node("provider", executor=executor) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        with pytest.raises(error, match=match):
            await aci.inference(model=MODEL, prompt="count")
        await trio.sleep(1)
        (mine,) = await consumer.store.jobs()
        (its,) = await provider.store.jobs()
        assert (mine.state, its.state, mine.blame, its.blame) == (ours, theirs, blame, blame)
    (failure,) = [record for record in caplog.records if record.message == "generation failed"]
    assert failure.levelname == ("INFO" if blame is Party.NOBODY else "WARNING")


async def test_provider_vanishes_mid_stream(
    autojump_clock: MockClock, open_test_node: OpenTestNode, hub: MemoryHub
) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor(pace=1)) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        with pytest.raises(ProviderFault, match="after 1 tokens"):
            async with aci.stream(model=MODEL, prompt="count") as stream:
                async for _ in stream:
                    hub.cut_off(provider.node_id)
        (mine,) = await consumer.store.jobs()
        assert (mine.state, mine.blame) == (State.PROVIDER_FAULT, Party.PROVIDER)


async def test_silent_provider_times_out(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor(pace=100)) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        started = trio.current_time()
        with pytest.raises(ProviderFault, match=r"silent|progress"):
            await aci.inference(model=MODEL, prompt="count")
        assert 59 < trio.current_time() - started < 65


async def test_leaving_early_stops_the_provider(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    executor = ScriptedExecutor(pace=0.5, text=" ".join(["word"] * 50))
    async with (
        open_test_node("provider", executor=executor) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        async with aci.stream(model=MODEL, prompt="count") as stream:
            async for _ in stream:
                break
        with pytest.raises(JobCancelled):
            _ = stream.answer
        await trio.sleep(0.2)
        assert executor.running == 0
        (mine,) = await consumer.store.jobs()
        (its,) = await provider.store.jobs()
        assert (mine.state, its.state) == (State.CANCELLED, State.CANCELLED)


async def test_cancelling_from_outside_stops_the_provider(
    autojump_clock: MockClock, open_test_node: OpenTestNode
) -> None:
    executor = ScriptedExecutor(pace=0.5, text=" ".join(["word"] * 50))
    async with (
        open_test_node("provider", executor=executor) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        with trio.move_on_after(3) as scope:
            await aci.inference(model=MODEL, prompt="count")
        assert scope.cancelled_caught
        await trio.sleep(0.2)
        assert executor.running == 0
        (its,) = await provider.store.jobs()
        assert its.state is State.CANCELLED


async def test_provider_shutting_down_hands_its_job_back(
    autojump_clock: MockClock, open_test_node: OpenTestNode
) -> None:
    stop = trio.Event()

    async def provide(bootstrap: str, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with open_test_node("provider", (bootstrap,), executor=ScriptedExecutor(pace=1)):
            task_status.started()
            await stop.wait()

    async with (
        open_test_node("bootstrap") as bootstrap,
        trio.open_nursery() as nursery,
        open_test_node("consumer", bootstrap.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        await nursery.start(provide, bootstrap.addresses[0])
        with pytest.raises(ProviderFault, match="shutting down"):
            async with aci.stream(model=MODEL, prompt="count") as stream:
                async for _ in stream:
                    stop.set()


async def test_nobody_bids(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor()) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        assert provider.provider is not None
        provider.provider._book.draining = True
        with pytest.raises(NoBids, match="nobody bid within 1 s") as caught:
            await aci.inference(model=MODEL, prompt="count")
        assert caught.value.bids == 0
        (mine,) = await consumer.store.jobs()
        assert mine.state is State.EXPIRED


async def test_a_model_that_nobody_has_is_not_offered(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with (
        open_test_node("bootstrap") as bootstrap,
        open_test_node("consumer", bootstrap.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        with pytest.raises(ImpossibleJob, match="no provider has the model") as caught:
            await aci.inference(model=MODEL, prompt="count")
        assert (caught.value.code, caught.value.bids, caught.value.exit_code) == ("impossible_job", 0, 4)
        assert not await consumer.store.jobs()


@pytest.mark.parametrize(
    ("requirements", "why"),
    [
        (Requirements(max_price=10), " ACI under the cheapest of 1 providers, which may cost 0.000000000000032192 ACI"),
        (Requirements(min_provider_stake=8), "the largest of 1 is 0 ACI, 0.000000000000000008 ACI below"),
        (Requirements(quantisations=("q4_0",)), "no provider computes in q4_0: there is none"),
    ],
)
async def test_what_nobody_offers_fails_at_once(
    autojump_clock: MockClock, open_test_node: OpenTestNode, requirements: Requirements, why: str
) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor(), price=100) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        await consumer.find_providers(ROOT)
        before = trio.current_time()
        with pytest.raises(ImpossibleJob, match=re.escape(why)):
            await aci.inference(model=MODEL, prompt="count", requirements=requirements)
        assert trio.current_time() - before < 0.2


async def test_a_region_that_no_bid_names(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor()) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        with pytest.raises(NoBids, match="in region unknown, not eu-west") as caught:
            await aci.inference(model=MODEL, prompt="count", requirements=Requirements(regions=("eu-west",)))
        assert caught.value.bids == 1


def test_only_optimistic_verification_is_offered() -> None:
    assert Requirements().verification == "optimistic"
    with pytest.raises(LocalError, match="'immediate' is not how answers are verified"):
        Requirements(verification="immediate")


async def test_experience_outlives_the_node(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    executor = ScriptedExecutor()
    async with open_test_node("provider", executor=executor) as provider:
        async with open_test_node("consumer", provider.addresses[:1]) as consumer, ACI(consumer) as aci:
            await aci.inference(model=MODEL, prompt="count")
            executor.fail_at = 1
            with pytest.raises(ProviderFault):
                await aci.inference(model=MODEL, prompt="count")
            # An answer for next to nothing and a failure, which have begun to fade.
            now = virtual_clock()
            seen = consumer.reputation.standing(provider.node_id, ROOT, now)
            assert (seen.success_milli, seen.experience) == (679, 1_249)
        async with open_test_node("consumer", provider.addresses[:1]) as consumer:
            assert consumer.reputation.standing(provider.node_id, ROOT, now) == seen
        assert not len(provider.reputation)


async def test_every_bid_is_too_dear(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor(), price=1) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        # It asks for more than it has announced.
        assert provider.provider is not None
        (offering,) = provider.provider._book.offerings
        provider.provider._book.offer((replace(offering, output_token_price=100),), slots=2)
        with pytest.raises(NoBids, match="dearer than the maximum price by") as caught:
            await aci.inference(model=MODEL, prompt="count", requirements=Requirements(max_price=1_000))
        assert caught.value.bids == 1


async def test_every_bid_is_too_slow(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor()) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        with pytest.raises(NoBids, match="slower than the maximum latency by"):
            await aci.inference(model=MODEL, prompt="count", requirements=Requirements(max_latency_ms=1))


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": "gpt-17", "prompt": "count"}, UnknownModel, "unknown model 'gpt-17'"),
    ({"model": MODEL, "prompt": " "}, LocalError, "empty"),
    ({"model": MODEL, "prompt": "count", "max_tokens": 0}, LocalError, "max_tokens"),
    ({"model": MODEL, "prompt": "count", "temperature": float("nan")}, LocalError, "temperature is between 0 and 10"),
    ({"model": MODEL, "prompt": "x" * 600_000}, LocalError, "longer than"),
    ({"model": MODEL, "prompt": "count", "temperature": -1}, LocalError, "temperature"),
    ({"model": MODEL, "prompt": "count\ud800"}, LocalError, "surrogate"),
]


@pytest.mark.parametrize(("arguments", "error", "match"), BAD_CALLS)
async def test_bad_calls(
    autojump_clock: MockClock,
    open_test_node: OpenTestNode,
    arguments: dict[str, Any],
    error: type[Exception],
    match: str,
) -> None:
    async with (
        open_test_node("bootstrap") as bootstrap,
        open_test_node("consumer", bootstrap.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        with pytest.raises(error, match=match):
            await aci.inference(**arguments)


async def test_alone_fails_at_once(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    async with open_test_node("consumer") as consumer, ACI(consumer) as aci:
        with pytest.raises(NotConnected):
            await aci.inference(model=MODEL, prompt="count")


async def test_an_executor_error_does_not_harm_the_next_job(
    autojump_clock: MockClock, open_test_node: OpenTestNode
) -> None:
    executor = ScriptedExecutor(fail_at=1)
    async with (
        open_test_node("provider", executor=executor) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        with pytest.raises(ProviderFault):
            await aci.inference(model=MODEL, prompt="count")
        executor.fail_at = None
        assert (await aci.inference(model=MODEL, prompt="count")).text == "one two three four"
        assert isinstance(executor.error, ExecutorFailed)


async def test_a_stranger_cannot_use_up_a_bid(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    def award(bid: Envelope[Bid]) -> bytes:
        stranger = Sealer(KeyPair(bytes(range(32))), "aci-test")
        return stranger.seal(Award(bid.body.job_id, bid.digest, 0), virtual_clock()).data

    async with (
        open_test_node("provider", executor=ScriptedExecutor()) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        open_test_node("stranger", provider.addresses[:1]) as stranger,
        ACI(consumer) as aci,
    ):
        assert provider.provider is not None
        real = provider.provider._book.bid

        def robbed(offer: Envelope[Offer], now: int, **options: Any) -> Envelope[Bid] | None:  # noqa: ANN401
            bid = real(offer, now, **options)
            if bid is not None:
                nursery.start_soon(rob, award(bid))
            return bid

        async def rob(frame: bytes) -> None:
            with suppress(StreamClosed):
                async with stranger.network.open_stream(provider.node_id, JOB_PROTOCOL) as stream:
                    await stream.send(frame)
                    await stream.receive()

        provider.provider._book.bid = robbed  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            # Two bidders are waited for, so that the stranger comes first.
            request = Requirements(bid_window_ms=500)
            async with open_test_node("slow", provider.addresses[:1], executor=ScriptedExecutor(), slots=1):
                answer = await aci.inference(model=MODEL, prompt="count", requirements=request)
            assert answer.text == "one two three four"
            nursery.cancel_scope.cancel()


async def test_a_job_is_served_once_whatever_is_forgotten(
    autojump_clock: MockClock, open_test_node: OpenTestNode
) -> None:
    """Its record, and the promise to pay for it, would be replaced by those of a smaller job of the same name."""
    async with open_test_node("consumer") as consumer, ACI(consumer) as aci:
        async with open_test_node("provider", consumer.addresses[:1], executor=ScriptedExecutor()) as provider:
            answer = await aci.inference(model=MODEL, prompt="count")
            await trio.sleep(5)
            served, held = await provider.store.served(answer.receipt.body.job_id)
            offer = open_envelope(answer.proof.offer, Offer, network="aci-test", now=None)
        assert served is not None
        assert held is not None
        async with open_test_node("provider", consumer.addresses[:1], executor=ScriptedExecutor()) as again:
            assert again.node_id == provider.node_id
            sealer = consumer._sealer
            smaller = replace(offer.body, max_tokens=1, bid_deadline=virtual_clock() + 1_000)
            async with consumer.network.open_stream(again.node_id, JOB_PROTOCOL) as stream:
                await stream.send(sealer.seal(smaller, virtual_clock()).data)
                bid = open_envelope(await stream.receive(), Bid, network="aci-test", now=virtual_clock())
                await stream.send(sealer.seal(Award(smaller.job_id, bid.digest, 0), virtual_clock()).data)
                refusal = open_envelope(await stream.receive(), Abort, network="aci-test", now=virtual_clock())
            assert (refusal.body.abort, refusal.body.detail) == (AbortCode.PROTOCOL, "this job was served before")
            assert await again.store.served(smaller.job_id) == (served, held)
            assert again.provider is not None
            assert again.provider.statistics().running == 0
            # Another one finds its slot free.
            assert (await aci.inference(model=MODEL, prompt="count on")).text


@pytest.mark.parametrize("answer", ["nonsense", "another bid"])
async def test_a_quote_that_is_not_awarded_keeps_no_slot(
    autojump_clock: MockClock, open_test_node: OpenTestNode, answer: str
) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor(), slots=1) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        body = replace(make_offer(consumer._sealer, virtual_clock(), b"1").body, model_root=ROOT, max_tokens=1)
        offer = consumer._sealer.seal(body, virtual_clock())
        async with consumer.network.open_stream(provider.node_id, JOB_PROTOCOL) as stream:
            await stream.send(offer.data)
            await stream.receive()
            assert provider.provider is not None
            assert provider.provider._book.admission.reserved == 1
            award = consumer._sealer.seal(Award(offer.body.job_id, bytes(32), 0), virtual_clock()).data
            await stream.send(b"nonsense" if answer == "nonsense" else award)
            await trio.sleep(0.1)
            assert provider.provider._book.admission.reserved == 0
            assert len(provider.provider._book) == 0
        assert (await aci.inference(model=MODEL, prompt="count")).text


async def test_a_clock_that_jumps_does_not_end_a_provider(
    autojump_clock: MockClock, open_test_node: OpenTestNode
) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor()) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        assert provider.provider is not None
        provider.provider._book._latency_ms = 10**9
        with pytest.raises(NoBids):
            await aci.inference(model=MODEL, prompt="count")
        provider.provider._book._latency_ms = 10
        assert (await aci.inference(model=MODEL, prompt="count")).text == "one two three four"


async def test_the_peer_is_not_told_our_paths(autojump_clock: MockClock, open_test_node: OpenTestNode) -> None:
    for error in (ExecutorFailed("/home/me"), ModelUnavailable("/home/me"), LocalError("/home/me")):
        async with (
            open_test_node("provider", executor=ScriptedExecutor(fail_at=0, error=error)) as provider,
            open_test_node("consumer", provider.addresses[:1]) as consumer,
            ACI(consumer) as aci,
        ):
            with pytest.raises(AciError) as caught:
                await aci.inference(model=MODEL, prompt="count")
            assert "/home" not in str(caught.value)


async def test_a_prompt_of_more_tokens_than_the_price_covers_is_refused(
    autojump_clock: MockClock, open_test_node: OpenTestNode
) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor(input_tokens=1_000)) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        with pytest.raises(PromptRefused, match="the offer pays for 153"):
            await aci.inference(model=MODEL, prompt="count")


def running() -> list[RunningJob | ServedJob]:
    """The jobs in memory."""
    return [thing for thing in gc.get_objects() if isinstance(thing, RunningJob | ServedJob)]


async def test_jobs_leave_nothing_to_the_garbage_collector(
    autojump_clock: MockClock, open_test_node: OpenTestNode
) -> None:
    async with (
        open_test_node("provider", executor=ScriptedExecutor(), price=7) as provider,
        open_test_node("consumer", provider.addresses[:1]) as consumer,
        ACI(consumer) as aci,
    ):
        gc.collect()
        before = len(running())
        gc.disable()
        try:
            await aci.inference(model=MODEL, prompt="count", max_tokens=10)
            await trio.sleep(60)
            left = len(running())
        finally:
            gc.enable()
        assert left == before
