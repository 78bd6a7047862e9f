"""The consumer's side of a job: every state, every message, every way to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aci_p2p.protocol.commitments import (
    derive_job_id,
    input_bytes,
    input_commitment,
    nonce_commitment,
    output_commitment,
    output_root,
    text_digest,
    tokens_digest,
)
from aci_p2p.protocol.consumer import ConsumerJob, Start
from aci_p2p.protocol.envelope import Sealer, open_envelope
from aci_p2p.protocol.errors import LocalError, RemoteError, ResourceError
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.job import (
    AskForQuotes,
    BidSeen,
    Broadcast,
    Cancel,
    Chosen,
    CloseStream,
    Deliver,
    Failed,
    Finished,
    FrameArrived,
    OpenStream,
    Persist,
    ReleaseQuotes,
    Send,
    SetTimer,
    StreamEnded,
    TimerFired,
)
from aci_p2p.protocol.lifecycle import LIMITS, Party, State
from aci_p2p.protocol.messages import (
    KEM_KEY_BYTES,
    MAX_BIDS,
    MAX_CHUNK_TEXT_BYTES,
    MAX_DETAIL_BYTES,
    SEAL_BYTES,
    Abort,
    AbortCode,
    Accept,
    Award,
    BidSummary,
    Commit,
    Conversation,
    Finish,
    Input,
    Kind,
    Offer,
    Proof,
    Receipt,
    Reveal,
    Share,
    Tokens,
    Turn,
)
from aci_p2p.protocol.pricing import worst_price
from aci_p2p.protocol.proof import MAX_ANSWER_BYTES, verify_proof
from aci_p2p.protocol.publications import Engine
from aci_p2p.protocol.request import JobCancelled, NoBids, PromptRefused, ProviderFault
from aci_p2p.protocol.round import MAX_UNANSWERED, QUOTE_WAIT_MS, BidArrived, QuotesAsked
from aci_p2p.protocol.selection import ExpectedCost
from aci_p2p.protocol.terms import ANY_PROVIDER, PassedOver, Passing, Verification
from tests.protocol.driver import (
    CHARGES,
    CONSUMER,
    CONVERSATION,
    INPUT_TOKENS,
    MODEL_ROOT,
    NETWORK,
    NOW,
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
    ConsumerBench,
    abort,
    make_bid,
    make_offer,
    make_proof,
    of,
    one,
    opened,
    sent,
)

RESTING = (State.DRAFT, State.OFFERED, State.AWARDED, State.STREAMING, State.COMMITTED)
ON_STREAM = (State.AWARDED, State.STREAMING, State.COMMITTED)


@pytest.fixture
def bench() -> ConsumerBench:
    return ConsumerBench()


def kinds(effects: list[Any]) -> list[type[Any]]:
    return [type(effect) for effect in effects]


def assert_over(bench: ConsumerBench) -> None:
    """Nothing that may still come has any effect."""
    assert bench.job.over
    offer = make_offer()
    for event in (
        Start(),
        BidArrived(make_bid(offer, STRANGER)),
        FrameArrived(b""),
        FrameArrived(bench.peer.seal(abort(bench.job, AbortCode.BUSY), bench.now).data),
        StreamEnded(""),
        TimerFired(),
        Cancel(),
    ):
        assert bench.feed(event) == []


def assert_fault(bench: ConsumerBench, detail: str, tokens: int) -> None:
    """The provider failed and the record says so."""
    assert bench.job.state is State.PROVIDER_FAULT
    record = bench.last
    assert (record.state, record.blame, record.peer) == (State.PROVIDER_FAULT, Party.PROVIDER, PROVIDER.node_id)
    assert (record.proof, record.receipt) == (b"", b"")
    assert detail in record.detail
    error = bench.error
    assert isinstance(error, ProviderFault)
    assert isinstance(error, RemoteError)
    assert (error.code, error.provider, error.tokens) == ("provider_fault", PROVIDER.node_id, tokens)
    assert error.message == f"provider {PROVIDER.node_id.short} failed after {tokens} tokens: {record.detail}"
    assert error.hint
    assert_over(bench)


def assert_declined(bench: ConsumerBench, effects: list[Any], why: str) -> None:
    """The provider is out, the rival has the award; when it vanishes too, the job is over and nobody is to blame."""
    back, award = bench.records[-2:]
    assert (back.state, award.state) == (State.OFFERED, State.AWARDED)
    assert one(effects, Chosen).provider == RIVAL.node_id
    assert one(effects, OpenStream).provider == RIVAL.node_id
    assert opened(of(effects, Send)[-1].data, Award, bench.now) == Award(bench.job.job_id, bench.other.digest, 0)
    assert (award.peer, award.blame, award.detail) == (RIVAL.node_id, Party.NOBODY, "")
    assert why in bench.job._last_decline
    assert bench.job._last_decline.startswith(PROVIDER.node_id.short)

    effects = bench.feed(StreamEnded("gone too"))
    message = f"every chosen provider declined; the last: {RIVAL.node_id.short}: gone too"
    assert_no_bids(bench, message, bids=2)
    assert kinds(effects) == [Persist, SetTimer, CloseStream, Persist, CloseStream, Failed]


def assert_no_bids(bench: ConsumerBench, message: str, bids: int) -> None:
    state = State.REJECTED if bids else State.EXPIRED
    assert bench.job.state is state
    assert (bench.last.state, bench.last.blame, bench.last.detail) == (state, Party.NOBODY, message)
    error = bench.error
    assert isinstance(error, NoBids)
    assert isinstance(error, ResourceError)
    assert (error.code, error.message, error.bids) == ("no_bids", message, bids)
    assert error.hint
    assert_over(bench)


# The honest way.


def test_start_stores_then_broadcasts_the_offer(bench: ConsumerBench) -> None:
    commitments = input_commitment(CONVERSATION, SECRETS.salt), nonce_commitment(SECRETS.nonce)
    effects = bench.feed(Start())
    assert effects == [
        Persist(bench.last),
        SetTimer(NOW + LIMITS[State.OFFERED].timeout_ms),
        AskForQuotes(bench.job.offer, frozenset()),
        SetTimer(NOW + QUOTE_WAIT_MS),
    ]
    assert bench.feed(QuotesAsked(frozenset())) == [Broadcast(bench.job.offer), SetTimer(NOW + 2_000)]
    assert (bench.last.state, bench.last.peer, bench.last.blame, bench.last.detail, bench.last.price) == (
        State.OFFERED, None, Party.NOBODY, "", 0,
    )  # fmt: skip
    offer = open_envelope(bench.job.offer.data, Offer, network=NETWORK, now=NOW)
    assert offer == bench.job.offer
    assert offer.header.expires_at == NOW + 60_000
    assert offer.body == Offer(
        job_id=derive_job_id(CONSUMER.node_id, *commitments),
        model_root=MODEL_ROOT,
        input_commitment=commitments[0],
        nonce_commitment=commitments[1],
        input_bytes=input_bytes(CONVERSATION),
        input_turns=2,
        max_tokens=8,
        temperature_milli=700,
        max_price=10**18,
        max_latency_ms=5_000,
        bid_deadline=NOW + QUOTE_WAIT_MS + 2_000,
        verification=Verification.OPTIMISTIC,
        priority_fee=0,
    )
    assert bench.job.job_id == offer.body.job_id


def test_award_goes_to_the_best_bid_when_the_window_closes(bench: ConsumerBench) -> None:
    bench.start()
    chosen, other = bench.bid(addresses=("/a", "/b")), bench.bid(RIVAL, output_token_price=6 * 10**12)
    assert bench.timer == NOW + 2_000
    effects = bench.time_out()
    choice, stored, timer, dial, send = effects
    assert kinds(effects) == [Chosen, Persist, SetTimer, OpenStream, Send]
    assert isinstance(choice, Chosen)
    assert choice.provider == PROVIDER.node_id
    assert [summary.bid_digest for summary in choice.ranking.ranked] == [chosen.digest, other.digest]
    assert stored == Persist(bench.last)
    assert (bench.last.state, bench.last.peer) == (State.AWARDED, PROVIDER.node_id)
    assert timer == SetTimer(NOW + 2_000 + LIMITS[State.AWARDED].timeout_ms)
    assert dial == OpenStream(PROVIDER.node_id, ("/a", "/b"))
    assert isinstance(send, Send)
    assert opened(send.data, Award, bench.now) == Award(bench.job.job_id, chosen.digest, 0)


def test_bids_are_summarised_as_they_come(bench: ConsumerBench) -> None:
    bench.start()
    bid = bench.bid(latency_ms=77)
    assert one(bench.effects, BidSeen).bid == BidSummary(
        provider=PROVIDER.node_id,
        bid_digest=bid.digest,
        worst_price=worst_price(bench.job.offer.body, bid.body).total,
        latency_ms=77,
        stake=0,
        success_milli=800,
        experience=0,
        quantisation="none",
        region="eu-west",
    )


def test_the_bids_of_all_expected_end_the_wait_and_those_of_strangers_do_not() -> None:
    bench = ConsumerBench(replace(REQUEST, expected_bidders=frozenset({PROVIDER.node_id, RIVAL.node_id})))
    bench.start()
    for number in range(50, 60):
        assert kinds(bench.feed(BidArrived(make_bid(bench.job.offer, KeyPair(bytes([number]) * 32))))) == [BidSeen]
    assert kinds(bench.feed(BidArrived(make_bid(bench.job.offer, RIVAL)))) == [BidSeen]
    effects = bench.feed(BidArrived(make_bid(bench.job.offer)))
    assert kinds(effects) == [BidSeen, Chosen, Persist, SetTimer, OpenStream, Send]


def test_no_number_of_bids_ends_the_wait_when_none_is_expected(bench: ConsumerBench) -> None:
    bench.start()
    for number in range(50, 70):
        bench.bid(KeyPair(bytes([number]) * 32))
    assert bench.job.state is State.OFFERED


def test_accept_is_answered_with_the_prompt(bench: ConsumerBench) -> None:
    bench.reach(State.AWARDED)
    effects = bench.accept()
    assert kinds(effects) == [Persist, SetTimer, Persist, SetTimer, Send, ReleaseQuotes]
    assert [record.state for record in bench.records[-2:]] == [State.ACCEPTED, State.STREAMING]
    assert effects[-3] == SetTimer(bench.now + LIMITS[State.STREAMING].timeout_ms)
    sealed = opened(one(effects, Send).data, Input, bench.now).sealed
    assert OPENING_KEY.open(sealed, bench.job._working.binding(Sealer(CONSUMER, NETWORK))) == OPENING


@pytest.mark.parametrize("key", [bytes(KEM_KEY_BYTES), b"\xff" * KEM_KEY_BYTES, OPENING_KEY.public[:-32] + bytes(32)])
def test_an_accept_without_a_key(bench: ConsumerBench, key: bytes) -> None:
    bench.reach(State.AWARDED)
    assert_declined(bench, bench.accept(kem_key=key), "bad seal (no key to seal to)")


def test_tokens_are_delivered_and_renew_the_timer(bench: ConsumerBench) -> None:
    bench.reach(State.STREAMING)
    bench.now += 59_000
    assert bench.part(0, (11, 12), "Tout ") == [SetTimer(bench.now + 60_000), Deliver((11, 12), "Tout ")]
    bench.now += 59_000
    assert bench.part(2, (13,), "") == [SetTimer(bench.now + 60_000), Deliver((13,), "")]
    assert bench.part(3, (), "text") == [SetTimer(bench.now + 60_000), Deliver((), "text")]
    assert bench.job.state is State.STREAMING


def test_commit_is_stored(bench: ConsumerBench) -> None:
    bench.reach(State.COMMITTED)
    assert bench.effects[-2:] == [Persist(bench.last), SetTimer(bench.now + LIMITS[State.COMMITTED].timeout_ms)]


def test_reveal_is_answered_with_a_receipt(bench: ConsumerBench) -> None:
    bench.reach(State.COMMITTED)
    effects = bench.reveal()
    assert kinds(effects) == [
        Persist, SetTimer, Persist, SetTimer, Persist, CloseStream, Finished,
    ]  # fmt: skip
    revealed, receipted, pending = bench.records[-3:]
    assert [record.state for record in (revealed, receipted, pending)] == [
        State.REVEALED, State.RECEIPTED, State.PENDING,
    ]  # fmt: skip
    job = bench.job
    assert (revealed.price, revealed.receipt) == (0, b"")
    assert receipted == replace(pending, state=State.RECEIPTED)
    assert (pending.price, pending.blame, pending.detail) == (PRICE, Party.NOBODY, "")
    assert pending.peer == PROVIDER.node_id
    assert pending.receipt == job.receipt.data == bench.payments[PROVIDER.node_id].statement
    assert pending.proof == revealed.proof
    verified = verify_proof(pending.proof)
    assert verified.proof == job.proof
    assert verified.offer == job.offer
    assert verified.file == job.proof_file()
    assert (verified.file.tokens, verified.file.text) == (TOKENS, TEXT)
    assert opened(pending.receipt, Receipt, bench.now) == Receipt(
        job_id=job.job_id,
        offer_digest=job.offer.digest,
        proof_digest=job.proof.digest,
        shares=(Share(PROVIDER.node_id, bench.chosen.digest, INPUT_TOKENS, 0, len(TOKENS), CHARGES),),
        price=PRICE,
        rule="expected-cost/1",
        bids=tuple(effect.bid for effect in of(bench.effects, BidSeen)),
        terms=ANY_PROVIDER,
        passed=(),
    )
    assert_over(bench)


def test_an_empty_answer_is_no_answer(bench: ConsumerBench) -> None:
    bench.reach(State.STREAMING)
    job_id = bench.job.job_id
    empty: dict[str, Any] = {"tokens_hash": tokens_digest(job_id, ()), "text_hash": text_digest(job_id, "")}
    root = output_root(empty["tokens_hash"], empty["text_hash"])
    bench.receive(Commit(job_id, output_commitment(job_id, PROVIDER.node_id, root, PROVIDER_SECRETS.salt)))
    bench.reveal(output_tokens=0, **empty)
    assert_fault(bench, "bad commitment", tokens=0)


# Requests and bids.


@pytest.mark.parametrize(
    "changes",
    [
        {"conversation": Conversation(())},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"bid_window_ms": 0},
        {"bid_window_ms": 10_001},
        {"terms": replace(ANY_PROVIDER, quantisations=("q",) * 9)},
        {"terms": replace(ANY_PROVIDER, regions=("x" * 33,))},
        {"terms": replace(ANY_PROVIDER, min_stake=-1)},
        {"terms": replace(ANY_PROVIDER, retry_cost=1 << 112)},
    ],
)
def test_a_request_that_no_node_would_forward_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(LocalError):
        replace(REQUEST, **changes)


def test_the_widest_request_is_allowed() -> None:
    assert replace(REQUEST, max_tokens=1, bid_window_ms=10_000).bid_window_ms == 10_000
    assert replace(REQUEST, bid_window_ms=1).bid_window_ms == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 32_769},
        {"temperature_milli": 10_001},
        {"max_price": 1 << 128},
        {"max_latency_ms": 3_600_001},
        {"model_root": b"short"},
        {"conversation": Conversation((Turn("user", "x" * (512 << 10)),))},
    ],
)
def test_a_request_out_of_bounds_never_leaves_draft(changes: dict[str, Any]) -> None:
    job = ConsumerJob(Sealer(CONSUMER, NETWORK), replace(REQUEST, **changes), SECRETS, ExpectedCost())
    with pytest.raises(LocalError):
        job.handle(Start(), NOW)
    assert job.state is State.DRAFT


def test_a_lone_surrogate_in_the_prompt_is_refused() -> None:
    request = replace(REQUEST, conversation=Conversation((Turn("user", "\ud800"),)))
    with pytest.raises(LocalError):
        ConsumerJob(Sealer(CONSUMER, NETWORK), request, SECRETS, ExpectedCost())


@pytest.mark.parametrize(
    ("key", "terms"),
    [
        (PROVIDER, {"latency_ms": 1}),
        (CONSUMER, {}),
        (STRANGER, {"job_id": bytes(32)}),
        (STRANGER, {"offer_digest": bytes(32)}),
        (STRANGER, {"model_root": bytes([1]) * 32}),
    ],
    ids=["second of its provider", "our own", "another job", "other terms", "another model"],
)
def test_bids_that_do_not_count(bench: ConsumerBench, key: KeyPair, terms: dict[str, Any]) -> None:
    bench.start()
    bench.bid()
    assert bench.feed(BidArrived(make_bid(bench.job.offer, key, **terms))) == []
    assert one(bench.time_out(), Chosen).ranking.ranked == (one(bench.effects, BidSeen).bid,)


def test_no_more_bids_are_weighed_than_a_receipt_holds(bench: ConsumerBench) -> None:
    bench.start()
    for number in range(MAX_BIDS + 1):
        bench.bid(KeyPair(bytes([100 + number]) * 32))
    assert len(of(bench.effects, BidSeen)) == MAX_BIDS
    assert len(one(bench.time_out(), Chosen).ranking.ranked) == MAX_BIDS


def test_the_dearest_bids_do_not_break_the_receipt(bench: ConsumerBench) -> None:
    bench.start()
    bench.chosen = bench.bid()
    dearest = (1 << 96) - 1
    for number in range(MAX_BIDS - 1):
        bench.bid(KeyPair(bytes([100 + number]) * 32), input_token_price=dearest, output_token_price=dearest)
    bench.time_out()
    bench.reach(State.PENDING)
    assert len(bench.job.receipt.body.bids) == MAX_BIDS


@pytest.mark.parametrize("state", ON_STREAM)
def test_late_bids_do_not_count(bench: ConsumerBench, state: State) -> None:
    bench.reach(state)
    assert bench.feed(BidArrived(make_bid(bench.job.offer, STRANGER, output_token_price=1))) == []


def test_nobody_bids(bench: ConsumerBench) -> None:
    bench.start()
    effects = bench.time_out()
    assert kinds(effects) == [Persist, CloseStream, Failed]
    assert_no_bids(bench, "nobody bid within 2 s", bids=0)
    assert bench.last.peer is None


def test_no_bid_meets_the_offer(bench: ConsumerBench) -> None:
    bench.start()
    bench.bid(latency_ms=5_001)
    bench.time_out()
    why = "none of 1 bids meets the offer; the nearest is slower than the maximum latency by 1 ms"
    assert_no_bids(bench, why, bids=1)
    assert "price or latency" in bench.error.hint


def test_a_bid_that_expired_is_passed_over(bench: ConsumerBench) -> None:
    bench.start()
    bench.bid(lifetime_ms=2_000)
    bench.bid(RIVAL, output_token_price=6 * 10**12)
    assert one(bench.time_out(), Chosen).provider == RIVAL.node_id


def test_a_bid_is_firm_until_it_expires(bench: ConsumerBench) -> None:
    bench.start()
    bench.bid(lifetime_ms=2_001)
    bench.bid(RIVAL, output_token_price=6 * 10**12)
    assert one(bench.time_out(), Chosen).provider == PROVIDER.node_id


def test_every_bid_expired(bench: ConsumerBench) -> None:
    bench.start()
    bench.bid(lifetime_ms=1_000)
    bench.time_out()
    message = f"every chosen provider declined; the last: {PROVIDER.node_id.short}: its bid has expired"
    assert_no_bids(bench, message, bids=1)


# Declines and failures.


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
    assert bench.last.peer == bench.job.receipt.body.shares[0].provider == RIVAL.node_id
    assert bench.last.price == (3 * 10**12 * INPUT_TOKENS + 6 * 10**12 * len(TOKENS)) * 5 // 4
    assert bench.job.receipt.body.passed == (PassedOver(PROVIDER.node_id, Passing.DECLINED),)


def test_the_receipt_says_why_each_was_passed_over() -> None:
    bench = ConsumerBench()
    bench.start()
    slow, gone, rude = (KeyPair(bytes([number]) * 32) for number in (11, 12, 13))
    for price, (key, lifetime) in enumerate([(slow, 60_000), (STRANGER, 2_000), (gone, 60_000), (rude, 60_000)]):
        bench.bid(key, output_token_price=10**12 + price, lifetime_ms=lifetime)
    bench.chosen = bench.bid(PROVIDER)
    bench.time_out()
    bench.time_out()
    bench.feed(StreamEnded("gone"))
    bench.feed(FrameArrived(b"nonsense"))
    bench.accept()
    bench.serve(PROVIDER)
    assert bench.job.receipt.body.passed == (
        PassedOver(slow.node_id, Passing.FAILED),
        PassedOver(STRANGER.node_id, Passing.EXPIRED),
        PassedOver(gone.node_id, Passing.FAILED),
        PassedOver(rude.node_id, Passing.FAILED),
    )


def test_what_is_asked_goes_into_offer_and_receipt() -> None:
    terms = replace(ANY_PROVIDER, retry_cost=5)
    bench = ConsumerBench(replace(REQUEST, terms=terms, priority_fee=10**12)).reach(State.PENDING)
    receipt = bench.job.receipt.body
    assert bench.job.offer.body.priority_fee == receipt.shares[0].charges.priority == 10**12
    assert receipt.terms == terms
    assert receipt.price == receipt.shares[0].price == PRICE + 10**12


def test_an_award_that_is_not_answered_times_out(bench: ConsumerBench) -> None:
    bench.reach(State.AWARDED)
    at = bench.now
    effects = bench.time_out()
    assert bench.now == at + 5_000
    assert kinds(effects) == [Persist, SetTimer, Send, CloseStream, Chosen, Persist, SetTimer, OpenStream, Send]
    assert sent(effects) == [Kind.ABORT, Kind.AWARD]
    assert opened(of(effects, Send)[0].data, Abort, bench.now).abort is AbortCode.TIMEOUT
    assert_declined(bench, effects, "it did not answer the award in time")


def awards_in_vain(bench: ConsumerBench, limit: int = MAX_BIDS) -> int:
    """How many awards follow while nobody answers, and the clock is turned back again and again: no bid expires."""
    awards = 0
    while not bench.job.over and awards < limit:
        bench.now = bench.job.offer.header.issued_at
        bench.timer = bench.now + 5_000
        awards += Kind.AWARD in sent(bench.time_out())
    return awards


def test_a_liar_with_many_names_does_not_hold_a_job_for_ever() -> None:
    bench = ConsumerBench(replace(REQUEST, max_providers=3))
    keys = [KeyPair(bytes([100 + number]) * 32) for number in range(MAX_BIDS)]
    bench.start()
    for key in keys:
        bench.bid(key)
    assert awards_in_vain(bench, MAX_UNANSWERED) == MAX_UNANSWERED
    # One answers, and fails: the count begins anew.
    chosen = of(bench.effects, OpenStream)[-1].provider
    bench.peer = Sealer(next(key for key in keys if key.node_id == chosen), NETWORK)
    bench.accept()
    bench.feed(StreamEnded("killed"))
    assert 1 + awards_in_vain(bench) == MAX_UNANSWERED
    assert bench.error.message.startswith("provider ")


def test_nobody_answers(bench: ConsumerBench) -> None:
    bench.start()
    for number in range(MAX_BIDS):
        bench.bid(KeyPair(bytes([100 + number]) * 32))
    assert awards_in_vain(bench) == MAX_UNANSWERED
    assert "every chosen provider declined; the last: " in bench.error.message


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


# Bad messages.


def other_network(bench: ConsumerBench) -> bytes:
    return Sealer(PROVIDER, "aci-main").seal(abort(bench.job, AbortCode.BUSY), bench.now).data


def other_sender(bench: ConsumerBench) -> bytes:
    return Sealer(RIVAL, NETWORK).seal(abort(bench.job, AbortCode.BUSY), bench.now).data


def other_job(bench: ConsumerBench) -> bytes:
    return bench.peer.seal(Abort(bytes(32), AbortCode.BUSY, ""), bench.now).data


def other_kind(bench: ConsumerBench) -> bytes:
    return bench.peer.seal(Award(bench.job.job_id, bytes(32), 0), bench.now).data


def expired(bench: ConsumerBench) -> bytes:
    return bench.peer.seal(abort(bench.job, AbortCode.BUSY), bench.now - 60_000).data


def from_future(bench: ConsumerBench) -> bytes:
    return bench.peer.seal(abort(bench.job, AbortCode.BUSY), bench.now + 30_001).data


def forged(bench: ConsumerBench) -> bytes:
    good = bench.peer.seal(abort(bench.job, AbortCode.BUSY), bench.now).data
    return good[:-1] + bytes([good[-1] ^ 1])


def garbage(_bench: ConsumerBench) -> bytes:
    return b"\xff" * 100


def nothing(_bench: ConsumerBench) -> bytes:
    return b""


def oversized(_bench: ConsumerBench) -> bytes:
    return b"\x58" * ((1 << 20) + 1)


BAD_FRAMES: dict[Callable[[ConsumerBench], bytes], str] = {
    other_network: "wrong network",
    other_sender: "wrong sender",
    other_job: "wrong job",
    other_kind: "wrong kind",
    expired: "expired",
    from_future: "from future",
    forged: "bad signature",
    garbage: "not canonical",
    nothing: "not canonical",
    oversized: "not canonical",
}


@pytest.mark.parametrize("state", ON_STREAM)
@pytest.mark.parametrize("make", BAD_FRAMES)
def test_bad_frames(bench: ConsumerBench, state: State, make: Callable[[ConsumerBench], bytes]) -> None:
    reason = f"message refused: {BAD_FRAMES[make]}"
    bench.reach(state)
    effects = bench.feed(FrameArrived(make(bench)))
    farewell = opened(of(effects, Send)[0].data, Abort, bench.now)
    assert (farewell.job_id, farewell.abort) == (bench.job.job_id, AbortCode.PROTOCOL)
    assert farewell.detail.startswith(reason)
    if state is State.AWARDED:
        assert kinds(effects) == [Persist, SetTimer, Send, CloseStream, Chosen, Persist, SetTimer, OpenStream, Send]
        assert_declined(bench, effects, reason)
    else:
        assert kinds(effects) == [Persist, Send, CloseStream, Failed]
        assert_fault(bench, reason, tokens=0 if state is State.STREAMING else 3)


BODIES: dict[Kind, Callable[[bytes], object]] = {
    Kind.ACCEPT: lambda job_id: Accept(job_id, bytes(32), bytes(32), OPENING_KEY.public),
    Kind.INPUT: lambda job_id: Input(job_id, bytes(SEAL_BYTES)),
    Kind.TOKENS: lambda job_id: Tokens(job_id, 0, (1,), "", 1),
    Kind.COMMIT: lambda job_id: Commit(job_id, bytes(32)),
    Kind.REVEAL: lambda job_id: Reveal(job_id, bytes(32), b"\x00"),
    Kind.AWARD: lambda job_id: Award(job_id, bytes(32), 0),
}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize(
    ("state", "allowed"),
    [
        (State.AWARDED, {Kind.ACCEPT}),
        (State.STREAMING, {Kind.TOKENS, Kind.COMMIT}),
        (State.COMMITTED, {Kind.REVEAL}),
    ],
)
def test_kinds_out_of_order(bench: ConsumerBench, state: State, allowed: set[Kind], kind: Kind) -> None:
    bench.reach(state)
    bench.receive(BODIES[kind](bench.job.job_id))
    said = bench.job._last_decline if state is State.AWARDED else bench.last.detail
    assert ("wrong kind" in said) == (kind not in allowed)


def test_an_accept_of_another_award(bench: ConsumerBench) -> None:
    bench.reach(State.AWARDED)
    assert_declined(bench, bench.accept(award_digest=bytes(32)), "wrong job")


def test_an_accept_that_was_seen_before(bench: ConsumerBench) -> None:
    bench.reach(State.AWARDED)
    sent_award = of(bench.effects, Send)[-1].data
    digest = open_envelope(sent_award, Award, network=NETWORK, now=None).digest
    accept = Accept(bench.job.job_id, digest, PROVIDER_SECRETS.nonce, OPENING_KEY.public)
    frame = FrameArrived(bench.peer.seal(accept, bench.now).data)
    bench.feed(frame)
    bench.feed(frame)
    assert_fault(bench, "wrong kind", tokens=0)


@pytest.mark.parametrize(
    ("index", "tokens", "text", "reason"),
    [
        (0, (11, 12), "again", "out of order"),
        (1, (12,), "overlap", "out of order"),
        (3, (14,), "gap", "out of order"),
        (2, (), "", "malformed"),
        (2, (1,) * 7, "too many", "too many tokens"),
    ],
)
def test_tokens_that_do_not_continue(
    bench: ConsumerBench, index: int, tokens: tuple[int, ...], text: str, reason: str
) -> None:
    bench.reach(State.STREAMING)
    bench.part(0, (11, 12), "a")
    effects = bench.part(index, tokens, text)
    assert kinds(effects) == [Persist, Send, CloseStream, Failed]
    assert_fault(bench, reason, tokens=2)


def test_as_many_tokens_as_asked_for(bench: ConsumerBench) -> None:
    bench.reach(State.STREAMING)
    bench.part(0, (11, 12), "a")
    assert of(bench.part(2, (1,) * 6, ""), Deliver)
    bench.part(8, (1,), "")
    assert_fault(bench, "too many tokens", tokens=8)


def test_no_more_text_than_a_proof_holds() -> None:
    bench = ConsumerBench(replace(REQUEST, max_tokens=100)).reach(State.STREAMING)
    whole = "é" * (MAX_CHUNK_TEXT_BYTES // 2)
    parts = MAX_ANSWER_BYTES // MAX_CHUNK_TEXT_BYTES
    for index in range(parts):
        assert of(bench.part(index, (1,), whole), Deliver)
    bench.part(parts, (1,), "a")
    assert_fault(bench, "too large", tokens=parts)


def changed(value: object) -> object:
    """Another value of the same type."""
    if isinstance(value, bytes):
        return bytes([value[0] ^ 1]) + value[1:]
    if isinstance(value, Finish):
        return Finish.LENGTH
    if isinstance(value, int):
        return value + 1
    if isinstance(value, Engine):
        return Engine("other", "x", "y", "z")
    return STRANGER.node_id


FREE = {"engine"}
"""What the provider states on its own account; nothing seen on the stream says otherwise."""


@pytest.mark.parametrize("field", Proof.__dataclass_fields__)
def test_a_proof_with_one_field_changed(bench: ConsumerBench, field: str) -> None:
    bench.reach(State.COMMITTED)
    honest = make_proof(bench.job.offer, bench.chosen)
    changes: dict[str, Any] = {field: changed(getattr(honest, field))}
    effects = bench.reveal(**changes)
    if field in FREE:
        assert bench.job.state is State.PENDING
        return
    assert kinds(effects) == [Persist, Send, CloseStream, Failed]
    assert opened(one(effects, Send).data, Abort, bench.now).abort is AbortCode.PROTOCOL
    expected = {
        "job_id": "another job",
        "consumer": "another consumer",
        "offer_digest": "another offer",
        "bid_digest": "wrong job",
        "model_root": "another model",
        "input_commitment": "another prompt",
        "temperature_milli": "another temperature",
    }
    assert_fault(bench, expected.get(field, "bad commitment"), tokens=3)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"input_tokens": 0}, "more prompt tokens"),
        ({"input_tokens": INPUT_TOKENS + 1}, "bad commitment"),
        ({"first_token": 1}, "bad commitment"),
        ({"input_tokens": input_bytes(CONVERSATION) + 2 * 16 + 128 + 1}, "more prompt tokens"),
        ({"output_tokens": 9}, "more tokens than were asked for"),
        ({"output_tokens": 2}, "bad commitment"),
    ],
)
def test_a_proof_with_counts_that_cannot_be(bench: ConsumerBench, changes: dict[str, Any], problem: str) -> None:
    bench.reach(State.COMMITTED)
    bench.reveal(**changes)
    assert_fault(bench, problem, tokens=3)


def test_as_many_prompt_tokens_as_there_can_be(bench: ConsumerBench) -> None:
    bench.reach(State.STREAMING)
    most = input_bytes(CONVERSATION) + 2 * 16 + 128
    assert of(bench.receive(Tokens(bench.job.job_id, 0, (1,), "", most)), Deliver)
    assert bench.receive(Tokens(bench.job.job_id, 1, (1,), "", most + 1))
    assert_fault(bench, "bad commitment", tokens=1)


@pytest.mark.parametrize("input_tokens", [0, INPUT_TOKENS + 1, INPUT_TOKENS - 1])
def test_prompt_tokens_are_counted_once(bench: ConsumerBench, input_tokens: int) -> None:
    bench.reach(State.STREAMING)
    bench.part(0, (1,), "a")
    bench.receive(Tokens(bench.job.job_id, 1, (1,), "", input_tokens))
    assert_fault(bench, "bad commitment", tokens=1)


def test_a_seed_of_another_nonce(bench: ConsumerBench) -> None:
    """A provider that fixes another nonce than it accepted with, seed and all."""
    bench.reach(State.AWARDED)
    bench.accept(provider_nonce=bytes(32))
    bench.answer()
    bench.reveal()
    assert_fault(bench, "bad commitment", tokens=3)


def test_a_proof_signed_by_another(bench: ConsumerBench) -> None:
    bench.reach(State.COMMITTED)
    bench.reveal(key=RIVAL)
    assert_fault(bench, "wrong sender", tokens=3)


def test_a_reveal_that_does_not_open_its_commitment(bench: ConsumerBench) -> None:
    bench.reach(State.COMMITTED)
    bench.reveal(salt=bytes(32))
    assert_fault(bench, "bad commitment", tokens=3)


def test_a_commitment_to_something_else(bench: ConsumerBench) -> None:
    bench.reach(State.STREAMING)
    for index, (tokens, text) in zip((0, 2, 3), PARTS, strict=True):
        bench.part(index, tokens, text)
    bench.receive(Commit(bench.job.job_id, bytes(32)))
    bench.reveal()
    assert_fault(bench, "bad commitment", tokens=3)


@pytest.mark.parametrize(
    ("tokens", "text"), [((11, 12, 14), TEXT), (TOKENS, TEXT + "!"), (TOKENS[:-1], TEXT), ((), TEXT), (TOKENS, "")]
)
def test_another_answer_than_was_streamed(bench: ConsumerBench, tokens: tuple[int, ...], text: str) -> None:
    """Tokens and text, commitment and proof agree with each other, but not with what came."""
    bench.reach(State.STREAMING)
    for index, (part, words) in zip((0, 2, 3), PARTS, strict=True):
        bench.part(index, part, words)
    job_id = bench.job.job_id
    hashes: dict[str, Any] = {"tokens_hash": tokens_digest(job_id, tokens), "text_hash": text_digest(job_id, text)}
    root = output_root(hashes["tokens_hash"], hashes["text_hash"])
    bench.receive(Commit(job_id, output_commitment(job_id, PROVIDER.node_id, root, PROVIDER_SECRETS.salt)))
    bench.reveal(output_tokens=len(tokens), **hashes)
    assert_fault(bench, "bad commitment", tokens=3)


@pytest.mark.parametrize("frame", [b"\x00", b"\xff" * 64])
def test_a_proof_that_is_none(bench: ConsumerBench, frame: bytes) -> None:
    bench.reach(State.COMMITTED)
    bench.receive(Reveal(bench.job.job_id, PROVIDER_SECRETS.salt, frame))
    assert_fault(bench, "message refused", tokens=3)


def test_a_proof_signed_at_another_time(bench: ConsumerBench) -> None:
    bench.reach(State.COMMITTED)
    proof = Sealer(PROVIDER, NETWORK).seal(make_proof(bench.job.offer, bench.chosen), 1_000, lifetime_ms=1)
    bench.receive(Reveal(bench.job.job_id, PROVIDER_SECRETS.salt, proof.data))
    assert_fault(bench, "expired", tokens=3)


def test_farewells_fit_whatever_they_say(bench: ConsumerBench) -> None:
    send = bench.job._abort(AbortCode.PROTOCOL, "é" * MAX_DETAIL_BYTES, NOW)
    detail = opened(send.data, Abort).detail
    assert detail == "é" * (MAX_DETAIL_BYTES // 2)
    assert opened(bench.job._abort(AbortCode.BUSY, "aé" * MAX_DETAIL_BYTES, NOW).data, Abort).detail == "aé" * 170 + "a"


def test_text_alone_comes_once_at_the_end(bench: ConsumerBench) -> None:
    bench.reach(State.STREAMING)
    bench.part(0, (1,), "a")
    assert kinds(bench.part(1, (), "b")) == [SetTimer, Deliver]
    bench.part(1, (), "c")
    assert_fault(bench, "malformed", tokens=1)
