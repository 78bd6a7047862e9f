"""The consumer's side of a job when a provider declines or fails, or its user gives up."""

from __future__ import annotations

from typing import Any

import pytest

from aci_p2p.protocol.commitments import (
    output_commitment,
    output_root,
    text_digest,
    tokens_digest,
)
from aci_p2p.protocol.consumer import (
    BidArrived,
    JobCancelled,
    PromptRefused,
    Start,
)
from aci_p2p.protocol.envelope import Sealer
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.job import (
    Cancel,
    Chosen,
    CloseStream,
    Failed,
    FrameArrived,
    OpenStream,
    Persist,
    Send,
    SetTimer,
    StreamEnded,
    TimerFired,
)
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.protocol.messages import (
    Abort,
    AbortCode,
    Commit,
    Kind,
)
from tests.protocol.consuming import (
    ON_STREAM,
    RESTING,
    assert_declined,
    assert_fault,
    assert_over,
    kinds,
)
from tests.protocol.driver import (
    INPUT_TOKENS,
    NETWORK,
    PARTS,
    PROVIDER,
    PROVIDER_SECRETS,
    RIVAL,
    TEXT,
    TOKENS,
    ConsumerBench,
    abort,
    make_bid,
    make_offer,
    of,
    one,
    opened,
    sent,
)


@pytest.fixture
def bench() -> ConsumerBench:
    return ConsumerBench()


@pytest.mark.parametrize("code", AbortCode)
def test_an_award_declined_for_any_reason_goes_to_the_next(bench: ConsumerBench, code: AbortCode) -> None:
    bench.reach(State.AWARDED)
    effects = bench.receive(abort(bench.job, code, "so \x1b[31msorry"))
    assert kinds(effects) == [Persist, SetTimer, CloseStream, Chosen, Persist, SetTimer, OpenStream, Send]
    assert_declined(bench, effects, "so  [31msorry")


def test_an_abort_without_detail_is_named_by_its_code(bench: ConsumerBench) -> None:
    bench.reach(State.STREAMING)
    bench.receive(abort(bench.job, AbortCode.MODEL_UNAVAILABLE, "\u202e\n"))
    assert_fault(bench, "model unavailable", tokens=0)


def test_the_rival_serves_after_a_decline(bench: ConsumerBench) -> None:
    bench.reach(State.AWARDED)
    bench.receive(abort(bench.job, AbortCode.BUSY))
    bench.peer, bench.chosen = Sealer(RIVAL, NETWORK), bench.other
    bench.accept()
    for index, (tokens, text) in zip((0, 2, 3), PARTS, strict=True):
        bench.part(index, tokens, text)
    root = output_root(tokens_digest(bench.job.job_id, TOKENS), text_digest(bench.job.job_id, TEXT))
    salt = PROVIDER_SECRETS.salt
    bench.receive(Commit(bench.job.job_id, output_commitment(bench.job.job_id, RIVAL.node_id, root, salt)))
    bench.reveal(key=RIVAL)
    assert bench.last.state is State.PENDING
    assert bench.last.peer == bench.job.receipt.body.provider == RIVAL.node_id
    assert bench.last.price == 3 * 10**12 * INPUT_TOKENS + 6 * 10**12 * len(TOKENS)


def test_an_award_that_is_not_answered_times_out(bench: ConsumerBench) -> None:
    bench.reach(State.AWARDED)
    at = bench.now
    effects = bench.time_out()
    assert bench.now == at + 5_000
    assert kinds(effects) == [Persist, SetTimer, Send, CloseStream, Chosen, Persist, SetTimer, OpenStream, Send]
    assert sent(effects) == [Kind.ABORT, Kind.AWARD]
    assert opened(of(effects, Send)[0].data, Abort, bench.now).abort is AbortCode.TIMEOUT
    assert_declined(bench, effects, "it did not answer the award in time")


def test_a_stream_that_does_not_open_is_a_decline(bench: ConsumerBench) -> None:
    bench.reach(State.AWARDED)
    effects = bench.feed(StreamEnded("no route"))
    assert kinds(effects) == [Persist, SetTimer, CloseStream, Chosen, Persist, SetTimer, OpenStream, Send]
    assert_declined(bench, effects, "no route")


