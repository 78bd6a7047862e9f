"""A provider fails at any moment, and another goes on; everybody is paid for what has come of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aci_p2p.protocol.admission import LEASE_MS, MAX_WAIT_MS, RETRY_MS
from aci_p2p.protocol.consumer import Start
from aci_p2p.protocol.envelope import Sealer, open_envelope
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.job import (
    AskForQuotes,
    Broadcast,
    Cancel,
    Chosen,
    FailedOver,
    OpenStream,
    PaymentState,
    ReleaseQuotes,
    Send,
    StreamEnded,
)
from aci_p2p.protocol.leg import VOUCHER_STEP
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.protocol.messages import Abort, AbortCode, Award, Input, Receipt, Voucher
from aci_p2p.protocol.proof import verify_proof
from aci_p2p.protocol.provider import GenerationFailed
from aci_p2p.protocol.request import NoBids, PromptRefused, ProviderFault
from aci_p2p.protocol.round import QUOTE_PATIENCE_MS, QUOTE_WAIT_MS, SEEK_MS, BidArrived, QuoteRefused, QuotesAsked
from aci_p2p.protocol.settlement import read_statement, settle
from aci_p2p.protocol.terms import PassedOver, Passing
from aci_p2p.protocol.validation import MessageRefused
from tests.protocol.driver import (
    CONSUMER,
    INPUT_TOKENS,
    NETWORK,
    NOW,
    OPENING_KEY,
    PROVIDER,
    REQUEST,
    RIVAL,
    STRANGER,
    ConsumerBench,
    Market,
    Model,
    ProviderBench,
    Seller,
    abort,
    make_bid,
    of,
    one,
    opened,
)

LENGTH = 40
PARTS = tuple(((token,), f"{token} ") for token in range(LENGTH))
ANSWER = "".join(text for _, text in PARTS)
ROBUST = replace(REQUEST, max_tokens=LENGTH, max_providers=3)
INPUT_PRICE, CHEAP_TOKEN, DEAR_TOKEN = (number * 10**12 * 5 // 4 for number in (3, 5, 6))
"""For each token, verification included."""
DEAR = 6 * 10**12
DIES = GenerationFailed(AbortCode.EXECUTOR_FAILED, "killed")


def dying(tokens: int) -> Model:
    """A model that dies after so many tokens."""
    return Model(parts=PARTS[:tokens], failure=DIES)


def honest() -> Model:
    return Model(parts=PARTS)


# Another goes on.


@pytest.mark.parametrize("dies_after", range(LENGTH + 1))
def test_another_goes_on_wherever_the_first_dies(dies_after: int) -> None:
    sellers = [Seller(PROVIDER, dying(dies_after)), Seller(RIVAL, honest(), {"output_token_price": DEAR})]
    market = Market(sellers, ROBUST).run()
    first, second = market.providers
    consumer = market.consumer
    # No token is lost or comes twice.
    assert market.answer == consumer.job.text == ANSWER
    assert consumer.job.tokens == tuple(range(LENGTH))
    assert one(consumer.effects, FailedOver) == FailedOver(PROVIDER.node_id, "killed", dies_after)
    assert consumer.last.state is second.last.state is State.PENDING
    # Each is paid for its own tokens, and for reading what was there before; both sides hold the same.
    first_price = (INPUT_PRICE * INPUT_TOKENS + CHEAP_TOKEN * dies_after) if dies_after else 0
    second_price = INPUT_PRICE * (INPUT_TOKENS + dies_after) + DEAR_TOKEN * (LENGTH - dies_after)
    assert consumer.last.price == first_price + second_price
    held = [bench.payments[CONSUMER.node_id].amount for bench in market.providers if bench.payments]
    assert held == [price for price in (first_price, second_price) if price]
    assert (first.last.state, first.last.blame) == (State.PROVIDER_FAULT, Party.PROVIDER)
    # One receipt says all of it.
    receipt = open_envelope(consumer.last.receipt, Receipt, network=NETWORK, now=None).body
    assert receipt.price == sum(share.price for share in receipt.shares) == consumer.last.price
    assert [share.price for share in receipt.shares] == held
    # What is proved begins where the second began.
    verified = verify_proof(consumer.last.proof)
    assert verified.proof.body.first_token == dies_after
    assert verified.file.tokens == tuple(range(LENGTH))
    assert verified.file.text == "".join(text for _, text in PARTS[dies_after:])


def test_three_providers_and_no_more() -> None:
    keys = (PROVIDER, RIVAL, STRANGER, KeyPair(bytes([40]) * 32))
    sellers = [
        Seller(key, dying(10 * (index + 1)), {"output_token_price": 5 * 10**12 + index})
        for index, key in enumerate(keys)
    ]
    market = Market(sellers, ROBUST).run()
    assert len(market.providers) == 3
    error = market.consumer.error
    assert isinstance(error, ProviderFault)
    assert (error.provider, error.tokens) == (STRANGER.node_id, 30)
    assert (market.consumer.last.state, market.consumer.last.blame) == (State.PROVIDER_FAULT, Party.PROVIDER)
    assert [bench.payments[CONSUMER.node_id].amount for bench in market.providers] == [
        payment.amount for payment in market.consumer.payments.values()
    ]
    assert market.consumer.last.price == sum(payment.amount for payment in market.consumer.payments.values())


def test_the_only_provider_fails() -> None:
    market = Market([Seller(PROVIDER, dying(3))], ROBUST).run()
    assert isinstance(market.consumer.error, ProviderFault)
    assert market.consumer.last.state is State.PROVIDER_FAULT
    # Whether anybody else is there was asked, of everybody.
    assert len(of(market.consumer.effects, Broadcast)) == 2


def test_who_has_failed_is_not_asked_again() -> None:
    bench = ConsumerBench(ROBUST).reach(State.STREAMING)
    bench.feed(StreamEnded("gone"))
    bench.feed(StreamEnded("gone too"))
    bench.feed(StreamEnded("x"))
    ask = of(bench.effects, AskForQuotes)[-1]
    assert ask.exclude == {PROVIDER.node_id}
    bench.feed(QuotesAsked(frozenset()))
    assert bench.feed(BidArrived(make_bid(bench.job.offer, PROVIDER))) == []


def test_a_new_round_offers_what_is_left_of_the_money() -> None:
    bench = ConsumerBench(replace(ROBUST, max_price=10**15)).reach(State.STREAMING)
    bench.part(0, (1, 2), "ab")
    bench.feed(StreamEnded("gone"))
    bench.feed(StreamEnded("the rival is not there either"))
    paid = INPUT_PRICE * INPUT_TOKENS + 2 * CHEAP_TOKEN
    assert bench.job.price == paid
    assert bench.job.offer.body.max_price == 10**15 - paid


def test_a_bid_that_the_rest_does_not_pay_for_has_no_turn() -> None:
    bench = ConsumerBench(ROBUST)
    bench.start()
    offer = bench.job.offer.body
    bench.bid()
    dear = make_bid(bench.job.offer, RIVAL, output_token_price=DEAR)
    bench.feed(BidArrived(dear))
    assert offer.max_price == ROBUST.max_price
    bench.time_out()
    bench.accept()
    # A dear prompt: what the first is owed leaves too little for the second's worst.
    bench.job._request = replace(ROBUST, max_price=INPUT_PRICE * INPUT_TOKENS + 2 * CHEAP_TOKEN + 1)
    bench.part(0, (1, 2), "ab")
    effects = bench.feed(StreamEnded("gone"))
    assert of(effects, Chosen) == []


def test_a_provider_that_lies_about_its_answer_ends_the_job() -> None:
    bench = ConsumerBench(ROBUST).reach(State.COMMITTED)
    bench.reveal(salt=bytes(32))
    assert isinstance(bench.error, ProviderFault)
    assert bench.payments == {}
    assert bench.job.price == 0


def test_one_word_against_the_prompt_is_not_enough() -> None:
    refuses = Model(parts=(), failure=GenerationFailed(AbortCode.PROMPT_TOO_LONG, "too long, I say"))
    market = Market([Seller(PROVIDER, refuses), Seller(RIVAL, honest(), {"output_token_price": DEAR})], ROBUST).run()
    assert market.answer == ANSWER
    sellers = [
        Seller(PROVIDER, refuses),
        Seller(RIVAL, refuses),
        Seller(STRANGER, honest(), {"output_token_price": DEAR}),
    ]
    market = Market(sellers, ROBUST).run()
    assert isinstance(market.consumer.error, PromptRefused)
    assert (market.consumer.last.state, market.consumer.last.blame) == (State.CANCELLED, Party.NOBODY)


def test_a_flushed_end_of_a_provider_that_fails_is_given_anew() -> None:
    bench = ConsumerBench(ROBUST).reach(State.STREAMING)
    bench.part(0, (1,), "a")
    bench.part(1, (), "\ufffd")
    assert bench.job.text == "a\ufffd"
    bench.feed(StreamEnded("gone"))
    assert bench.job.text == "a"


def test_the_next_reads_the_tokens_behind_the_prompt() -> None:
    bench = ConsumerBench(ROBUST).reach(State.STREAMING)
    bench.part(0, (1, 2), "ab")
    effects = bench.feed(StreamEnded("gone"))
    assert one(effects, OpenStream).provider == RIVAL.node_id
    assert opened(of(effects, Send)[-1].data, Award, bench.now).accepted_tokens == 2
    bench.peer = Sealer(RIVAL, NETWORK)
    effects = bench.accept()
    assert isinstance(effects[-1], ReleaseQuotes)
    sealed = opened(one(effects, Send).data, Input, bench.now).sealed
    assert OPENING_KEY.open(sealed, bench.job._working.binding(Sealer(CONSUMER, NETWORK))).accepted == (1, 2)


# Vouchers.


def test_a_voucher_goes_out_for_every_step() -> None:
    bench = ConsumerBench(ROBUST).reach(State.STREAMING)
    for index in range(VOUCHER_STEP - 1):
        bench.part(index, (index,), "a")
    assert bench.payments == {}
    bench.part(VOUCHER_STEP - 1, (9,), "a")
    payment = bench.payments[PROVIDER.node_id]
    assert payment.state is PaymentState.RUNNING
    share = opened(payment.statement, Voucher, bench.now).share
    assert (share.output_tokens, share.input_tokens, share.first_token) == (VOUCHER_STEP, INPUT_TOKENS, 0)
    assert share.price == payment.amount == bench.last.price == INPUT_PRICE * INPUT_TOKENS + CHEAP_TOKEN * VOUCHER_STEP


def test_what_came_before_a_cancel_is_owed() -> None:
    bench = ConsumerBench(ROBUST).reach(State.STREAMING)
    bench.part(0, (1, 2, 3), "abc")
    bench.feed(Cancel())
    payment = bench.payments[PROVIDER.node_id]
    assert (payment.state, payment.amount) == (PaymentState.OWED, INPUT_PRICE * INPUT_TOKENS + 3 * CHEAP_TOKEN)


# Quotes.


def test_the_first_quotes_are_enough() -> None:
    bench = ConsumerBench(ROBUST)
    ask = one(bench.feed(Start()), AskForQuotes)
    bench.feed(QuotesAsked(frozenset({PROVIDER.node_id, RIVAL.node_id, STRANGER.node_id})))
    assert of(bench.effects, Broadcast) == []
    bench.now += 30
    bench.feed(BidArrived(make_bid(ask.offer, PROVIDER, now=bench.now)))
    assert bench.timer == NOW + 30 + QUOTE_PATIENCE_MS
    bench.feed(BidArrived(make_bid(ask.offer, RIVAL, now=bench.now, output_token_price=4 * 10**12)))
    effects = bench.time_out()
    assert one(effects, Chosen).provider == RIVAL.node_id
    assert bench.job.state is State.AWARDED


def test_all_answers_end_the_wait() -> None:
    bench = ConsumerBench(ROBUST)
    ask = one(bench.feed(Start()), AskForQuotes)
    bench.feed(QuotesAsked(frozenset({PROVIDER.node_id, RIVAL.node_id})))
    bench.feed(BidArrived(make_bid(ask.offer, PROVIDER)))
    assert one(bench.feed(QuoteRefused(RIVAL.node_id, "busy")), Chosen).provider == PROVIDER.node_id


def test_without_a_quote_everybody_is_asked() -> None:
    bench = ConsumerBench(ROBUST)
    bench.feed(Start())
    bench.feed(QuotesAsked(frozenset({PROVIDER.node_id, RIVAL.node_id})))
    bench.feed(QuoteRefused(PROVIDER.node_id, "busy"))
    effects = bench.time_out()
    assert bench.now == NOW + QUOTE_WAIT_MS
    assert one(effects, Broadcast).offer == bench.job.offer
    bench.time_out()
    assert isinstance(bench.error, NoBids)
    assert "busy" in bench.error.message


@pytest.mark.parametrize(("told", "believed"), [(NOW + 700, NOW + 700), (NOW - 5, NOW), (2**60, NOW + MAX_WAIT_MS)])
def test_who_is_busy_says_until_when(told: int, believed: int) -> None:
    bench = ConsumerBench(ROBUST)
    bench.feed(Start())
    bench.feed(QuotesAsked(frozenset({PROVIDER.node_id, RIVAL.node_id})))
    bench.feed(QuoteRefused(PROVIDER.node_id, "busy", told))
    bench.feed(QuoteRefused(RIVAL.node_id, "busy", NOW + 2 * MAX_WAIT_MS))
    bench.time_out()
    assert isinstance(bench.error, NoBids)
    assert bench.error.retry_at == believed


def test_who_says_late_that_it_is_busy_is_believed_too() -> None:
    bench = ConsumerBench(ROBUST)
    bench.feed(Start())
    bench.feed(QuotesAsked(frozenset({PROVIDER.node_id})))
    assert one(bench.time_out(), Broadcast)
    assert bench.feed(QuoteRefused(PROVIDER.node_id, "busy", bench.now + 500)) == []
    told = bench.now + 500
    bench.time_out()
    assert isinstance(bench.error, NoBids)
    assert bench.error.retry_at == told


def test_whom_we_have_no_stream_for_is_not_blamed() -> None:
    bench = ConsumerBench(ROBUST).reach(State.AWARDED)
    bench.feed(StreamEnded("too many streams", is_crowded=True))
    told = bench.now + RETRY_MS
    bench.time_out()
    assert isinstance(bench.error, NoBids)
    assert bench.error.retry_at == told
    assert bench.job._current.passed[0] == PassedOver(PROVIDER.node_id, Passing.DECLINED)


def test_whose_asks_are_full_may_have_room_later() -> None:
    bench = ConsumerBench(ROBUST)
    bench.feed(Start())
    bench.feed(QuotesAsked(frozenset(), NOW + 1_000))
    bench.time_out()
    assert isinstance(bench.error, NoBids)
    assert bench.error.retry_at == NOW + 1_000
    assert bench.error.message == "no provider of this model has a free slot"


def test_who_is_busy_when_it_is_awarded_says_until_when() -> None:
    bench = ConsumerBench(ROBUST)
    ask = one(bench.feed(Start()), AskForQuotes)
    bench.feed(QuotesAsked(frozenset()))
    bench.feed(BidArrived(make_bid(ask.offer, PROVIDER)))
    bench.time_out()
    assert bench.job.state is State.AWARDED
    bench.receive(Abort(bench.job.job_id, AbortCode.BUSY, "all slots are taken", bench.now + 800))
    assert isinstance(bench.error, NoBids)
    assert bench.error.retry_at == bench.now + 800


def test_who_is_to_be_avoided_has_no_chance() -> None:
    bench = ConsumerBench(replace(ROBUST, avoid=frozenset({PROVIDER.node_id})))
    ask = one(bench.feed(Start()), AskForQuotes)
    assert ask.exclude == {PROVIDER.node_id}
    bench.feed(QuotesAsked(frozenset()))
    assert bench.feed(BidArrived(make_bid(ask.offer, PROVIDER))) == []
    bench.feed(BidArrived(make_bid(ask.offer, RIVAL)))
    assert one(bench.time_out(), Chosen).provider == RIVAL.node_id


def test_who_quotes_and_does_not_answer_its_award_spoils_nothing() -> None:
    bench = ConsumerBench(ROBUST)
    ask = one(bench.feed(Start()), AskForQuotes)
    bench.feed(QuotesAsked(frozenset({PROVIDER.node_id, RIVAL.node_id})))
    for key in (PROVIDER, RIVAL):
        bench.feed(BidArrived(make_bid(ask.offer, key, lifetime_ms=LEASE_MS)))
    assert bench.job.state is State.AWARDED
    # By then the other quote has expired: a new round, without who was silent.
    effects = bench.time_out()
    again = one(effects, AskForQuotes)
    assert again.exclude == {PROVIDER.node_id}
    assert again.offer != ask.offer
    bench.feed(QuotesAsked(frozenset({RIVAL.node_id})))
    bench.feed(BidArrived(make_bid(again.offer, RIVAL, now=bench.now)))
    bench.now += SEEK_MS
    bench.feed(StreamEnded("gone"))
    # Not for ever.
    assert of(bench.effects, AskForQuotes) == [ask, again]
    assert isinstance(bench.error, NoBids)


def test_a_quote_that_does_not_meet_the_offer_is_no_quote() -> None:
    bench = ConsumerBench(ROBUST)
    ask = one(bench.feed(Start()), AskForQuotes)
    bench.feed(QuotesAsked(frozenset({PROVIDER.node_id})))
    assert one(bench.feed(BidArrived(make_bid(ask.offer, PROVIDER, latency_ms=5_001))), Broadcast)


def test_answers_of_others_change_nothing() -> None:
    bench = ConsumerBench(ROBUST)
    bench.feed(Start())
    bench.feed(QuotesAsked(frozenset({PROVIDER.node_id})))
    assert bench.feed(QuoteRefused(STRANGER.node_id, "no")) == []
    bench.feed(QuoteRefused(PROVIDER.node_id, "no"))
    assert bench.feed(QuoteRefused(PROVIDER.node_id, "no")) == []
    assert bench.feed(QuotesAsked(frozenset())) == []


def test_an_abort_of_the_second_is_told_with_all_tokens() -> None:
    bench = ConsumerBench(replace(ROBUST, max_providers=2)).reach(State.STREAMING)
    bench.part(0, (1, 2), "ab")
    bench.feed(StreamEnded("gone"))
    bench.peer = Sealer(RIVAL, NETWORK)
    bench.accept()
    bench.part(2, (3,), "c")
    bench.receive(abort(bench.job, AbortCode.EXECUTOR_FAILED, "out of memory"))
    error = bench.error
    assert isinstance(error, ProviderFault)
    assert (error.provider, error.tokens) == (RIVAL.node_id, 3)
    owed = {payment.peer: payment.amount for payment in bench.payments.values()}
    assert owed == {
        PROVIDER.node_id: INPUT_PRICE * INPUT_TOKENS + 2 * CHEAP_TOKEN,
        RIVAL.node_id: INPUT_PRICE * (INPUT_TOKENS + 2) + DEAR_TOKEN,
    }


def test_who_revealed_in_vain_takes_its_share_of_anothers_receipt() -> None:
    bench = ProviderBench().reach(State.REVEALED)
    others = bench.receipt(proof_digest=bytes(32), shares=(bench.share(2),))
    statement = read_statement(others.data, PROVIDER.node_id, network=NETWORK)
    change = settle(statement, bench.last, None, bench.now)
    assert change is not None
    (record,), payment = change
    assert (record.state, record.price) == (State.CANCELLED, payment.amount)
    assert payment.amount == bench.share(2).price
    # Its own would have to be for all of it.
    own = bench.receipt(shares=(bench.share(2),))
    statement = read_statement(own.data, PROVIDER.node_id, network=NETWORK)
    with pytest.raises(MessageRefused):
        settle(statement, bench.last, None, bench.now)
