"""Prices that follow the load, and what an order book says about them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.protocol.advice import Quartiles, Suggestion, quartiles, suggest
from aci_p2p.protocol.autoprice import ADJUST_MS, AutoPrice, next_price

BOUNDS = {"floor": 500, "ceiling": 2_000}


def test_the_price_follows_the_load() -> None:
    assert [next_price(1_000, load, **BOUNDS) for load in (0, 400, 401, 799, 800, 1_000)] == [
        950, 950, 1_000, 1_000, 1_050, 1_050,
    ]  # fmt: skip


def test_the_price_stays_within_its_bounds() -> None:
    assert next_price(1_990, 1_000, **BOUNDS) == 2_000
    assert next_price(501, 0, **BOUNDS) == 500
    assert next_price(9_999, 600, **BOUNDS) == 2_000
    assert next_price(1, 600, **BOUNDS) == 500


@given(price=st.integers(1, 10**6), load=st.integers(0, 1_000))
def test_small_prices_move_too(price: int, load: int) -> None:
    moved = next_price(price, load, floor=0, ceiling=10**9)
    assert (moved > price) is (load >= 800)
    assert (moved < price) is (load <= 400)
    assert abs(moved - price) <= price // 20 + 1


def test_a_minute_s_mean_counts() -> None:
    auto = AutoPrice(1_000, **BOUNDS, now=0)
    # Fully loaded for 48 of 60 seconds.
    assert not auto.note(1_000, 0)
    assert not auto.note(0, 48_000)
    assert not auto.note(0, ADJUST_MS - 1)
    assert auto.price == 1_000
    assert auto.note(0, ADJUST_MS)
    assert auto.price == 1_050
    # The next minute begins anew: half loaded, nothing moves.
    auto.note(500, ADJUST_MS)
    assert not auto.note(500, 2 * ADJUST_MS)
    assert auto.price == 1_050
    auto.note(0, 2 * ADJUST_MS)
    assert auto.note(0, 3 * ADJUST_MS)
    assert auto.price == 997


def test_the_price_starts_within_its_bounds() -> None:
    assert AutoPrice(1, **BOUNDS, now=0).price == 500
    assert AutoPrice(9_999, **BOUNDS, now=0).price == 2_000


@pytest.mark.parametrize(
    ("prices", "expected"),
    [
        ([7], Quartiles(7, 7, 7, 7, 7)),
        ([4, 2], Quartiles(2, 2, 2, 4, 4)),
        ([5, 1, 3, 2, 4], Quartiles(1, 2, 3, 4, 5)),
        (list(range(1, 101)), Quartiles(1, 25, 50, 75, 100)),
    ],
)
def test_quartiles(prices: list[int], expected: Quartiles) -> None:
    assert quartiles(prices) == expected


@pytest.mark.parametrize(("free", "price", "word"), [(2, 75, "dearer"), (3, 50, "middle"), (6, 25, "cheaper")])
def test_what_to_ask(free: int, price: int, word: str) -> None:
    advice = suggest(range(1, 101), 10, free)
    assert advice.price == price
    assert advice.reason.startswith(f"{10 - free} of 10 slots are taken: ")
    assert word in advice.reason
    assert isinstance(advice, Suggestion)
