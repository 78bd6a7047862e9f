"""A provider's bids and awards."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aci_p2p.protocol import bidding
from aci_p2p.protocol.admission import LEASE_MS, RETRY_MS
from aci_p2p.protocol.bidding import BID_LIFETIME_MS, FIRST_LATENCY_MS, WON_MS, BidBook, Declined, Offering, Won
from aci_p2p.protocol.commitments import derive_job_id
from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.messages import Abort, AbortCode, Award, Bid, Offer
from aci_p2p.protocol.publications import MAX_LATENCY_MS, PriceStep
from aci_p2p.protocol.terms import Verification
from aci_p2p.protocol.validation import MessageRefused, Reason

NOW = 1_750_000_000_000
ROOT = bytes([1]) * 32
CONSUMER = Sealer(KeyPair(bytes([2]) * 32), "aci-test")
PROVIDER = Sealer(KeyPair(bytes([3]) * 32), "aci-test")
STRANGER = Sealer(KeyPair(bytes([4]) * 32), "aci-test")
OFFERING = Offering("model", ROOT, context=100, input_token_price=1, output_token_price=4)


def offer(number: int = 1, *, root: bytes = ROOT, max_tokens: int = 10, at: int = 0) -> Envelope[Offer]:
    body = Offer(
        job_id=derive_job_id(CONSUMER.node_id, bytes([number]) * 32, bytes(32)), model_root=root,
        input_commitment=bytes([number]) * 32, nonce_commitment=bytes(32),
        input_bytes=10, input_turns=1, max_tokens=max_tokens, temperature_milli=0, max_price=10**6,
        max_latency_ms=1_000, bid_deadline=NOW + at + 1_000, verification=Verification.OPTIMISTIC, priority_fee=0,
    )  # fmt: skip
    return CONSUMER.seal(body, NOW + at)


def award(bid: Envelope[Bid], *, by: Sealer = CONSUMER, now: int = NOW) -> bytes:
    return by.seal(Award(bid.body.job_id, bid.digest, 0), now).data


@pytest.fixture
def book() -> BidBook:
    return BidBook(PROVIDER, (OFFERING,), slots=2)


def test_a_bid_says_what_it_is_computed_with_and_where() -> None:
    book = BidBook(PROVIDER, (replace(OFFERING, quantisation="q4_0", region="eu-west"),), slots=2)
    made = book.bid(offer(), NOW, addresses=())
    assert made is not None
    assert (made.body.quantisation, made.body.region) == ("q4_0", "eu-west")


def bid(book: BidBook, number: int = 1) -> Envelope[Bid]:
    made = book.bid(offer(number), NOW, addresses=("/memory/1",))
    assert made is not None
    return made


def test_a_bid_names_the_price_of_its_model(book: BidBook) -> None:
    made = bid(book)
    assert (made.body.input_token_price, made.body.output_token_price) == (1, 4)
    assert made.body.latency_ms == FIRST_LATENCY_MS
    assert made.body.addresses == ("/memory/1",)
    assert made.header.expires_at == NOW + BID_LIFETIME_MS


@pytest.mark.parametrize(
    "offered", [offer(root=bytes(32)), offer(max_tokens=100)], ids=["other model", "longer than the context"]
)
def test_no_bid(book: BidBook, offered: Envelope[Offer]) -> None:
    assert book.bid(offered, NOW, addresses=()) is None
    assert isinstance(quote(book, offered), Declined)
    assert not len(book)


def quote(book: BidBook, offered: Envelope[Offer], now: int = NOW, peer: NodeId = CONSUMER.node_id) -> Won | Declined:
    return book.quote(offered.data, peer, now, addresses=())


def quoted(book: BidBook, number: int, now: int = NOW) -> Envelope[Bid]:
    found = quote(book, offer(number), now)
    assert isinstance(found, Won)
    return found.bid


def test_who_asks_for_a_quote_asks_for_itself(book: BidBook) -> None:
    with pytest.raises(MessageRefused) as caught:
        quote(book, offer(1), peer=STRANGER.node_id)
    assert caught.value.validation.reason is Reason.WRONG_SENDER


def test_a_quote_for_a_stolen_job_is_refused(book: BidBook) -> None:
    stolen = CONSUMER.seal(replace(offer(1).body, job_id=bytes(32)), NOW)
    with pytest.raises(MessageRefused) as caught:
        quote(book, stolen)
    assert caught.value.validation.reason is Reason.BAD_JOB_ID


def test_a_quote_that_nobody_wants_frees_its_slot(book: BidBook) -> None:
    found = quote(book, offer(1))
    assert isinstance(found, Won)
    assert found.bid.header.expires_at == NOW + LEASE_MS
    book.take_back(found)
    assert (book.admission.running, book.admission.reserved, len(book)) == (0, 0, 0)
    assert isinstance(book.take(award(found.bid), NOW), Declined)


def won(book: BidBook, number: int) -> Won:
    """A job that runs."""
    taken = book.take(award(bid(book, number)), NOW)
    assert isinstance(taken, Won)
    return taken


def test_no_bid_without_a_slot(book: BidBook) -> None:
    first, _ = won(book, 1), won(book, 2)
    assert book.admission.running == 2
    assert book.bid(offer(3), NOW, addresses=()) is None
    book.release(first)
    book.release(first)
    assert book.admission.running == 1
    bid(book, 3)


def test_an_award_is_good_once(book: BidBook) -> None:
    frame = award(bid(book))
    taken = book.take(frame, NOW)
    assert isinstance(taken, Won)
    assert (taken.bid.body.job_id, taken.model) == (taken.offer.body.job_id, "model")
    again = book.take(frame, NOW)
    assert isinstance(again, Declined)
    assert again.answer.abort is AbortCode.TIMEOUT


def test_a_stranger_cannot_use_up_a_bid(book: BidBook) -> None:
    made = bid(book)
    with pytest.raises(MessageRefused) as caught:
        book.take(award(made, by=STRANGER), NOW)
    assert caught.value.validation.reason is Reason.WRONG_SENDER
    assert isinstance(book.take(award(made), NOW), Won)


def test_an_award_without_a_slot_is_declined(book: BidBook) -> None:
    """A bid that was broadcast keeps none; the answer says when there may be one."""
    frame = award(bid(book))
    won(book, 2)
    won(book, 3)
    taken = book.take(frame, NOW)
    assert isinstance(taken, Declined)
    assert (taken.answer.abort, taken.answer.retry_at) == (AbortCode.BUSY, NOW + RETRY_MS)


def test_a_quote_keeps_a_slot(book: BidBook) -> None:
    quotes = [quoted(book, number) for number in (1, 2)]
    assert book.admission.reserved == 2
    third = quote(book, offer(3), NOW + 1)
    assert isinstance(third, Declined)
    assert (third.answer.abort, third.answer.retry_at) == (AbortCode.BUSY, NOW + LEASE_MS)
    for one in quotes:
        assert isinstance(book.take(award(one), NOW + LEASE_MS - 1), Won)
    assert (book.admission.running, book.admission.reserved) == (2, 0)


@pytest.mark.parametrize("first", [0, 1])
def test_a_quote_that_came_late_does_not_stand_in_the_way_of_our_bid(book: BidBook, first: int) -> None:
    late, _ = quoted(book, 1), quoted(book, 2)
    assert book.bid(offer(3), NOW, addresses=()) is None
    bid = book.bid(offer(1), NOW, addresses=())
    assert bid is not None
    # Whichever its consumer heard first is firm, and then the other one is void.
    heard = [late, bid]
    taken = book.take(award(heard[first]), NOW)
    assert isinstance(taken, Won)
    assert isinstance(book.take(award(heard[1 - first]), NOW), Declined)
    assert (book.admission.running, book.admission.reserved, len(book)) == (1, 1, 1)
    book.release(taken)
    assert book.admission.running == 0


def test_a_job_is_won_once(book: BidBook) -> None:
    won = book.take(award(quoted(book, 1)), NOW)
    assert isinstance(won, Won)
    assert book.bid(offer(1), NOW, addresses=()) is None
    assert isinstance(quote(book, offer(1)), Declined)
    book.release(won)
    assert book.bid(offer(1), NOW, addresses=()) is None
    assert book.bid(offer(2), NOW, addresses=()) is not None
    # Later its record tells that it was served.
    assert book.bid(offer(1, at=WON_MS - 1), NOW + WON_MS - 1, addresses=()) is None
    assert book.bid(offer(1, at=WON_MS), NOW + WON_MS, addresses=()) is not None


def test_what_was_served_before_is_refused(book: BidBook) -> None:
    won = book.take(award(quoted(book, 1)), NOW)
    assert isinstance(won, Won)
    assert book.confirm(won, is_on_record=False) is won
    assert book.admission.running == 1
    refused = book.confirm(won, is_on_record=True)
    assert isinstance(refused, Declined)
    assert refused.answer.abort is AbortCode.PROTOCOL
    assert book.admission.running == 0


@pytest.mark.parametrize("reason", ["draining", "is_suspended"])
def test_what_was_won_is_refused_when_none_is_taken_any_more(book: BidBook, reason: str) -> None:
    won = book.take(award(quoted(book, 1)), NOW)
    assert isinstance(won, Won)
    setattr(book, reason, True)
    refused = book.confirm(won, is_on_record=False)
    assert isinstance(refused, Declined)
    assert refused.answer.abort is AbortCode.BUSY
    assert book.admission.running == 0


def test_what_was_won_can_be_refused(book: BidBook) -> None:
    won = book.take(award(quoted(book, 1)), NOW)
    assert isinstance(won, Won)
    refused = book.refuse(won, AbortCode.PROTOCOL, "no")
    assert refused.answer == Abort(won.offer.body.job_id, AbortCode.PROTOCOL, "no")
    assert book.admission.running == 0


def test_what_was_declined_may_be_bid_for_again(book: BidBook) -> None:
    bid = book.bid(offer(1), NOW, addresses=())
    assert bid is not None
    running = [book.take(award(quoted(book, number)), NOW) for number in (2, 3)]
    assert isinstance(book.take(award(bid), NOW), Declined)
    for won in running:
        assert isinstance(won, Won)
        book.release(won)
    assert book.bid(offer(1), NOW + RETRY_MS, addresses=()) is not None


def test_few_of_the_jobs_that_were_won_are_remembered(book: BidBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bidding, "MOST_WON", 1)
    for number in (1, 2):
        won = book.take(award(quoted(book, number)), NOW)
        assert isinstance(won, Won)
        book.release(won)
    assert book.bid(offer(1), NOW, addresses=()) is not None
    assert book.bid(offer(2), NOW, addresses=()) is None


def test_a_late_award_takes_a_slot_if_there_is_one(book: BidBook) -> None:
    assert isinstance(book.take(award(quoted(book, 1)), NOW + LEASE_MS), Won)
    assert (book.admission.running, book.admission.reserved) == (1, 0)
    late = quoted(book, 2, NOW + LEASE_MS)
    book.offer((OFFERING,), slots=1)
    taken = book.take(award(late), NOW + 2 * LEASE_MS)
    assert isinstance(taken, Declined)
    assert taken.answer.abort is AbortCode.BUSY


def test_who_cannot_store_neither_bids_nor_takes(book: BidBook) -> None:
    one = quoted(book, 1)
    book.is_suspended = True
    assert book.bid(offer(2), NOW, addresses=()) is None
    taken = book.take(award(one), NOW)
    assert isinstance(taken, Declined)
    assert taken.answer.abort is AbortCode.BUSY
    assert book.admission.reserved == 0
    book.is_suspended = False
    bid(book, 2)


def test_who_stops_neither_bids_nor_takes(book: BidBook) -> None:
    frame = award(bid(book))
    book.draining = True
    assert book.bid(offer(2), NOW, addresses=()) is None
    taken = book.take(frame, NOW)
    assert isinstance(taken, Declined)
    assert taken.answer.abort is AbortCode.BUSY


def test_a_withdrawn_model_takes_its_bids_along(book: BidBook) -> None:
    frame = award(bid(book))
    assert book.withdraw(ROOT) == OFFERING
    assert book.withdraw(ROOT) is None
    assert isinstance(book.take(frame, NOW), Declined)
    assert book.bid(offer(2), NOW, addresses=()) is None


def test_other_prices_leave_bids_firm(book: BidBook) -> None:
    made = bid(book)
    book.offer((Offering("model", ROOT, 100, 2, 8),), slots=1)
    taken = book.take(award(made), NOW)
    assert isinstance(taken, Won)
    assert taken.bid.body.output_token_price == 4
    book.release(taken)
    assert bid(book, 2).body.output_token_price == 8
    assert book.slots == 1


def test_a_bid_s_price_follows_the_load(book: BidBook) -> None:
    """One of two slots is taken; rounded up."""
    book.offer((replace(OFFERING, input_token_price=3, price_curve=(PriceStep(500, 1_500),)),), slots=2)
    idle = bid(book, 1)
    won(book, 2)
    loaded = bid(book, 3)
    assert (idle.body.input_token_price, idle.body.output_token_price) == (3, 4)
    assert (loaded.body.input_token_price, loaded.body.output_token_price) == (5, 6)


def test_expired_bids_are_forgotten(book: BidBook) -> None:
    bid(book)
    later = NOW + BID_LIFETIME_MS
    fresh = CONSUMER.seal(offer(2).body, later)
    assert book.bid(fresh, later, addresses=()) is not None
    assert len(book) == 1


def test_outstanding_bids_are_bounded(book: BidBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bidding, "MAX_OUTSTANDING", 3)
    for number in range(1, 6):
        bid(book, number)
    assert len(book) == 3


def test_quotes_are_forgotten_with_their_leases_and_push_out_no_bid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bidding, "MAX_OUTSTANDING", 3)
    book = BidBook(PROVIDER, (OFFERING,), slots=5)
    firm = bid(book, 1)
    for number in range(2, 6):
        quoted(book, number)
    assert len(book) == 1 + 3
    quoted(book, 6, NOW + LEASE_MS)
    assert len(book) == 1 + 1
    assert isinstance(book.take(award(firm, now=NOW + LEASE_MS), NOW + LEASE_MS), Won)


def test_latency_follows_what_was_measured(book: BidBook) -> None:
    for _ in range(100):
        book.measured(100)
    assert abs(bid(book).body.latency_ms - 100) < 4
    for _ in range(200):
        book.measured(10**9)
    assert bid(book, 2).body.latency_ms <= MAX_LATENCY_MS


def test_one_consumer_cannot_use_up_our_bids(book: BidBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bidding, "MAX_PER_CONSUMER", 2)
    first = bid(book, 1)
    bid(book, 2)
    assert book.bid(offer(3), NOW, addresses=()) is None
    other = STRANGER.seal(offer(3).body, NOW)
    assert book.bid(other, NOW, addresses=()) is not None
    # One is awarded, or expires: there is room again.
    book.take(award(first), NOW)
    bid(book, 4)
    assert book.bid(offer(5), NOW, addresses=()) is None
    assert book.bid(offer(5), NOW + BID_LIFETIME_MS, addresses=()) is not None


def test_quotes_hold_slots_and_are_no_bids_to_use_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bidding, "MAX_PER_CONSUMER", 1)
    book = BidBook(PROVIDER, (OFFERING,), slots=4)
    first, second, third = (quoted(book, number) for number in (1, 2, 3))
    broadcast = bid(book, 4)
    assert book.bid(offer(5), NOW, addresses=()) is None
    # That a quote is over makes no room for what was broadcast.
    assert isinstance(book.take(award(first), NOW), Won)
    assert book.bid(offer(5), NOW, addresses=()) is None
    book.take(award(broadcast), NOW)
    for one in (second, third):
        assert isinstance(book.take(award(one), NOW), Won)


def test_a_consumer_is_told_why_its_job_is_not_taken(book: BidBook) -> None:
    def detail(offered: Envelope[Offer]) -> str:
        declined = quote(book, offered)
        assert isinstance(declined, Declined)
        assert declined.answer.abort is AbortCode.BUSY
        return declined.answer.detail

    assert detail(offer(1, max_tokens=100)) == "prompt and answer may take 100 tokens"
    won(book, 2)
    assert detail(offer(2)) == "the provider has this job"
    book.is_suspended = True
    assert detail(offer(3)) == "the provider cannot store jobs"
    book.draining = True
    assert detail(offer(3)) == "the provider is shutting down"
