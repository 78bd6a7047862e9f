"""The market's checks by their reasons, and what a node remembers of offers, bids and senders."""

from __future__ import annotations

from typing import Any

import pytest

from aci_p2p.protocol import market, replay
from aci_p2p.protocol.commitments import derive_job_id
from aci_p2p.protocol.envelope import MAX_SKEW_MS, Envelope, Header, Sealer
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.market import MAX_BID_WINDOW_MS, MarketView
from aci_p2p.protocol.messages import MAX_BIDS, Bid, Kind, Offer
from aci_p2p.protocol.replay import MAX_PER_SENDER, ReplayGuard
from aci_p2p.protocol.terms import Verification
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason, Validation
from tests.protocol.driver import CONSUMER, NETWORK, NOW, PRICES, PROVIDER, RIVAL, STRANGER, alter

MODEL = bytes(32)
"""Whose topic all is about."""


@pytest.fixture
def view() -> MarketView:
    return MarketView(NETWORK)


class Maker:
    """Signs offers and bids as one node."""

    def __init__(self, key: KeyPair = CONSUMER) -> None:
        self.sealer = Sealer(key, NETWORK)

    def offer(self, nonce: int = 0, *, now: int = NOW, lifetime_ms: int = 60_000, **changes: object) -> Envelope[Offer]:
        commitments = bytes(32), nonce.to_bytes(32, "big")
        body = Offer(
            job_id=derive_job_id(self.sealer.node_id, *commitments),
            model_root=MODEL,
            input_commitment=commitments[0],
            nonce_commitment=commitments[1],
            input_bytes=10,
            input_turns=1,
            max_tokens=10,
            temperature_milli=0,
            max_price=10,
            max_latency_ms=10,
            bid_deadline=now + 2_000,
            verification=Verification.OPTIMISTIC,
            priority_fee=0,
        )
        return self.sealer.seal(alter(body, **changes), now, lifetime_ms=lifetime_ms)

    def bid(
        self, offer: Envelope[Offer], *, now: int = NOW, lifetime_ms: int = 60_000, **changes: object
    ) -> Envelope[Bid]:
        body = Bid(
            job_id=offer.body.job_id, offer_digest=offer.digest, model_root=offer.body.model_root, **PRICES,
            latency_ms=1, addresses=(),
            quantisation="none", region="",
        )  # fmt: skip
        return self.sealer.seal(alter(body, **changes), now, lifetime_ms=lifetime_ms)


def forge(envelope: Envelope[Any]) -> bytes:
    return envelope.data[:-1] + bytes([envelope.data[-1] ^ 1])


def refuse_offer(view: MarketView, data: bytes, decision: Decision, reason: Reason, now: int = NOW) -> None:
    with pytest.raises(MessageRefused) as caught:
        view.check_offer(MODEL, data, now)
    assert caught.value.validation == Validation(decision, reason)


def refuse_bid(view: MarketView, data: bytes, decision: Decision, reason: Reason, now: int = NOW) -> None:
    with pytest.raises(MessageRefused) as caught:
        view.check_bid(MODEL, data, now)
    assert caught.value.validation == Validation(decision, reason)


def test_messages_of_another_models_topic(view: MarketView) -> None:
    """They leave nothing behind: on their own topic they are new."""
    offer, other = Maker().offer(), bytes([1]) * 32
    bid = Maker(PROVIDER).bid(offer)
    for check, data in ((view.check_offer, offer.data), (view.check_bid, bid.data)):
        with pytest.raises(MessageRefused) as caught:
            check(other, data, NOW)
        assert caught.value.validation == Validation(Decision.REJECT, Reason.WRONG_MODEL)
    assert view.check_offer(MODEL, offer.data, NOW) == offer
    assert view.check_bid(MODEL, bid.data, NOW) == bid


def test_a_bid_for_another_model_than_was_asked_for(view: MarketView) -> None:
    offer, other = Maker().offer(), bytes([1]) * 32
    view.check_offer(MODEL, offer.data, NOW)
    with pytest.raises(MessageRefused) as caught:
        view.check_bid(other, Maker(PROVIDER).bid(offer, model_root=other).data, NOW)
    assert caught.value.validation == Validation(Decision.IGNORE, Reason.WRONG_MODEL)


# Offers.


def test_an_offer_is_remembered(view: MarketView) -> None:
    offer = Maker().offer()
    assert view.offer(offer.body.job_id) is None
    assert view.check_offer(MODEL, offer.data, NOW) == offer
    assert view.offer(offer.body.job_id) == offer


