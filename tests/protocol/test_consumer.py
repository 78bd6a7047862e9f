"""The consumer's side of a job: the honest way, the request, and the choice among bids."""

from __future__ import annotations

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
from aci_p2p.protocol.consumer import (
    BidArrived,
    ConsumerJob,
    Start,
)
from aci_p2p.protocol.envelope import Sealer, open_envelope
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.job import (
    BidSeen,
    Broadcast,
    Chosen,
    CloseStream,
    Deliver,
    Failed,
    Finished,
    OpenStream,
    Persist,
    Send,
    SetTimer,
)
from aci_p2p.protocol.lifecycle import LIMITS, Party, State
from aci_p2p.protocol.messages import (
    MAX_BIDS,
    Award,
    BidSummary,
    Commit,
    Conversation,
    Input,
    Offer,
    Receipt,
    Turn,
)
from aci_p2p.protocol.pricing import worst_price
from aci_p2p.protocol.proof import verify_proof
from aci_p2p.protocol.selection import PriceThenLatency
from tests.protocol.consuming import (
    ON_STREAM,
    assert_fault,
    assert_no_bids,
    assert_over,
    kinds,
)
from tests.protocol.driver import (
    CONSUMER,
    CONVERSATION,
    INPUT_TOKENS,
    MODEL_ROOT,
    NETWORK,
    NOW,
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
    make_bid,
    of,
    one,
    opened,
)


@pytest.fixture
def bench() -> ConsumerBench:
    return ConsumerBench()


# The honest way.


def test_start_stores_then_broadcasts_the_offer(bench: ConsumerBench) -> None:
    commitments = input_commitment(CONVERSATION, SECRETS.salt), nonce_commitment(SECRETS.nonce)
    effects = bench.feed(Start())
    assert effects == [
        Persist(bench.last),
        SetTimer(NOW + LIMITS[State.OFFERED].timeout_ms),
        Broadcast(bench.job.offer),
        SetTimer(NOW + 2_000),
    ]
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
        bid_deadline=NOW + 2_000,
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
    assert opened(send.data, Award, bench.now) == Award(bench.job.job_id, chosen.digest)


def test_bids_are_summarised_as_they_come(bench: ConsumerBench) -> None:
    bench.start()
    bid = bench.bid(latency_ms=77)
    assert one(bench.effects, BidSeen).bid == BidSummary(
        provider=PROVIDER.node_id,
        bid_digest=bid.digest,
        worst_price=worst_price(bench.job.offer.body, bid.body),
        latency_ms=77,
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
    assert kinds(effects) == [Persist, SetTimer, Persist, SetTimer, Send]
    assert [record.state for record in bench.records[-2:]] == [State.ACCEPTED, State.STREAMING]
    assert effects[-2] == SetTimer(bench.now + LIMITS[State.STREAMING].timeout_ms)
    assert opened(one(effects, Send).data, Input, bench.now) == Input(
        bench.job.job_id, CONVERSATION, SECRETS.salt, SECRETS.nonce
    )


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
        Persist, SetTimer, Persist, SetTimer, Send, Persist, CloseStream, Finished,
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
    assert pending.receipt == job.receipt.data == one(effects, Send).data
    assert pending.proof == revealed.proof
    verified = verify_proof(pending.proof)
    assert verified.proof == job.proof
    assert verified.offer == job.offer
    assert verified.file == job.proof_file()
    assert (verified.file.tokens, verified.file.text) == (TOKENS, TEXT)
    assert opened(pending.receipt, Receipt, bench.now) == Receipt(
        job_id=job.job_id,
        provider=PROVIDER.node_id,
        offer_digest=job.offer.digest,
        proof_digest=job.proof.digest,
        input_tokens=INPUT_TOKENS,
        output_tokens=len(TOKENS),
        price=PRICE,
        rule="price-latency/1",
        bids=tuple(effect.bid for effect in of(bench.effects, BidSeen)),
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
    job = ConsumerJob(Sealer(CONSUMER, NETWORK), replace(REQUEST, **changes), SECRETS, PriceThenLatency())
    with pytest.raises(LocalError):
        job.handle(Start(), NOW)
    assert job.state is State.DRAFT


def test_a_lone_surrogate_in_the_prompt_is_refused() -> None:
    request = replace(REQUEST, conversation=Conversation((Turn("user", "\ud800"),)))
    with pytest.raises(LocalError):
        ConsumerJob(Sealer(CONSUMER, NETWORK), request, SECRETS, PriceThenLatency())


@pytest.mark.parametrize(
    ("key", "terms"),
    [
        (PROVIDER, {"latency_ms": 1}),
        (CONSUMER, {}),
        (STRANGER, {"job_id": bytes(32)}),
        (STRANGER, {"offer_digest": bytes(32)}),
    ],
    ids=["second of its provider", "our own", "another job", "other terms"],
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
