"""Choosing a bid: the order, its reasons in words, and that anyone can replay it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.messages import BidSummary, Offer
from aci_p2p.protocol.pricing import ONE_ACI
from aci_p2p.protocol.selection import PriceThenLatency, Ranking, Refused, SelectionRule
from tests.protocol.driver import make_offer

OFFER = replace(make_offer().body, max_price=100, max_latency_ms=50)
DIGEST = bytes(range(32))
NODES = [KeyPair(bytes([number]) * 32).node_id for number in range(1, 9)]
RULE: SelectionRule = PriceThenLatency()


def bid(number: int, price: int, latency_ms: int) -> BidSummary:
    return BidSummary(NODES[number], bytes([number]) * 32, price, latency_ms)


def rank(*bids: BidSummary, offer: Offer = OFFER) -> Ranking:
    return RULE.rank(offer, DIGEST, bids)


def tie(summary: BidSummary, offer_digest: bytes = DIGEST) -> bytes:
    """The specified tie-break, written anew."""
    parts = b"aci-p2p/1/tie", offer_digest, summary.provider.public_key
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).digest()


def test_name() -> None:
    assert RULE.name == "price-latency/1"


def test_the_cheapest_first() -> None:
    cheap, middle, dear = bid(0, 98, 50), bid(1, 99, 1), bid(2, 100, 0)
    assert rank(dear, cheap, middle).ranked == (cheap, middle, dear)


def test_then_the_fastest() -> None:
    fast, slow = bid(0, 99, 10), bid(1, 99, 11)
    assert rank(slow, fast).ranked == (fast, slow)


def test_then_a_hash_that_no_bid_can_steer() -> None:
    bids = [bid(number, 99, 10) for number in range(8)]
    ranked = rank(*bids).ranked
    assert list(ranked) == sorted(bids, key=tie)
    resigned = [replace(summary, bid_digest=bytes(32)) for summary in bids]
    assert [summary.provider for summary in rank(*resigned).ranked] == [summary.provider for summary in ranked]
    # Other offers spread equal winners.
    winners = {RULE.rank(OFFER, bytes([n]) * 32, bids).ranked[0].provider for n in range(40)}
    assert len(winners) == 8


def test_bids_at_the_maximum_pass_and_beyond_it_not() -> None:
    good, dear, slow = bid(0, 100, 50), bid(1, 101, 1), bid(2, 1, 51)
    ranking = rank(good, dear, slow)
    assert ranking.ranked == (good,)
    assert ranking.refused == (
        Refused(dear, "dearer than the maximum price by 0.000000000000000001 ACI"),
        Refused(slow, "slower than the maximum latency by 1 ms"),
    )


@pytest.mark.parametrize(
    ("bids", "why"),
    [
        ([], "nobody bid"),
        (
            [bid(0, 100 + 2 * ONE_ACI, 1), bid(1, 100 + ONE_ACI, 1)],
            "none of 2 bids meets the offer; the nearest is dearer than the maximum price by 1 ACI",
        ),
        (
            [bid(0, 101, 51), bid(1, 99, 60), bid(2, 99, 59)],
            "none of 3 bids meets the offer; the nearest is slower than the maximum latency by 9 ms",
        ),
        ([bid(0, 90, 1), bid(1, 101, 1)], "the only bid that meets the offer: 0.00000000000000009 ACI at most"),
        (
            [bid(0, 90, 1), bid(1, 97, 1), bid(2, 98, 1)],
            "cheapest of 3 bids: 0.00000000000000009 ACI at most, 0.000000000000000007 ACI under the next",
        ),
        ([bid(0, 90, 1), bid(1, 90, 8)], "as cheap as the next of 2 bids and 7 ms faster"),
        ([bid(0, 90, 1), bid(1, 90, 1)], "as cheap and as fast as the next of 2 bids; drawn by hash"),
    ],
)
def test_reasons_in_words(bids: list[BidSummary], why: str) -> None:
    assert rank(*bids).why == why
    assert rank(*reversed(bids)).why == why


BIDS = st.lists(
    st.tuples(st.integers(98, 102), st.integers(48, 52)), max_size=8
).map(lambda terms: [bid(number, *term) for number, term in enumerate(terms)])  # fmt: skip


@given(BIDS.flatmap(lambda bids: st.tuples(st.just(bids), st.permutations(bids))))
def test_the_order_of_arrival_does_not_matter(both: tuple[list[BidSummary], list[BidSummary]]) -> None:
    first, second = (rank(*bids) for bids in both)
    assert first.ranked == second.ranked
    assert first.why == second.why
    assert set(first.refused) == set(second.refused)
    assert {*first.ranked, *(refused.bid for refused in first.refused)} == set(both[0])
    assert [refused.bid for refused in first.refused] == [summary for summary in both[0] if summary not in first.ranked]
