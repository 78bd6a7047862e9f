"""Prices are exact integers, and amounts survive being written and read."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.protocol import pricing
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.messages import Bid
from aci_p2p.protocol.pricing import (
    BPS,
    MAX_TOKEN_PRICE,
    ONE_ACI,
    PREMIUMS,
    ascends,
    factor_milli,
    format_amount,
    itemise,
    load_milli,
    max_input_tokens,
    parse_amount,
    price,
    scaled_price,
    worst_price,
)
from aci_p2p.protocol.publications import PriceStep
from aci_p2p.protocol.terms import Price, Verification
from tests.protocol.driver import make_offer

OFFER = replace(make_offer().body, input_bytes=1_000, input_turns=3, max_tokens=500)
BID = Bid(
    OFFER.job_id, bytes(32), OFFER.model_root, input_token_price=7, output_token_price=11, latency_ms=1, addresses=(),
    quantisation="none", region="",
)  # fmt: skip


def test_price_item_by_item() -> None:
    compute = 3 * 7 + 5 * 11
    assert price(OFFER, BID, input_tokens=3, output_tokens=5) == Price(compute, 0, compute // 4, 0)
    assert price(OFFER, BID, input_tokens=0, output_tokens=0).total == 0
    assert ONE_ACI == 10**18


def test_priority_fee_is_paid_whatever_comes() -> None:
    offer = replace(OFFER, priority_fee=1_000)
    assert price(offer, BID, input_tokens=0, output_tokens=0) == Price(0, 0, 0, 1_000)
    assert worst_price(offer, BID).total == worst_price(OFFER, BID).total + 1_000


def test_licence_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pricing, "licence_bps", {OFFER.model_root: 500, bytes(32): 0}.__getitem__)
    assert price(OFFER, BID, input_tokens=0, output_tokens=40).licence == 22
    stranger = replace(OFFER, model_root=bytes(32))
    assert price(stranger, BID, input_tokens=0, output_tokens=40).licence == 0


def test_checking_at_once_costs_two_more_executions() -> None:
    offer = replace(OFFER, verification=Verification.IMMEDIATE)
    assert price(offer, BID, input_tokens=0, output_tokens=10) == Price(110, 0, 220, 0)
    assert PREMIUMS.keys() == set(Verification)


def test_shares_are_rounded_up() -> None:
    assert itemise(1, licence_bps=1, verification=Verification.OPTIMISTIC, priority_fee=0) == Price(1, 1, 1, 0)
    assert itemise(BPS, licence_bps=1, verification=Verification.OPTIMISTIC, priority_fee=0) == Price(BPS, 1, 2_500, 0)


AMOUNTS = st.integers(0, 1 << 96)


@given(AMOUNTS, AMOUNTS, st.integers(0, BPS), st.sampled_from(Verification))
def test_more_compute_never_costs_less(one: int, more: int, bps: int, mode: Verification) -> None:
    """So no part of a job costs more than the worst case that was quoted."""
    cheap, dear = (itemise(n, licence_bps=bps, verification=mode, priority_fee=5) for n in (one, one + more))
    assert cheap.total <= dear.total
    assert dear.total == dear.compute + dear.licence + dear.verification + dear.priority


def test_worked_example_of_the_design() -> None:
    """500 tokens of a model of 70B: compute 0.0020 and verification 0.0005, together 0.0025; elsewhere 0.0040."""
    bid = replace(BID, input_token_price=0, output_token_price=parse_amount("0.000004"))
    due = price(OFFER, bid, input_tokens=120, output_tokens=500)
    assert due == Price(
        compute=2_000_000_000_000_000, licence=0, verification=500_000_000_000_000, priority=0
    )  # fmt: skip
    assert (format_amount(due.compute), format_amount(due.verification)) == ("0.002 ACI", "0.0005 ACI")
    assert due.total == 2_500_000_000_000_000 == parse_amount("0.0025") < parse_amount("0.0040")
    # As the specification prints it.
    text = (Path(__file__).parents[2] / "spec" / "selection.md").read_text(encoding="utf-8")
    for name, amount in (*((item.name, getattr(due, item.name)) for item in fields(due)), ("together", due.total)):
        assert f"| {name} | {format_amount(amount).removesuffix(' ACI')} | {amount} |" in text
    # The quote before the job, which the answer fills to the last token.
    assert worst_price(OFFER, bid) == due


def test_most_prompt_tokens() -> None:
    """A token for each byte, 16 for each turn, 128 for the template."""
    assert max_input_tokens(OFFER) == 1_000 + 16 * 3 + 128


def test_worst_price() -> None:
    compute = 7 * (1_000 + 48 + 128) + 11 * 500
    assert worst_price(OFFER, BID) == Price(compute, 0, compute // 4, 0)


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 ACI"),
        (1, "0.000000000000000001 ACI"),
        (450_000_000_000_000, "0.00045 ACI"),
        (ONE_ACI, "1 ACI"),
        (10 * ONE_ACI, "10 ACI"),
        (ONE_ACI + ONE_ACI // 10, "1.1 ACI"),
        (2_500_000_000_000_000, "0.0025 ACI"),
        ((1 << 128) - 1, "340282366920938463463.374607431768211455 ACI"),
    ],
)
def test_amounts_for_people(amount: int, text: str) -> None:
    assert format_amount(amount) == text
    assert parse_amount(text) == amount
    assert parse_amount(text.removesuffix(" ACI")) == amount


@given(st.integers(0, (1 << 128) - 1))
def test_amounts_there_and_back(amount: int) -> None:
    assert parse_amount(format_amount(amount)) == amount


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        (" 12 ", 12 * ONE_ACI),
        ("12ACI", 12 * ONE_ACI),
        (".5", ONE_ACI // 2),
        ("5.", 5 * ONE_ACI),
        ("0.100000000000000000", ONE_ACI // 10),
        ("007", 7 * ONE_ACI),
    ],
)
def test_amounts_as_people_write_them(text: str, amount: int) -> None:
    assert parse_amount(text) == amount


@pytest.mark.parametrize(
    "text",
    ["", ".", "ACI", " ", "-1", "+1", "1e3", "1,5", "1.2.3", "1 000", "0x10", "1_000", "\u0661", "\u00b2", "one",
     "1 EUR", "0.0000000000000000001", "1" + "0" * 21, "0" * 22, "nan", "inf", "1ACIACI", "\uff11"],
)  # fmt: skip
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(LocalError) as caught:
        parse_amount(text)
    assert repr(text) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("text", ["340282366920938463463.374607431768211456", "340282366920938463464", "9" * 21])
def test_more_than_an_amount_can_be(text: str) -> None:
    with pytest.raises(LocalError, match="more than an amount can be"):
        parse_amount(text)


CURVE = (PriceStep(500, 1_500), PriceStep(750, 3_000))


def test_the_load_of_slots() -> None:
    assert [load_milli(4, free) for free in range(5)] == [1_000, 750, 500, 250, 0]
    assert load_milli(3, 2) == 333
    assert load_milli(0, 0) == 1_000
    assert load_milli(4, 9) == 0


def test_the_last_step_that_the_load_has_reached_holds() -> None:
    assert [factor_milli(CURVE, load) for load in (0, 499, 500, 749, 750, 1_000)] == [
        1_000, 1_000, 1_500, 1_500, 3_000, 3_000,
    ]  # fmt: skip
    assert factor_milli((), 1_000) == 1_000


def test_scaled_prices_are_rounded_up_and_fit() -> None:
    assert [scaled_price(7, factor) for factor in (0, 1, 1_000, 1_001, 1_500)] == [0, 1, 7, 8, 11]
    assert scaled_price(MAX_TOKEN_PRICE, 100_000) == MAX_TOKEN_PRICE


def test_curves_ascend() -> None:
    assert ascends(())
    assert ascends(CURVE)
    assert not ascends(CURVE[::-1])
    assert not ascends((PriceStep(0, 1_000),))