@pytest.mark.parametrize(("state", "limit", "tokens"), [(State.STREAMING, 60_000, 0), (State.COMMITTED, 10_000, 3)])
def test_a_silent_provider_is_at_fault(bench: ConsumerBench, state: State, limit: int, tokens: int) -> None:
    bench.reach(state)
    at = bench.now
    effects = bench.time_out()
    assert bench.now == at + limit
    assert kinds(effects) == [Persist, Send, CloseStream, Failed]
    farewell = opened(one(effects, Send).data, Abort, bench.now)
    assert farewell == Abort(bench.job.job_id, AbortCode.TIMEOUT, "the provider did not act in time")
    assert_fault(bench, "it went silent", tokens)


@pytest.mark.parametrize(("state", "tokens"), [(State.STREAMING, 0), (State.COMMITTED, 3)])
def test_a_provider_that_vanishes_is_at_fault(bench: ConsumerBench, state: State, tokens: int) -> None:
    bench.reach(state)
    assert kinds(bench.feed(StreamEnded("reset by peer"))) == [Persist, CloseStream, Failed]
    assert_fault(bench, "reset by peer", tokens)


@pytest.mark.parametrize("code", AbortCode)
@pytest.mark.parametrize(("state", "tokens"), [(State.STREAMING, 1), (State.COMMITTED, 3)])
def test_an_abort_later_is_a_fault(bench: ConsumerBench, state: State, tokens: int, code: AbortCode) -> None:
    bench.reach(state)
    if state is State.STREAMING:
        bench.part(0, (1,), "a")
    assert kinds(bench.receive(abort(bench.job, code, "why not"))) == [Persist, CloseStream, Failed]
    assert_fault(bench, "why not", tokens)


@pytest.mark.parametrize("code", AbortCode)
def test_an_abort_before_the_first_token(bench: ConsumerBench, code: AbortCode) -> None:
    bench.reach(State.STREAMING)
    effects = bench.receive(abort(bench.job, code, "why not"))
    assert kinds(effects) == [Persist, CloseStream, Failed]
    if code not in (AbortCode.PROMPT_TOO_LONG, AbortCode.INVALID_PROMPT):
        assert_fault(bench, "why not", tokens=0)
        return
    # The prompt is at fault, so nobody is.
    assert (bench.last.state, bench.last.blame, bench.last.detail) == (State.CANCELLED, Party.NOBODY, "why not")
    assert bench.last.peer == PROVIDER.node_id
    error = bench.error
    assert isinstance(error, PromptRefused)
    assert isinstance(error, LocalError)
    assert (error.code, error.message) == ("prompt_refused", "why not")
    assert error.hint
    assert_over(bench)


@pytest.mark.parametrize("code", [AbortCode.PROMPT_TOO_LONG, AbortCode.INVALID_PROMPT])
def test_a_prompt_that_was_answered_is_not_at_fault(bench: ConsumerBench, code: AbortCode) -> None:
    bench.reach(State.STREAMING)
    bench.receive(Commit(bench.job.job_id, bytes(32)))
    bench.receive(abort(bench.job, code, "on second thoughts"))
    assert_fault(bench, "on second thoughts", tokens=0)


@pytest.mark.parametrize("state", RESTING)
def test_cancel(bench: ConsumerBench, state: State) -> None:
    bench.reach(state)
    effects = bench.feed(Cancel())
    assert kinds(effects) == [Persist, *([Send] if state in ON_STREAM else []), CloseStream, Failed]
    if state in ON_STREAM:
        farewell = opened(one(effects, Send).data, Abort, bench.now)
        assert farewell == Abort(bench.job.job_id, AbortCode.CANCELLED, "the consumer cancelled")
    assert (bench.last.state, bench.last.blame, bench.last.detail) == (State.CANCELLED, Party.NOBODY, "cancelled")
    assert bench.last.peer == (PROVIDER.node_id if state in ON_STREAM else None)
    error = bench.error
    assert isinstance(error, JobCancelled)
    assert isinstance(error, LocalError)
    assert (error.code, error.message) == ("cancelled", "the job was cancelled")
    assert_over(bench)


@pytest.mark.parametrize(
    ("state", "events"),
    [
        (State.DRAFT, (FrameArrived(b""), StreamEnded(""), TimerFired())),
        (State.OFFERED, (Start(), FrameArrived(b""), StreamEnded(""))),
        (State.AWARDED, (Start(),)),
        (State.STREAMING, (Start(),)),
        (State.COMMITTED, (Start(),)),
    ],
)
def test_events_out_of_place_have_no_effect(bench: ConsumerBench, state: State, events: tuple[Any, ...]) -> None:
    bench.reach(state)
    for event in events:
        assert bench.feed(event) == []
    if state is State.DRAFT:
        bid = make_bid(make_offer())
        assert bench.feed(BidArrived(bid)) == []