def test_an_offer_seen_before(view: MarketView) -> None:
    offer = Maker().offer()
    view.check_offer(MODEL, offer.data, NOW)
    refuse_offer(view, offer.data, Decision.IGNORE, Reason.REPLAYED)


def test_a_second_offer_for_a_job(view: MarketView) -> None:
    maker = Maker()
    first, second = maker.offer(), maker.offer(max_price=11)
    view.check_offer(MODEL, second.data, NOW)
    # The older one comes behind it, or again.
    refuse_offer(view, first.data, Decision.IGNORE, Reason.REPLAYED)
    assert view.offer(first.body.job_id) == second
    third = maker.offer(max_price=12)
    view.check_offer(MODEL, third.data, NOW)
    # Bids are for the terms that they name.
    assert view.offer(first.body.job_id) == third
    assert len(view) == 1


@pytest.mark.parametrize("change", ["job_id", "input_commitment", "nonce_commitment"])
def test_a_job_id_that_does_not_follow(view: MarketView, change: str) -> None:
    changes: dict[str, Any] = {change: b"\xff" * 32}
    offer = Maker().offer(**changes)
    refuse_offer(view, offer.data, Decision.REJECT, Reason.BAD_JOB_ID)
    assert view.offer(offer.body.job_id) is None


def test_a_job_of_another_consumer(view: MarketView) -> None:
    body = Maker().offer().body
    stolen = Sealer(STRANGER, NETWORK).seal(body, NOW)
    refuse_offer(view, stolen.data, Decision.REJECT, Reason.BAD_JOB_ID)


@pytest.mark.parametrize("change", ["max_tokens", "input_turns"])
def test_an_offer_that_asks_for_nothing(view: MarketView, change: str) -> None:
    refuse_offer(view, Maker().offer(**{change: 0}).data, Decision.REJECT, Reason.MALFORMED)
    assert view.check_offer(MODEL, Maker().offer(1, **{change: 1}).data, NOW)


@pytest.mark.parametrize("window", [0, -1, MAX_BID_WINDOW_MS + 1])
def test_a_bid_window_that_is_none_or_too_long(view: MarketView, window: int) -> None:
    assert MAX_BID_WINDOW_MS == 10_000
    refuse_offer(view, Maker().offer(bid_deadline=NOW + window).data, Decision.REJECT, Reason.BAD_DEADLINE)


def test_a_bid_window_beyond_the_offers_life(view: MarketView) -> None:
    late = Maker().offer(lifetime_ms=1_999)
    refuse_offer(view, late.data, Decision.REJECT, Reason.BAD_DEADLINE)


def test_bid_windows_at_their_edges(view: MarketView) -> None:
    maker = Maker()
    assert view.check_offer(MODEL, maker.offer(1, bid_deadline=NOW + 1).data, NOW)
    assert view.check_offer(MODEL, maker.offer(2, bid_deadline=NOW + MAX_BID_WINDOW_MS).data, NOW)
    assert view.check_offer(MODEL, maker.offer(3, lifetime_ms=2_000).data, NOW)


def test_offers_pass_the_checks_of_every_envelope(view: MarketView) -> None:
    maker = Maker()
    offer = maker.offer()
    refuse_offer(view, forge(offer), Decision.REJECT, Reason.BAD_SIGNATURE)
    refuse_offer(view, offer.data, Decision.IGNORE, Reason.EXPIRED, NOW + 60_000)
    refuse_offer(view, offer.data, Decision.IGNORE, Reason.FROM_FUTURE, NOW - MAX_SKEW_MS - 1)
    refuse_offer(view, maker.bid(offer).data, Decision.REJECT, Reason.WRONG_KIND)
    refuse_offer(MarketView("aci-main"), offer.data, Decision.REJECT, Reason.WRONG_NETWORK)
    refuse_offer(view, b"\xff" * 1_025, Decision.REJECT, Reason.TOO_LARGE)


def test_a_refused_offer_leaves_nothing_behind(view: MarketView) -> None:
    """Neither a forgery nor a bad offer keeps the honest one out, whose sequence number it used."""
    good = Maker().offer()
    refuse_offer(view, forge(good), Decision.REJECT, Reason.BAD_SIGNATURE)
    refuse_offer(view, Maker().offer(max_tokens=0).data, Decision.REJECT, Reason.MALFORMED)
    assert view.check_offer(MODEL, good.data, NOW) == good


