"""The order book: which asks it holds, and which of them it finds best."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.protocol import orderbook
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.messages import Offer
from aci_p2p.protocol.orderbook import ASK_GAP_MS, SPREAD_MILLI, OrderBook
from aci_p2p.protocol.pricing import asked_prices, max_input_tokens
from aci_p2p.protocol.publications import Ask, PriceStep
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason, Validation
from tests.protocol.asking import ASK, ask_of, chance, sealer
from tests.protocol.driver import MODEL_ROOT, NETWORK, NOW, alter, make_offer

OFFER = replace(make_offer().body, max_price=10**12, max_latency_ms=1_000, max_tokens=100)
OTHER_ROOT = bytes([77]) * 32


@pytest.fixture
def book() -> OrderBook:
    return OrderBook(NETWORK)


def put(book: OrderBook, *asks: Envelope[Ask], at: int = 0) -> None:
    for ask in asks:
        book.check(ask.body.model_root, ask.data, NOW + at)


def refused(book: OrderBook, ask: Envelope[Ask], decision: Decision, reason: Reason, *, at: int = 0) -> None:
    with pytest.raises(MessageRefused) as caught:
        book.check(MODEL_ROOT, ask.data, NOW + at)
    assert caught.value.validation == Validation(decision, reason)


def best(
    book: OrderBook, k: int = 3, *, offer: Offer = OFFER, at: int = 0, exclude: tuple[int, ...] = (), seed: int = 1
) -> list[Envelope[Ask]]:
    providers = frozenset(sealer(number).node_id for number in exclude)
    return book.best(MODEL_ROOT, offer=offer, k=k, now=NOW + at, exclude=providers, random=chance(seed))


def cost(ask: Envelope[Ask], offer: Offer) -> int:
    inputs, outputs = asked_prices(ask.body)
    return inputs * max_input_tokens(offer) + outputs * offer.max_tokens


# What it holds.


def test_the_cheapest_come_first(book: OrderBook) -> None:
    dear, cheap, middle = (ask_of(number, output_token_price=price) for number, price in ((1, 90), (2, 10), (3, 50)))
    put(book, dear, cheap, middle)
    assert book.view(MODEL_ROOT, NOW) == [cheap, middle, dear]
    assert book.view(OTHER_ROOT, NOW) == []
    assert (len(book), book.providers(MODEL_ROOT, NOW), book.providers(OTHER_ROOT, NOW)) == (3, 3, 0)
    book.forget(MODEL_ROOT)
    assert (len(book), book.view(MODEL_ROOT, NOW)) == (0, [])


def test_an_ask_is_about_the_model_of_its_topic(book: OrderBook) -> None:
    refused(book, ask_of(1, model_root=OTHER_ROOT), Decision.REJECT, Reason.WRONG_MODEL)


@pytest.mark.parametrize(
    "changes",
    [
        {"free_slots": 5},
        {"price_curve": (PriceStep(500, 2_000), PriceStep(500, 3_000))},
        {"price_curve": (PriceStep(0, 2_000),)},
    ],
    ids=["more free slots than slots", "two prices for a load", "a price at no load"],
)
def test_what_makes_no_sense_is_refused(book: OrderBook, changes: dict[str, Any]) -> None:
    refused(book, ask_of(1, **changes), Decision.REJECT, Reason.MALFORMED)
    assert not len(book)


def test_other_networks_and_expired_ones_are_refused(book: OrderBook) -> None:
    refused(OrderBook("aci-other"), ask_of(1), Decision.REJECT, Reason.WRONG_NETWORK)
    refused(book, ask_of(1), Decision.IGNORE, Reason.EXPIRED, at=60_000)


def test_a_newer_ask_replaces_an_older_one(book: OrderBook) -> None:
    seal = sealer(1).seal
    old, new = seal(ASK, NOW), seal(alter(ASK, output_token_price=1), NOW + ASK_GAP_MS)
    put(book, new, at=ASK_GAP_MS)
    refused(book, old, Decision.IGNORE, Reason.REPLAYED, at=ASK_GAP_MS)
    refused(book, new, Decision.IGNORE, Reason.REPLAYED, at=ASK_GAP_MS)
    assert book.view(MODEL_ROOT, NOW) == [new]
    newest = seal(alter(ASK, output_token_price=2), NOW + 2 * ASK_GAP_MS)
    put(book, newest, at=2 * ASK_GAP_MS)
    assert book.view(MODEL_ROOT, NOW) == [newest]


def test_a_provider_speaks_twice_a_second_at_most(book: OrderBook) -> None:
    seal = sealer(1).seal
    put(book, seal(ASK, NOW))
    hasty = seal(alter(ASK, output_token_price=1), NOW + ASK_GAP_MS - 1)
    refused(book, hasty, Decision.IGNORE, Reason.FLOODED, at=ASK_GAP_MS)
    # Taking it back cannot wait; taking back what is taken back can.
    put(book, seal(alter(ASK, slots=0, free_slots=0), NOW + 1), at=1)
    refused(book, seal(alter(ASK, slots=0, free_slots=0), NOW + 2), Decision.IGNORE, Reason.FLOODED, at=2)
    refused(book, seal(ASK, NOW + 3), Decision.IGNORE, Reason.FLOODED, at=3)


def test_what_is_taken_back_does_not_return(book: OrderBook) -> None:
    seal = sealer(1).seal
    old, withdrawal = seal(ASK, NOW), seal(alter(ASK, slots=0, free_slots=0), NOW + 1)
    put(book, old, withdrawal, at=1)
    assert (book.view(MODEL_ROOT, NOW), book.providers(MODEL_ROOT, NOW), best(book)) == ([], 0, [])
    refused(book, old, Decision.IGNORE, Reason.REPLAYED, at=1)


def test_asks_expire(book: OrderBook) -> None:
    short, long = ask_of(1, lifetime_ms=1_000), ask_of(2, output_token_price=99)
    put(book, short, long)
    assert book.view(MODEL_ROOT, NOW + 999) == [short, long]
    assert book.view(MODEL_ROOT, NOW + 1_000) == [long]
    assert best(book, at=60_000) == []
    assert not len(book)


def test_a_model_has_a_bound(book: OrderBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orderbook, "MAX_ASKS_PER_MODEL", 3)
    lives = (9_000, 5_000, 7_000, 8_000)
    asks = [ask_of(number, lifetime_ms=life) for number, life in enumerate(lives, 1)]
    put(book, *asks, ask_of(9, model_root=OTHER_ROOT, lifetime_ms=1))
    assert len(book.view(OTHER_ROOT, NOW)) == 1
    # The one that would have expired first is gone.
    assert {ask.digest for ask in book.view(MODEL_ROOT, NOW)} == {asks[at].digest for at in (0, 2, 3)}


def test_all_models_have_a_bound(book: OrderBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orderbook, "MAX_ASKS", 3)
    put(book, *(ask_of(number, lifetime_ms=number * 1_000) for number in (1, 2, 3)))
    put(book, ask_of(4, model_root=OTHER_ROOT))
    assert len(book) == 3
    assert book.providers(OTHER_ROOT, NOW) == 1
    assert sealer(1).node_id not in {ask.sender for ask in book.view(MODEL_ROOT, NOW)}


# What is best.


def test_the_best_meet_the_limits(book: OrderBook) -> None:
    fits = ask_of(1)
    limit = cost(fits, OFFER)
    put(
        book,
        fits,
        ask_of(2, output_token_price=41),
        ask_of(3, latency_ms=1_001),
        ask_of(4, free_slots=0),
        ask_of(5, context=100),
        ask_of(6),
        ask_of(7, model_root=OTHER_ROOT),
    )
    offer = replace(OFFER, max_price=limit)
    assert best(book, 9, offer=offer, exclude=(6,)) == [fits]
    assert len(best(book, 9, exclude=(6,))) == 2
    assert best(book, 0) == []
    assert best(book, 9, offer=replace(offer, max_price=limit - 1)) == []


def test_a_book_is_full_when_nobody_has_a_free_slot(book: OrderBook) -> None:
    assert not book.is_full(MODEL_ROOT, NOW, ())
    full, free = ask_of(1, free_slots=0), ask_of(2)
    put(book, full, free)
    assert not book.is_full(MODEL_ROOT, NOW, ())
    assert book.is_full(MODEL_ROOT, NOW, {free.sender})
    assert not book.is_full(MODEL_ROOT, NOW, {full.sender, free.sender})


def test_the_load_makes_the_price(book: OrderBook) -> None:
    """Half of its slots are in use, so that the first step holds."""
    curve = (PriceStep(500, 3_000), PriceStep(501, 9_000))
    busy = ask_of(1, input_token_price=5, output_token_price=20, slots=4, free_slots=2, price_curve=curve)
    idle = ask_of(2, input_token_price=5, output_token_price=50)
    put(book, busy, idle)
    assert asked_prices(busy.body) == (15, 60)
    assert best(book, 2) == book.view(MODEL_ROOT, NOW) == [idle, busy]


def test_equal_asks_share_the_buyers(book: OrderBook) -> None:
    """Of ten as cheap and one that is clearly dearer."""
    put(book, *(ask_of(number) for number in range(1, 11)), ask_of(99, input_token_price=20, output_token_price=80))
    chosen = Counter(ask.sender for seed in range(400) for ask in best(book, 2, seed=seed))
    assert len(chosen) == 10
    assert max(chosen.values()) < 2 * min(chosen.values())


def test_a_little_dearer_has_a_chance_and_much_dearer_none(book: OrderBook) -> None:
    put(
        book,
        *(ask_of(n, input_token_price=100, output_token_price=price) for n, price in ((1, 400), (2, 410), (3, 700))),
    )
    first = Counter(best(book, 1, seed=seed)[0].sender for seed in range(200))
    cheap, little, much = (sealer(number).node_id for number in (1, 2, 3))
    assert first[cheap] > first[little] > 20
    assert not first[much]


@given(
    prices=st.lists(st.tuples(st.integers(0, 1_000), st.integers(0, 1_000)), min_size=1, max_size=12),
    inputs=st.integers(0, 2_000),
    outputs=st.integers(1, 2_000),
    k=st.integers(1, 4),
)
def test_nothing_cheaper_is_overlooked(prices: list[tuple[int, int]], inputs: int, outputs: int, k: int) -> None:
    """Whatever the job, though the book is sorted for one of another shape."""
    book, offer = OrderBook(NETWORK), replace(OFFER, input_bytes=inputs, max_tokens=outputs)
    put(book, *(ask_of(n, input_token_price=i, output_token_price=o) for n, (i, o) in enumerate(prices, 1)))
    chosen = [cost(ask, offer) for ask in best(book, k, offer=offer)]
    every = sorted(cost(ask, offer) for ask in book.view(MODEL_ROOT, NOW))
    assert len(chosen) == min(k, len(every))
    assert chosen == sorted(chosen)
    for cheapest, price in zip(every, chosen, strict=False):
        assert price * 1_000 <= cheapest * (1_000 + SPREAD_MILLI)
