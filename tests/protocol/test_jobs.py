"""Both sides of a job against each other, and each side against whatever may come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.job import Cancel, Chosen, FrameArrived, Send, StreamEnded, TimerFired
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.protocol.messages import AbortCode, Award, Commit, Finish, Reveal
from aci_p2p.protocol.proof import verify_proof
from aci_p2p.protocol.provider import GenerationEnded, GenerationFailed, Produced
from aci_p2p.protocol.request import NoBids, PromptRefused, ProviderFault
from tests.protocol.driver import (
    CONSUMER,
    ENGINE,
    INPUT_TOKENS,
    NOW,
    PRICE,
    PROVIDER,
    REQUEST,
    RIVAL,
    STRANGER,
    TEXT,
    Bench,
    ConsumerBench,
    Market,
    Model,
    ProviderBench,
    Seller,
    abort,
    of,
)

DEARER = {"output_token_price": 6 * 10**12}
DEAREST = {"output_token_price": 7 * 10**12}


def test_the_cheapest_provider_answers() -> None:
    market = Market([Seller(RIVAL, terms=DEARER), Seller(PROVIDER), Seller(STRANGER, terms=DEAREST)]).run()
    (provider,) = market.providers
    assert market.answer == TEXT
    assert (market.consumer.last.state, provider.last.state) == (State.PENDING, State.PENDING)
    ours, theirs = market.consumer.last, provider.last
    assert (ours.price, ours.receipt, ours.job_id) == (theirs.price, theirs.receipt, theirs.job_id)
    assert ours.price == PRICE
    assert (ours.peer, theirs.peer) == (PROVIDER.node_id, CONSUMER.node_id)
    verified = verify_proof(ours.proof)
    assert verified.proof.data == theirs.proof
    assert len(market.consumer.job.receipt.body.bids) == 3
    assert [record.state for record in market.consumer.records] == [
        State.OFFERED, State.AWARDED, State.ACCEPTED, State.STREAMING, State.COMMITTED, State.REVEALED,
        State.RECEIPTED, State.PENDING,
    ]  # fmt: skip


def test_the_next_bids_take_over_until_one_serves() -> None:
    busy = Model(parts=(), failure=GenerationFailed(AbortCode.BUSY, "busy"))
    market = Market(
        [
            Seller(PROVIDER, unreachable=True),
            Seller(RIVAL, terms=DEARER, dead=True),
            Seller(STRANGER, terms=DEAREST),
            Seller(KeyPair(bytes([40]) * 32), busy, {"output_token_price": 8 * 10**12}),
        ]
    ).run()
    assert market.answer == TEXT
    assert market.consumer.last.peer == STRANGER.node_id
    assert [chosen.provider for chosen in of(market.consumer.effects, Chosen)] == [
        PROVIDER.node_id, RIVAL.node_id, STRANGER.node_id,
    ]  # fmt: skip
    # The window, and the five seconds that the dead one had.
    assert market.now == NOW + 2_000 + 5_000


def test_nobody_serves() -> None:
    market = Market([Seller(PROVIDER, unreachable=True), Seller(RIVAL, terms=DEARER, dead=True)]).run()
    assert isinstance(market.consumer.error, NoBids)
    assert market.consumer.error.bids == 2
    assert "did not answer the award" in market.consumer.error.message


def test_nobody_bids() -> None:
    market = Market([]).run()
    assert market.now == NOW + 2_000
    assert isinstance(market.consumer.error, NoBids)


def test_the_model_dies_half_way() -> None:
    model = Model(parts=(((1,), "a"),), failure=GenerationFailed(AbortCode.EXECUTOR_FAILED, "killed"))
    market = Market([Seller(PROVIDER, model)]).run()
    (provider,) = market.providers
    error = market.consumer.error
    assert isinstance(error, ProviderFault)
    assert (error.tokens, market.answer) == (1, "a")
    for record in (market.consumer.last, provider.last):
        assert (record.state, record.blame, record.detail) == (State.PROVIDER_FAULT, Party.PROVIDER, "killed")


def test_the_prompt_is_too_long() -> None:
    model = Model(parts=(), failure=GenerationFailed(AbortCode.PROMPT_TOO_LONG, "2049 tokens exceed 2048"))
    market = Market([Seller(PROVIDER, model)]).run()
    (provider,) = market.providers
    assert isinstance(market.consumer.error, PromptRefused)
    assert market.consumer.error.message == "2049 tokens exceed 2048"
    for record in (market.consumer.last, provider.last):
        assert (record.state, record.blame) == (State.CANCELLED, Party.NOBODY)


def test_the_model_hangs() -> None:
    """Both sides wait a minute. Whoever gives up first says so, and neither blames the consumer."""
    market = Market([Seller(PROVIDER, Model(mute=True))]).run()
    (provider,) = market.providers
    assert market.now == NOW + 2_000 + 60_000
    assert isinstance(market.consumer.error, ProviderFault)
    assert market.consumer.error.tokens == 3
    assert market.consumer.last.blame is Party.PROVIDER
    assert provider.last.blame is not Party.CONSUMER


def test_a_model_that_produces_too_much_is_caught() -> None:
    market = Market([Seller(PROVIDER, Model(parts=(((1,) * 9, "x"),)))]).run()
    assert "too many tokens" in market.consumer.last.detail
    assert market.consumer.last.blame is Party.PROVIDER


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_a_model_may_stop_early_or_at_the_limit(max_tokens: int) -> None:
    model = Model(parts=(((7,), "a"),))
    market = Market([Seller(PROVIDER, model)], replace(REQUEST, max_tokens=max_tokens)).run()
    assert (market.consumer.job.state, market.answer) == (State.PENDING, "a")


# Whatever may come, in any order. The benches check each step.


def seen_before(bench: Bench) -> FrameArrived | TimerFired:
    """Our own last frame comes back."""
    frames = of(bench.effects, Send)
    return FrameArrived(frames[-1].data) if frames else TimerFired()


def consumer_moves(bench: ConsumerBench, data: st.DataObject) -> dict[str, Callable[[], object]]:
    """What may happen to a consumer next: mostly what should, sometimes what should not."""
    job = bench.job
    number = data.draw(st.integers(0, 3))
    moves: dict[str, Callable[[], object]] = {
        "time out": lambda: bench.time_out() if bench.timer else None,
        "end of stream": lambda: bench.feed(StreamEnded("gone")),
        "garbage": lambda: bench.feed(FrameArrived(data.draw(st.binary(max_size=40)))),
        "echo": lambda: bench.feed(seen_before(bench)),
        "abort": lambda: bench.receive(abort(job, data.draw(st.sampled_from(AbortCode)))),
        "part": lambda: bench.part(number, (number,) * number, "x" * number),
        "commit": lambda: bench.receive(Commit(job.job_id, bench.commitment())),
        "reveal": lambda: bench.receive(Reveal(job.job_id, bytes(32), bytes([number]))),
        "award": lambda: bench.receive(Award(job.job_id, bytes(32), 0)),
        "cancel": lambda: bench.feed(Cancel()),
        "start": bench.start,
    }
    if State.OFFERED in [record.state for record in bench.records]:
        moves["bid"] = lambda: bench.bid(KeyPair(bytes([60 + number]) * 32), output_token_price=10**number)
    honest: dict[State, Callable[[], object]] = {
        State.DRAFT: bench.start,
        State.OFFERED: bench.award,
        State.AWARDED: bench.accept,
        State.STREAMING: bench.answer,
        State.COMMITTED: bench.reveal,
    }
    if job.state in honest:
        moves["honest"] = honest[job.state]
    return moves


@settings(max_examples=100)
@given(data=st.data())
def test_any_events_at_a_consumer(data: st.DataObject) -> None:
    bench = ConsumerBench()
    for _ in range(data.draw(st.integers(1, 14))):
        moves = consumer_moves(bench, data)
        step = data.draw(st.sampled_from(["honest", "honest", *moves]).filter(lambda name: name in moves))  # noqa: B023
        moves[step]()
        bench.peer = data.draw(st.sampled_from([bench.peer, bench.peer, ConsumerBench().peer]))
        bench.now += data.draw(st.sampled_from([0, 0, 1, 10_000]))
    bench.feed(Cancel())
    assert bench.job.over


@settings(max_examples=100)
@given(data=st.data())
def test_any_events_at_a_provider(data: st.DataObject) -> None:
    bench = ProviderBench()
    job = bench.job
    for _ in range(data.draw(st.integers(1, 14))):
        number = data.draw(st.integers(0, 3))
        moves: dict[str, Callable[[], object]] = {
            "time out": lambda: bench.time_out() if bench.timer else None,
            "end of stream": lambda: bench.feed(StreamEnded("gone")),
            "garbage": lambda: bench.feed(FrameArrived(data.draw(st.binary(max_size=40)))),
            "echo": lambda: bench.feed(seen_before(bench)),
            "abort": lambda: bench.receive(abort(job, data.draw(st.sampled_from(AbortCode)))),
            "award": bench.award,
            "input": bench.input,
            "voucher": lambda: bench.voucher(number),  # noqa: B023
            "produced": lambda: bench.feed(Produced((number,) * number, "é" * number, INPUT_TOKENS)),  # noqa: B023
            "ended": lambda: bench.feed(GenerationEnded(Finish.STOP, number, ENGINE)),  # noqa: B023
            "failed": lambda: bench.feed(GenerationFailed(data.draw(st.sampled_from(AbortCode)), "why")),
            "cancel": lambda: bench.feed(Cancel()),
        }
        honest: dict[State, Callable[[], object]] = {
            State.OFFERED: bench.award,
            State.ACCEPTED: bench.input,
            State.STREAMING: bench.generate,
        }
        if job.state in honest:
            moves["honest"] = honest[job.state]
        step = data.draw(st.sampled_from(["honest", "honest", *moves]).filter(lambda name: name in moves))  # noqa: B023
        moves[step]()
        bench.now += data.draw(st.sampled_from([0, 0, 1, 10_000]))
    bench.feed(Cancel())
    assert bench.job.over