def test_expired_offers_are_forgotten(view: MarketView) -> None:
    maker = Maker()
    offers = [maker.offer(number, lifetime_ms=2_000 + number) for number in range(3)]
    for offer in offers:
        view.check_offer(MODEL, offer.data, NOW)
    view.check_offer(MODEL, maker.offer(9, now=NOW + 2_001).data, NOW + 2_001)
    assert [view.offer(offer.body.job_id) for offer in offers] == [None, None, offers[2]]


def test_offers_are_bounded(view: MarketView, monkeypatch: pytest.MonkeyPatch) -> None:
    assert market.MAX_OFFERS == 4_096
    monkeypatch.setattr(market, "MAX_OFFERS", 3)
    maker = Maker()
    offers = [maker.offer(number) for number in range(5)]
    for offer in offers:
        view.check_offer(MODEL, offer.data, NOW)
        assert len(view._known) <= 3
    assert [bool(view.offer(offer.body.job_id)) for offer in offers] == [False, False, True, True, True]


# Bids.


def test_a_bid_for_a_known_offer(view: MarketView) -> None:
    offer = Maker().offer()
    view.check_offer(MODEL, offer.data, NOW)
    bid = Maker(PROVIDER).bid(offer)
    assert view.check_bid(MODEL, bid.data, NOW) == bid
    refuse_bid(view, bid.data, Decision.IGNORE, Reason.REPLAYED)


def test_a_bid_before_its_offer(view: MarketView) -> None:
    bid = Maker(PROVIDER).bid(Maker().offer())
    assert view.check_bid(MODEL, bid.data, NOW) == bid
    refuse_bid(view, bid.data, Decision.IGNORE, Reason.REPLAYED)


def test_a_bid_for_other_terms(view: MarketView) -> None:
    offer = Maker().offer()
    view.check_offer(MODEL, offer.data, NOW)
    bid = Maker(PROVIDER).bid(offer, offer_digest=bytes(32))
    refuse_bid(view, bid.data, Decision.IGNORE, Reason.WRONG_JOB)


def test_a_second_bid_of_a_provider(view: MarketView) -> None:
    offer = Maker().offer()
    view.check_offer(MODEL, offer.data, NOW)
    provider = Maker(PROVIDER)
    view.check_bid(MODEL, provider.bid(offer).data, NOW)
    refuse_bid(view, provider.bid(offer, latency_ms=2).data, Decision.IGNORE, Reason.DUPLICATE_BID)
    assert view.check_bid(MODEL, Maker(RIVAL).bid(offer).data, NOW)


def test_bids_are_bounded(view: MarketView) -> None:
    offer = Maker().offer()
    view.check_offer(MODEL, offer.data, NOW)
    for number in range(MAX_BIDS):
        view.check_bid(MODEL, Maker(KeyPair(bytes([100 + number]) * 32)).bid(offer).data, NOW)
    refuse_bid(view, Maker(PROVIDER).bid(offer).data, Decision.IGNORE, Reason.TOO_MANY_BIDS)


def test_a_late_bid(view: MarketView) -> None:
    offer = Maker().offer()
    view.check_offer(MODEL, offer.data, NOW)
    last = offer.body.bid_deadline + MAX_SKEW_MS
    late = Maker(PROVIDER).bid(offer, now=last + 1)
    refuse_bid(view, late.data, Decision.IGNORE, Reason.EXPIRED, last + 1)
    assert view.check_bid(MODEL, Maker(PROVIDER).bid(offer, now=last).data, last)


def test_bids_pass_the_checks_of_every_envelope(view: MarketView) -> None:
    offer = Maker().offer()
    bid = Maker(PROVIDER).bid(offer)
    refuse_bid(view, forge(bid), Decision.REJECT, Reason.BAD_SIGNATURE)
    refuse_bid(view, bid.data, Decision.IGNORE, Reason.EXPIRED, NOW + 60_000)
    refuse_bid(view, bid.data, Decision.IGNORE, Reason.FROM_FUTURE, NOW - MAX_SKEW_MS - 1)
    refuse_bid(view, offer.data, Decision.REJECT, Reason.WRONG_KIND)
    refuse_bid(MarketView("aci-main"), bid.data, Decision.REJECT, Reason.WRONG_NETWORK)


