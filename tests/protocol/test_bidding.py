"""A provider's bids and awards."""

from __future__ import annotations

import pytest

from aci_p2p.protocol import bidding
from aci_p2p.protocol.admission import LEASE_MS, RETRY_MS, Busy
from aci_p2p.protocol.bidding import BID_LIFETIME_MS, FIRST_LATENCY_MS, BidBook, Declined, Offering, Won
from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.messages import MAX_LATENCY_MS, AbortCode, Award, Bid, Offer
from aci_p2p.protocol.validation import MessageRefused, Reason

NOW = 1_750_000_000_000
ROOT = bytes([1]) * 32
CONSUMER = Sealer(KeyPair(bytes([2]) * 32), "aci-test")
PROVIDER = Sealer(KeyPair(bytes([3]) * 32), "aci-test")
STRANGER = Sealer(KeyPair(bytes([4]) * 32), "aci-test")
OFFERING = Offering("model", ROOT, context=100, input_token_price=1, output_token_price=4)


def offer(number: int = 1, *, root: bytes = ROOT, max_tokens: int = 10) -> Envelope[Offer]:
    body = Offer(
        job_id=bytes([number]) * 32, model_root=root, input_commitment=bytes(32), nonce_commitment=bytes(32),
        input_bytes=10, input_turns=1, max_tokens=max_tokens, temperature_milli=0, max_price=10**6,
        max_latency_ms=1_000, bid_deadline=NOW + 1_000,
    )  # fmt: skip
    return CONSUMER.seal(body, NOW)


def award(bid: Envelope[Bid], *, by: Sealer = CONSUMER, now: int = NOW) -> bytes:
    return by.seal(Award(bid.body.job_id, bid.digest), now).data


@pytest.fixture
def book() -> BidBook:
    return BidBook(PROVIDER, (OFFERING,), slots=2)


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
    assert book.quote(offered, NOW, addresses=()) is None
    assert not len(book)


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
    quotes = [book.quote(offer(number), NOW, addresses=()) for number in (1, 2)]
    assert book.admission.reserved == 2
    assert book.quote(offer(3), NOW + 1, addresses=()) == Busy(NOW + LEASE_MS, "all slots are taken")
    for quote in quotes:
        assert isinstance(quote, Envelope)
        taken = book.take(award(quote), NOW + LEASE_MS - 1)
        assert isinstance(taken, Won)
    assert (book.admission.running, book.admission.reserved) == (2, 0)


def test_a_quote_is_firm_for_longer_than_its_slot(book: BidBook) -> None:
    quote = book.quote(offer(1), NOW, addresses=())
    assert isinstance(quote, Envelope)
    assert isinstance(book.take(award(quote), NOW + LEASE_MS), Won)
    assert (book.admission.running, book.admission.reserved) == (1, 0)
    late = book.quote(offer(2), NOW + LEASE_MS, addresses=())
    assert isinstance(late, Envelope)
    book.offer((OFFERING,), slots=1)
    taken = book.take(award(late), NOW + 2 * LEASE_MS)
    assert isinstance(taken, Declined)
    assert taken.answer.abort is AbortCode.BUSY


def test_who_cannot_store_neither_bids_nor_takes(book: BidBook) -> None:
    quote = book.quote(offer(1), NOW, addresses=())
    assert isinstance(quote, Envelope)
    book.is_suspended = True
    assert book.bid(offer(2), NOW, addresses=()) is None
    taken = book.take(award(quote), NOW)
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
