"""The provider's side of a job: every state, every message, every way to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aci_p2p.protocol.commitments import (
    derive_seed,
    input_bytes,
    input_commitment,
    output_commitment,
    output_root,
    text_digest,
    tokens_digest,
)
from aci_p2p.protocol.consumer import ConsumerJob, Start
from aci_p2p.protocol.envelope import Sealer, open_envelope
from aci_p2p.protocol.errors import RemoteError, ResourceError
from aci_p2p.protocol.job import (
    Cancel,
    CloseStream,
    Failed,
    Finished,
    FrameArrived,
    HoldGeneration,
    PaymentState,
    Persist,
    ResumeGeneration,
    Send,
    SetTimer,
    StartGeneration,
    StopGeneration,
    StreamEnded,
    TimerFired,
)
from aci_p2p.protocol.leg import VOUCHER_TOKENS
from aci_p2p.protocol.lifecycle import LIMITS, Party, State
from aci_p2p.protocol.messages import (
    SEAL_BYTES,
    Abort,
    AbortCode,
    Accept,
    Award,
    Commit,
    Conversation,
    Finish,
    Input,
    Kind,
    Proof,
    Reveal,
    Tokens,
    Turn,
    Voucher,
)
from aci_p2p.protocol.pricing import max_input_tokens
from aci_p2p.protocol.provider import (
    ConsumerFault,
    GenerationEnded,
    GenerationFailed,
    JobAborted,
    Produced,
    ProviderJob,
)
from aci_p2p.protocol.sealing import OpeningKey
from aci_p2p.protocol.selection import ExpectedCost
from aci_p2p.protocol.terms import Price
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason, Validation
from tests.protocol.driver import (
    CONSUMER,
    CONVERSATION,
    ENGINE,
    INPUT_TOKENS,
    NETWORK,
    OPENING,
    OPENING_KEY,
    PARTS,
    PRICE,
    PROVIDER,
    PROVIDER_SECRETS,
    REQUEST,
    RIVAL,
    SECRETS,
    STRANGER,
    TEXT,
    TOKENS,
    ProviderBench,
    abort,
    make_bid,
    make_offer,
    make_proof,
    of,
    one,
    opened,
    sent,
)

RESTING = (State.OFFERED, State.ACCEPTED, State.STREAMING)
AWARDED = RESTING[1:]


@pytest.fixture
def bench() -> ProviderBench:
    return ProviderBench()


def kinds(effects: list[Any]) -> list[type[Any]]:
    return [type(effect) for effect in effects]


def assert_over(bench: ProviderBench) -> None:
    """Nothing that may still come has any effect."""
    assert bench.job.over
    for event in (
        FrameArrived(b""),
        FrameArrived(bench.peer.seal(Award(bench.job.job_id, bench.bid.digest, 0), bench.now).data),
        FrameArrived(bench.peer.seal(abort(bench.job, AbortCode.BUSY), bench.now).data),
        Produced((1,), "a", INPUT_TOKENS),
        GenerationEnded(Finish.STOP, 1, ENGINE),
        GenerationFailed(AbortCode.EXECUTOR_FAILED, ""),
        StreamEnded(""),
        TimerFired(),
        Cancel(),
    ):
        assert bench.feed(event) == []


def assert_consumer_fault(bench: ProviderBench, detail: str) -> None:
    assert bench.job.state is State.CONSUMER_FAULT
    record = bench.last
    assert (record.state, record.blame, record.peer) == (State.CONSUMER_FAULT, Party.CONSUMER, CONSUMER.node_id)
    assert detail in record.detail
    error = bench.error
    assert isinstance(error, ConsumerFault)
    assert isinstance(error, RemoteError)
    assert (error.code, error.consumer) == ("consumer_fault", CONSUMER.node_id)
    assert error.message == f"consumer {CONSUMER.node_id.short} failed: {record.detail}"
    assert_over(bench)


def assert_aborted(bench: ProviderBench, state: State, blame: Party, detail: str) -> None:
    assert bench.job.state is state
    assert (bench.last.state, bench.last.blame, bench.last.detail) == (state, blame, detail)
    assert bench.last.peer == CONSUMER.node_id
    error = bench.error
    assert isinstance(error, JobAborted)
    assert isinstance(error, ResourceError)
    assert (error.code, error.message) == ("job_aborted", detail)
    assert_over(bench)


def assert_left(bench: ProviderBench) -> None:
    """Nothing was awarded: nothing is stored and nobody is blamed."""
    assert bench.records == []
    assert bench.job.state is State.CANCELLED
    assert_over(bench)


# The honest way.


def test_it_waits_for_its_award(bench: ProviderBench) -> None:
    assert bench.job.state is State.OFFERED
    assert bench.job.job_id == bench.offer.body.job_id
    assert not bench.job.over


def test_award_is_accepted(bench: ProviderBench) -> None:
    effects = bench.award()
    assert kinds(effects) == [Persist, SetTimer, Persist, SetTimer, Send]
    assert [record.state for record in bench.records] == [State.AWARDED, State.ACCEPTED]
    assert effects[-2] == SetTimer(bench.now + LIMITS[State.ACCEPTED].timeout_ms)
    assert (bench.last.peer, bench.last.blame, bench.last.price) == (CONSUMER.node_id, Party.NOBODY, 0)
    accept = opened(one(effects, Send).data, Accept)
    assert (accept.job_id, accept.provider_nonce) == (bench.job.job_id, PROVIDER_SECRETS.nonce)


def test_accept_names_its_award(bench: ProviderBench) -> None:
    award = bench.peer.seal(Award(bench.job.job_id, bench.bid.digest, 0), bench.now)
    effects = bench.feed(FrameArrived(award.data))
    assert opened(one(effects, Send).data, Accept).award_digest == award.digest


def test_prompt_starts_the_model(bench: ProviderBench) -> None:
    bench.reach(State.ACCEPTED)
    effects = bench.input()
    seed = derive_seed(SECRETS.nonce, PROVIDER_SECRETS.nonce, bench.job.job_id)
    assert effects == [
        Persist(bench.last),
        SetTimer(bench.now + LIMITS[State.STREAMING].timeout_ms),
        StartGeneration(
            CONVERSATION, max_input_tokens(bench.offer.body), REQUEST.max_tokens, REQUEST.temperature_milli, seed, ()
        ),
    ]
    assert bench.last.state is State.STREAMING


def test_parts_are_streamed_and_renew_the_timer(bench: ProviderBench) -> None:
    bench.reach(State.STREAMING)
    index = 0
    for tokens, text in PARTS:
        bench.now += 59_000
        effects = bench.feed(Produced(tokens, text, INPUT_TOKENS))
        assert kinds(effects) == [SetTimer, Send]
        assert effects[0] == SetTimer(bench.now + 60_000)
        part = Tokens(bench.job.job_id, index, tokens, text, INPUT_TOKENS)
        assert opened(one(effects, Send).data, Tokens, bench.now) == part
        index += len(tokens)


def test_a_part_with_nothing_in_it_is_not_sent(bench: ProviderBench) -> None:
    bench.reach(State.STREAMING)
    assert bench.feed(Produced((), "", INPUT_TOKENS)) == []
    for part in (Produced((1,), "", INPUT_TOKENS), Produced((), "a", INPUT_TOKENS)):
        assert sent(bench.feed(part)) == [Kind.TOKENS]


def test_the_end_is_committed_and_revealed(bench: ProviderBench) -> None:
    bench.reach(State.STREAMING)
    effects = bench.generate()
    assert kinds(effects) == [Persist, SetTimer, Send, Persist, Send, CloseStream, Finished]
    assert sent(effects) == [Kind.COMMIT, Kind.REVEAL]
    job_id = bench.job.job_id
    commit, reveal = (effect.data for effect in of(effects, Send))
    root = output_root(tokens_digest(job_id, TOKENS), text_digest(job_id, TEXT))
    commitment = output_commitment(job_id, PROVIDER.node_id, root, PROVIDER_SECRETS.salt)
    assert opened(commit, Commit) == Commit(job_id, commitment)
    revealed = opened(reveal, Reveal)
    assert (revealed.job_id, revealed.salt) == (job_id, PROVIDER_SECRETS.salt)
    proof = open_envelope(revealed.proof, Proof, network=NETWORK, now=bench.now)
    assert proof.sender == PROVIDER.node_id
    assert proof.body == make_proof(bench.offer, bench.bid)
    committed, last = bench.records[-2:]
    assert (committed.state, last.state) == (State.COMMITTED, State.REVEALED)
    assert last == replace(committed, state=State.REVEALED)
    assert (last.price, last.proof, last.receipt) == (PRICE, revealed.proof, b"")


def test_an_answer_may_be_empty(bench: ProviderBench) -> None:
    bench.reach(State.STREAMING)
    effects = bench.feed(GenerationEnded(Finish.LENGTH, 7, ENGINE))
    reveal = opened(of(effects, Send)[1].data, Reveal)
    proof = open_envelope(reveal.proof, Proof, network=NETWORK, now=None).body
    assert (proof.input_tokens, proof.output_tokens, proof.finish) == (7, 0, Finish.LENGTH)
    assert bench.last.price == 7 * 3 * 10**12 * 5 // 4


# Being paid.


def many(bench: ProviderBench, count: int) -> list[Any]:
    """The model produces so many tokens, one at a time."""
    return [effect for number in range(count) for effect in bench.feed(Produced((number,), "a", INPUT_TOKENS))]


def test_it_stops_when_as_much_as_it_risks_is_unpaid(bench: ProviderBench) -> None:
    bench.reach(State.STREAMING)
    effects = many(bench, VOUCHER_TOKENS)
    assert sent(effects) == [Kind.TOKENS] * VOUCHER_TOKENS
    assert kinds(many(bench, 1)) == [Persist, SetTimer, HoldGeneration]
    assert (bench.job.state, bench.last.state) == (State.UNPAID, State.UNPAID)
    # What the model still had under way waits.
    assert many(bench, 2) == []
    effects = bench.voucher(VOUCHER_TOKENS)
    assert kinds(effects) == [Persist, SetTimer, ResumeGeneration, *[SetTimer, Send] * 3]
    assert [opened(effect.data, Tokens, bench.now).index for effect in of(effects, Send)] == [32, 33, 34]
    assert bench.job.state is State.STREAMING


def test_a_voucher_is_stored(bench: ProviderBench) -> None:
    bench.reach(State.STREAMING)
    many(bench, 3)
    assert kinds(bench.voucher(2)) == [Persist, SetTimer]
    held = bench.payments[CONSUMER.node_id]
    assert (held.amount, held.state) == (bench.share(2).price, PaymentState.SETTLED)
    assert opened(held.statement, Voucher, bench.now).share == bench.share(2)
    assert bench.last.price == bench.job.paid == bench.share(2).price


@pytest.mark.parametrize(
    ("tokens", "changes"),
    [
        (2, {}),
        (1, {}),
        (4, {}),
        (3, {"provider": STRANGER.node_id}),
        (3, {"bid_digest": bytes(32)}),
        (3, {"input_tokens": INPUT_TOKENS - 1}),
        (3, {"first_token": 1}),
        (3, {"charges": Price(1, 0, 0, 0)}),
    ],
    ids=["the same", "less", "more than was sent", "for another", "another bid", "prompt", "start", "price"],
)
def test_a_voucher_for_something_else(bench: ProviderBench, tokens: int, changes: dict[str, Any]) -> None:
    bench.reach(State.STREAMING)
    many(bench, 3)
    bench.voucher(2)
    bench.voucher(tokens, **changes)
    assert_consumer_fault(bench, "bad voucher")
    assert bench.payments[CONSUMER.node_id].amount == bench.share(2).price


def test_a_consumer_that_does_not_pay_is_at_fault(bench: ProviderBench) -> None:
    bench.reach(State.STREAMING)
    many(bench, VOUCHER_TOKENS + 1)
    at = bench.now
    bench.time_out()
    assert bench.now == at + LIMITS[State.UNPAID].timeout_ms
    assert_consumer_fault(bench, "it went silent")


def test_an_answer_that_ended_unpaid_is_proved_once_it_is_paid(bench: ProviderBench) -> None:
    bench.reach(State.STREAMING)
    many(bench, VOUCHER_TOKENS + 1)
    assert bench.feed(GenerationEnded(Finish.STOP, INPUT_TOKENS, ENGINE)) == []
    assert sent(bench.voucher(16)) == [Kind.TOKENS, Kind.COMMIT, Kind.REVEAL]
    assert bench.job.state is State.REVEALED


def test_it_goes_on_behind_the_tokens_of_others(bench: ProviderBench) -> None:
    bench.award(accepted_tokens=2)
    effects = bench.input(accepted=(5, 6))
    assert one(effects, StartGeneration).accepted == (5, 6)
    part = opened(one(bench.feed(Produced((7,), "c", INPUT_TOKENS)), Send).data, Tokens)
    assert part.index == 2
    effects = bench.feed(GenerationEnded(Finish.STOP, INPUT_TOKENS, ENGINE))
    reveal = opened(of(effects, Send)[-1].data, Reveal)
    proof = open_envelope(reveal.proof, Proof, network=NETWORK, now=None).body
    job_id = bench.job.job_id
    assert (proof.first_token, proof.output_tokens) == (2, 3)
    assert proof.tokens_hash == tokens_digest(job_id, (5, 6, 7))
    assert proof.text_hash == text_digest(job_id, "c")
    # It has read what others wrote, and is paid for reading it.
    assert bench.last.price == (3 * 10**12 * (INPUT_TOKENS + 2) + 5 * 10**12) * 5 // 4


@pytest.mark.parametrize(("accepted_tokens", "accepted"), [(0, (1,)), (1, ()), (2, (1,))])
def test_other_tokens_than_the_award_says(
    bench: ProviderBench, accepted_tokens: int, accepted: tuple[int, ...]
) -> None:
    bench.award(accepted_tokens=accepted_tokens)
    bench.input(accepted=accepted)
    assert_consumer_fault(bench, "bad commitment")


def test_an_award_with_more_tokens_than_may_be(bench: ProviderBench) -> None:
    bench.award(accepted_tokens=REQUEST.max_tokens + 1)
    assert_left(bench)


# The consumer's faults.


def test_an_award_of_another_bid(bench: ProviderBench) -> None:
    effects = bench.award(bid_digest=bytes(32))
    assert kinds(effects) == [Send, CloseStream, Failed]
    error = bench.error
    assert isinstance(error, MessageRefused)
    assert error.validation == Validation(Decision.REJECT, Reason.WRONG_JOB)
    assert opened(one(effects, Send).data, Abort).abort is AbortCode.PROTOCOL
    assert_left(bench)


@pytest.mark.parametrize(("lifetime_ms", "accepted"), [(1_000, False), (1_001, True)])
def test_a_bid_is_firm_until_it_expires(lifetime_ms: int, accepted: bool) -> None:  # noqa: FBT001 - parametrised
    bench = ProviderBench(bid_lifetime_ms=lifetime_ms)
    bench.now += 1_000
    bench.award()
    assert (bench.job.state is State.ACCEPTED) == accepted
    if not accepted:
        error = bench.error
        assert isinstance(error, MessageRefused)
        assert error.validation == Validation(Decision.IGNORE, Reason.EXPIRED)
        assert_left(bench)


OTHER_SIZE = Conversation((*CONVERSATION.turns, Turn("user", "")))


@pytest.mark.parametrize(
    "changes",
    [
        {"conversation": Conversation((Turn("system", "Be brief."), Turn("user", "Où est la gare !")))},
        {"conversation": Conversation(CONVERSATION.turns[::-1])},
        {"salt": bytes(32)},
        {"consumer_nonce": bytes(32)},
    ],
)
def test_a_prompt_that_does_not_open_the_offer(bench: ProviderBench, changes: dict[str, Any]) -> None:
    bench.reach(State.ACCEPTED)
    effects = bench.input(**changes)
    assert kinds(effects) == [Persist, StopGeneration, Send, CloseStream, Failed]
    assert_consumer_fault(bench, "bad commitment")


@pytest.mark.parametrize(
    ("key", "binding"),
    [
        (OpeningKey(bytes(32)).public, {}),
        (OPENING_KEY.public, {"network": "aci-main"}),
        (OPENING_KEY.public, {"job_id": bytes(32)}),
        (OPENING_KEY.public, {"consumer": RIVAL.node_id}),
        (OPENING_KEY.public, {"provider": RIVAL.node_id}),
        (OPENING_KEY.public, {"award_digest": bytes(32)}),
    ],
)
def test_a_prompt_sealed_for_another(bench: ProviderBench, key: bytes, binding: dict[str, Any]) -> None:
    bench.reach(State.ACCEPTED)
    effects = bench.input(key=key, binding=binding)
    assert kinds(effects) == [Persist, StopGeneration, Send, CloseStream, Failed]
    assert_consumer_fault(bench, "bad seal")


def test_the_prompt_as_it_came(bench: ProviderBench) -> None:
    assert bench.reach(State.STREAMING).job.opening == OPENING


@pytest.mark.parametrize("field", ["input_bytes", "input_turns"])
def test_a_prompt_of_another_size_than_offered(field: str) -> None:
    """An offer that commits to its prompt, but declares a smaller one for the price."""
    honest = make_offer()
    lie = {field: getattr(honest.body, field) - 1}
    offer = Sealer(CONSUMER, NETWORK).seal(replace(honest.body, **lie), honest.header.issued_at)
    bench = ProviderBench()
    bench.offer, bench.bid = offer, make_bid(offer)
    bench.job = ProviderJob(Sealer(PROVIDER, NETWORK), offer, bench.bid, PROVIDER_SECRETS)
    bench.reach(State.ACCEPTED)
    bench.input()
    assert_consumer_fault(bench, "bad commitment")


@pytest.mark.parametrize(("state", "limit"), [(State.ACCEPTED, 5_000)])
def test_a_silent_consumer_is_at_fault(bench: ProviderBench, state: State, limit: int) -> None:
    bench.reach(state)
    at = bench.now
    effects = bench.time_out()
    assert bench.now == at + limit
    assert kinds(effects) == [Persist, StopGeneration, Send, CloseStream, Failed]
    farewell = opened(one(effects, Send).data, Abort, bench.now)
    assert farewell == Abort(bench.job.job_id, AbortCode.TIMEOUT, "the consumer did not act in time")
    assert_consumer_fault(bench, "it went silent")


@pytest.mark.parametrize("state", AWARDED)
def test_a_consumer_that_vanishes_is_at_fault(bench: ProviderBench, state: State) -> None:
    bench.reach(state)
    effects = bench.feed(StreamEnded("reset by peer"))
    assert kinds(effects) == [Persist, StopGeneration, CloseStream, Failed]
    assert_consumer_fault(bench, "reset by peer")


def test_a_stream_that_ends_before_the_award(bench: ProviderBench) -> None:
    assert kinds(bench.feed(StreamEnded("reset by peer"))) == [CloseStream, Failed]
    assert isinstance(bench.error, ConsumerFault)
    assert "reset by peer" in bench.error.message
    assert_left(bench)


@pytest.mark.parametrize("code", AbortCode)
@pytest.mark.parametrize("state", AWARDED)
def test_aborts(bench: ProviderBench, state: State, code: AbortCode) -> None:
    bench.reach(state)
    effects = bench.receive(abort(bench.job, code, "sorry\x07"))
    assert kinds(effects) == [Persist, StopGeneration, CloseStream, Failed]
    if code in (AbortCode.CANCELLED, AbortCode.TIMEOUT):
        assert_aborted(bench, State.CANCELLED, Party.NOBODY, "sorry")
    else:
        assert_consumer_fault(bench, "sorry")


def test_an_abort_without_detail_is_named_by_its_code(bench: ProviderBench) -> None:
    bench.reach(State.STREAMING)
    bench.receive(abort(bench.job, AbortCode.CANCELLED))
    assert_aborted(bench, State.CANCELLED, Party.NOBODY, "cancelled")


def test_an_abort_before_the_award_is_refused(bench: ProviderBench) -> None:
    bench.receive(abort(bench.job, AbortCode.CANCELLED))
    error = bench.error
    assert isinstance(error, MessageRefused)
    assert error.validation.reason is Reason.WRONG_KIND
    assert_left(bench)


# Our own failures.


@pytest.mark.parametrize("code", AbortCode)
@pytest.mark.parametrize("state", RESTING)
def test_the_model_fails(bench: ProviderBench, state: State, code: AbortCode) -> None:
    bench.reach(state)
    effects = bench.feed(GenerationFailed(code, "out of memory"))
    assert opened(one(effects, Send).data, Abort) == Abort(bench.job.job_id, code, "out of memory")
    if state is State.OFFERED:
        assert kinds(effects) == [Send, CloseStream, Failed]
        assert isinstance(bench.error, JobAborted)
        assert bench.error.message == "out of memory"
        assert_left(bench)
        return
    assert kinds(effects) == [Persist, StopGeneration, Send, CloseStream, Failed]
    if code in (AbortCode.EXECUTOR_FAILED, AbortCode.MODEL_UNAVAILABLE):
        assert_aborted(bench, State.PROVIDER_FAULT, Party.PROVIDER, "out of memory")
    else:
        assert_aborted(bench, State.CANCELLED, Party.NOBODY, "out of memory")


def test_a_model_that_makes_no_progress(bench: ProviderBench) -> None:
    bench.reach(State.STREAMING)
    at = bench.now
    effects = bench.time_out()
    assert bench.now == at + 60_000
    assert kinds(effects) == [Persist, StopGeneration, Send, CloseStream, Failed]
    detail = "the model made no progress in time"
    farewell = opened(one(effects, Send).data, Abort, bench.now)
    assert farewell == Abort(bench.job.job_id, AbortCode.EXECUTOR_FAILED, detail)
    assert_aborted(bench, State.PROVIDER_FAULT, Party.PROVIDER, detail)


@pytest.mark.parametrize("state", RESTING)
def test_cancel(bench: ProviderBench, state: State) -> None:
    bench.reach(state)
    effects = bench.feed(Cancel())
    detail = "the provider is shutting down"
    assert opened(one(effects, Send).data, Abort) == Abort(bench.job.job_id, AbortCode.CANCELLED, detail)
    if state is State.OFFERED:
        assert kinds(effects) == [Send, CloseStream, Failed]
        assert_left(bench)
    else:
        assert kinds(effects) == [Persist, StopGeneration, Send, CloseStream, Failed]
        assert_aborted(bench, State.CANCELLED, Party.NOBODY, detail)


@pytest.mark.parametrize(
    ("state", "events"),
    [
        (State.OFFERED, (Produced((1,), "a", INPUT_TOKENS), GenerationEnded(Finish.STOP, 1, ENGINE), TimerFired())),
        (State.ACCEPTED, (Produced((1,), "a", INPUT_TOKENS), GenerationEnded(Finish.STOP, 1, ENGINE))),
        (State.REVEALED, (Produced((1,), "a", INPUT_TOKENS), GenerationEnded(Finish.STOP, 1, ENGINE))),
    ],
)
def test_events_out_of_place_have_no_effect(bench: ProviderBench, state: State, events: tuple[Any, ...]) -> None:
    bench.reach(state)
    for event in events:
        assert bench.feed(event) == []


# Bad messages.


def other_network(bench: ProviderBench) -> bytes:
    return Sealer(CONSUMER, "aci-main").seal(abort(bench.job, AbortCode.BUSY), bench.now).data


def other_sender(bench: ProviderBench) -> bytes:
    body = (
        Award(bench.job.job_id, bench.bid.digest, 0)
        if bench.job.state is State.OFFERED
        else abort(bench.job, AbortCode.BUSY)
    )
    return Sealer(STRANGER, NETWORK).seal(body, bench.now).data


def other_job(bench: ProviderBench) -> bytes:
    body = (
        Award(bytes(32), bench.bid.digest, 0)
        if bench.job.state is State.OFFERED
        else Abort(bytes(32), AbortCode.BUSY, "")
    )
    return bench.peer.seal(body, bench.now).data


def other_kind(bench: ProviderBench) -> bytes:
    return bench.peer.seal(Commit(bench.job.job_id, bytes(32)), bench.now).data


def forged(bench: ProviderBench) -> bytes:
    body = (
        Award(bench.job.job_id, bench.bid.digest, 0)
        if bench.job.state is State.OFFERED
        else abort(bench.job, AbortCode.BUSY)
    )
    good = bench.peer.seal(body, bench.now).data
    return good[:-1] + bytes([good[-1] ^ 1])


def expired(bench: ProviderBench) -> bytes:
    body = (
        Award(bench.job.job_id, bench.bid.digest, 0)
        if bench.job.state is State.OFFERED
        else abort(bench.job, AbortCode.BUSY)
    )
    return bench.peer.seal(body, bench.now - 60_000).data


def garbage(_bench: ProviderBench) -> bytes:
    return b"\xa1" * 20


BAD_FRAMES: dict[Callable[[ProviderBench], bytes], Reason] = {
    other_network: Reason.WRONG_NETWORK,
    other_sender: Reason.WRONG_SENDER,
    other_job: Reason.WRONG_JOB,
    other_kind: Reason.WRONG_KIND,
    forged: Reason.BAD_SIGNATURE,
    expired: Reason.EXPIRED,
    garbage: Reason.NOT_CANONICAL,
}


@pytest.mark.parametrize("state", RESTING)
@pytest.mark.parametrize("make", BAD_FRAMES)
def test_bad_frames(bench: ProviderBench, state: State, make: Callable[[ProviderBench], bytes]) -> None:
    reason = BAD_FRAMES[make]
    if state is State.OFFERED and make is other_network:
        reason = Reason.WRONG_KIND
    bench.reach(state)
    effects = bench.feed(FrameArrived(make(bench)))
    farewell = opened(one(effects, Send).data, Abort, bench.now)
    words = f"message refused: {reason.replace('_', ' ')}"
    assert (farewell.job_id, farewell.abort) == (bench.job.job_id, AbortCode.PROTOCOL)
    assert farewell.detail.startswith(words)
    if state is State.OFFERED:
        assert kinds(effects) == [Send, CloseStream, Failed]
        error = bench.error
        assert isinstance(error, MessageRefused)
        assert error.validation.reason is reason
        assert_left(bench)
    else:
        assert kinds(effects) == [Persist, StopGeneration, Send, CloseStream, Failed]
        assert_consumer_fault(bench, words)


BODIES: dict[Kind, Callable[[ProviderBench], object]] = {
    Kind.AWARD: lambda bench: Award(bench.job.job_id, bench.bid.digest, 0),
    Kind.INPUT: lambda bench: Input(bench.job.job_id, bytes(SEAL_BYTES)),
    Kind.ACCEPT: lambda bench: Accept(bench.job.job_id, bytes(32), bytes(32), OPENING_KEY.public),
    Kind.TOKENS: lambda bench: Tokens(bench.job.job_id, 0, (1,), "", 1),
    Kind.VOUCHER: lambda bench: Voucher(bench.job.job_id, bench.share(1)),
}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize(
    ("state", "allowed"),
    [
        (State.OFFERED, Kind.AWARD),
        (State.ACCEPTED, Kind.INPUT),
        (State.STREAMING, Kind.VOUCHER),
    ],
)
def test_kinds_out_of_order(bench: ProviderBench, state: State, allowed: Kind | None, kind: Kind) -> None:
    bench.reach(state)
    effects = bench.receive(BODIES[kind](bench))
    refused = [effect.error.message for effect in of(effects, Failed) if "wrong kind" in effect.error.message]
    assert bool(refused) == (kind is not allowed)


def test_an_award_that_was_seen_before(bench: ProviderBench) -> None:
    frame = FrameArrived(bench.peer.seal(Award(bench.job.job_id, bench.bid.digest, 0), bench.now).data)
    bench.feed(frame)
    bench.feed(frame)
    assert_consumer_fault(bench, "wrong kind")


def test_the_provider_reads_what_a_consumer_wrote(bench: ProviderBench) -> None:
    """The offer of the bench is a real consumer's, its commitments included."""
    consumer = ConsumerJob(Sealer(CONSUMER, NETWORK), REQUEST, SECRETS, ExpectedCost())
    consumer.handle(Start(), bench.now)
    assert consumer.offer.body == bench.offer.body
    assert bench.offer.body.input_commitment == input_commitment(CONVERSATION, SECRETS.salt)
    assert bench.offer.body.input_bytes == input_bytes(CONVERSATION) == 6 + 9 + 4 + 17