def test_a_refused_bid_leaves_nothing_behind(view: MarketView) -> None:
    offer = Maker().offer()
    view.check_offer(MODEL, offer.data, NOW)
    good = Maker(PROVIDER).bid(offer)
    refuse_bid(view, forge(good), Decision.REJECT, Reason.BAD_SIGNATURE)
    refuse_bid(view, Maker(PROVIDER).bid(offer, offer_digest=bytes(32)).data, Decision.IGNORE, Reason.WRONG_JOB)
    assert view.check_bid(MODEL, good.data, NOW) == good


# Floods.


def test_a_flood_of_offers_costs_only_its_sender(view: MarketView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_PER_SENDER", 4)
    flooder = Maker(STRANGER)
    for number in range(4):
        view.check_offer(MODEL, flooder.offer(number).data, NOW)
    refuse_offer(view, flooder.offer(4).data, Decision.IGNORE, Reason.FLOODED)
    # Each topic has its own limit: an honest node may offer and bid, and for several models.
    assert view.check_bid(MODEL, flooder.bid(Maker().offer()).data, NOW)
    other = bytes([1]) * 32
    assert view.check_offer(other, flooder.offer(6, model_root=other).data, NOW)
    assert view.check_offer(MODEL, Maker().offer().data, NOW)
    # When its messages have expired it may go on.
    assert view.check_offer(MODEL, flooder.offer(5, now=NOW + 60_000).data, NOW + 60_000)


def test_forgeries_do_not_count_against_whom_they_name(view: MarketView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_PER_SENDER", 2)
    maker = Maker()
    for number in range(5):
        refuse_offer(view, forge(maker.offer(number)), Decision.REJECT, Reason.BAD_SIGNATURE)
    assert view.check_offer(MODEL, maker.offer(9).data, NOW)


def header(sender: int, sequence: int, expires_at: int = NOW + 1_000) -> Header:
    node = KeyPair(bytes([sender]) * 32).node_id
    return Header(1, Kind.BID, NETWORK, node, sequence, NOW, expires_at, b"\0", bytes(64))


def refused(guard: ReplayGuard, message: Header, now: int = NOW) -> Validation | None:
    try:
        guard.check(MODEL, message, now)
    except MessageRefused as error:
        return error.validation
    return None


REPLAYED = Validation(Decision.IGNORE, Reason.REPLAYED)
FLOODED = Validation(Decision.IGNORE, Reason.FLOODED)


def test_the_guard_checks_without_remembering() -> None:
    guard = ReplayGuard()
    assert refused(guard, header(1, 1)) is None
    assert refused(guard, header(1, 1)) is None
    guard.remember(MODEL, header(1, 1))
    assert refused(guard, header(1, 1)) == REPLAYED
    assert refused(guard, header(1, 2)) is None
    assert refused(guard, header(2, 1)) is None
    assert len(guard) == 1
    guard.remember(MODEL, header(1, 1))
    assert len(guard) == 1


def test_the_guard_bounds_each_sender() -> None:
    assert MAX_PER_SENDER == 512
    guard = ReplayGuard()
    for sequence in range(MAX_PER_SENDER):
        assert refused(guard, header(1, sequence)) is None
        guard.remember(MODEL, header(1, sequence, NOW + 1_000 + sequence))
    assert refused(guard, header(1, MAX_PER_SENDER)) == FLOODED
    assert refused(guard, header(2, 0)) is None
    # A message is remembered until it expires, and not longer.
    assert refused(guard, header(1, MAX_PER_SENDER), NOW + 999) == FLOODED
    assert refused(guard, header(1, MAX_PER_SENDER), NOW + 1_000) is None
    assert len(guard) == MAX_PER_SENDER - 1
    assert refused(guard, header(1, 0)) is None
    assert refused(guard, header(1, 1)) == REPLAYED


def test_the_guard_bounds_all_senders(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replay.MAX_REMEMBERED == 65_536
    monkeypatch.setattr(replay, "MAX_REMEMBERED", 6)
    guard = ReplayGuard()
    for sender in (1, 2, 3):
        for sequence in (1, 2):
            guard.remember(MODEL, header(sender, sequence))
    assert len(guard) == 6
    guard.remember(MODEL, header(1, 3))
    # The sender heard least recently is forgotten, with all its messages.
    assert len(guard) == 5
    assert [refused(guard, header(sender, 1)) for sender in (1, 2, 3)] == [REPLAYED, None, REPLAYED]
    guard.remember(MODEL, header(1, 4))
    assert len(guard) == 6
    guard.remember(MODEL, header(4, 1))
    assert len(guard) == 5
    assert [refused(guard, header(sender, 1)) for sender in (1, 3, 4)] == [REPLAYED, None, REPLAYED]
