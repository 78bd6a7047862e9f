"""Choosing a bid: the order, its reasons in words, newcomers, and that anyone can replay it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.job import StreamEnded
from aci_p2p.protocol.lifecycle import State
from aci_p2p.protocol.messages import Abort, AbortCode, Bid, BidSummary, Offer, Receipt
from aci_p2p.protocol.pricing import ONE_ACI
from aci_p2p.protocol.round import BidArrived
from aci_p2p.protocol.selection import (
    RULES,
    ExpectedCost,
    Knowledge,
    NotReplayed,
    Ranking,
    Refused,
    SelectionRule,
    StakeTable,
    Standing,
    expected_cost,
    explores,
    failure_cost,
    replay,
    waiting_cost,
    winner,
)
from aci_p2p.protocol.terms import ANY_PROVIDER, PassedOver, Passing, SelectionTerms
from tests.protocol.driver import CONSUMER, NETWORK, REQUEST, ConsumerBench, alter, make_bid, make_offer

OFFER = replace(make_offer().body, max_price=100, max_latency_ms=50)
DIGEST = bytes(range(32))
KEYS = [KeyPair(bytes([number]) * 32) for number in range(2, 10)]
NODES = [key.node_id for key in KEYS]
RULE: SelectionRule = ExpectedCost()
EXPLORING = next(bytes([number]) * 32 for number in range(256) if explores(bytes([number]) * 32))
"""Digest of an offer whose job tries a newcomer."""


def bid(number: int, price: int, latency_ms: int = 0, **known: object) -> BidSummary:
    summary = BidSummary(NODES[number], bytes([number]) * 32, price, latency_ms, 0, 1_000, 5_000, "none", "eu-west")
    return alter(summary, **known)


def rank(
    *bids: BidSummary, offer: Offer = OFFER, terms: SelectionTerms = ANY_PROVIDER, digest: bytes = DIGEST
) -> Ranking:
    return RULE.rank(offer, digest, terms, bids)


def hashed(domain: bytes, *parts: bytes) -> bytes:
    """The specified hash, written anew."""
    named = b"aci-p2p/1/" + domain, *parts
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in named)).digest()


def test_name() -> None:
    assert RULE.name == "expected-cost/1"
    assert RULES.keys() == {"expected-cost/1"}
    assert not explores(DIGEST)


# The order.


def test_the_cheapest_first_where_nothing_else_costs() -> None:
    cheap, middle, dear = bid(0, 98, 50), bid(1, 99, 1), bid(2, 100, 0)
    assert rank(dear, cheap, middle).ranked == (cheap, middle, dear)


def test_waiting_costs() -> None:
    terms = replace(ANY_PROVIDER, latency_value=1_000)
    slow, fast = bid(0, 60, 40), bid(1, 80, 19)
    assert rank(slow, fast, terms=terms).ranked == (fast, slow)
    assert rank(slow, fast, terms=replace(terms, latency_value=900)).ranked == (slow, fast)


def test_failing_costs() -> None:
    terms = replace(ANY_PROVIDER, retry_cost=100)
    shaky, sound = bid(0, 60, success_milli=800), bid(1, 70, success_milli=950)
    assert rank(shaky, sound, terms=terms).ranked == (sound, shaky)
    assert rank(shaky, sound, terms=replace(terms, retry_cost=60)).ranked == (shaky, sound)


def test_each_part_of_the_cost_is_rounded_up() -> None:
    terms = replace(ANY_PROVIDER, latency_value=1, retry_cost=1)
    one = bid(0, 5, 1, success_milli=999)
    assert (waiting_cost(terms, one), failure_cost(terms, one), expected_cost(terms, one)) == (1, 1, 7)
    sure = bid(0, 5, 0)
    assert expected_cost(terms, sure) == 5
    assert waiting_cost(replace(terms, latency_value=2_000), bid(0, 5, 1_500)) == 3_000


def test_equals_are_drawn_by_a_hash_that_no_bid_can_steer() -> None:
    bids = [bid(number, 99, 10) for number in range(8)]
    ranked = rank(*bids).ranked
    assert list(ranked) == sorted(bids, key=lambda one: hashed(b"tie", DIGEST, one.provider.public_key))
    resigned = [replace(summary, bid_digest=bytes(32)) for summary in bids]
    assert [summary.provider for summary in rank(*resigned).ranked] == [summary.provider for summary in ranked]
    # Other offers spread equal winners.
    winners = {rank(*bids, digest=bytes([n]) * 32).ranked[0].provider for n in range(40)}
    assert len(winners) == 8


# Filters.


def test_bids_at_every_limit_pass() -> None:
    terms = SelectionTerms(7, 0, 0, ("q4_0", "none"), ("us-east", "eu-west"))
    assert rank(bid(0, 100, 50, stake=7), terms=terms).ranked == (bid(0, 100, 50, stake=7),)


@pytest.mark.parametrize(
    ("terms", "one", "why"),
    [
        ({}, bid(0, 101), "dearer than the maximum price by 0.000000000000000001 ACI"),
        ({}, bid(0, 1, 52), "slower than the maximum latency by 2 ms"),
        ({"min_stake": 3 * ONE_ACI}, bid(0, 1, stake=ONE_ACI), "staked below the minimum by 2 ACI"),
        ({"quantisations": ("none",)}, bid(0, 1, quantisation="q4_0"), "of quantisation q4_0, not none"),
        ({"quantisations": ("fp16", "none")}, bid(0, 1, quantisation=""), "of quantisation unknown, not fp16 or none"),
        ({"regions": ("eu-west",)}, bid(0, 1, region="us\x1b[31m"), "in region us [31m, not eu-west"),
        ({"regions": ("eu-west",)}, bid(0, 1, region=""), "in region unknown, not eu-west"),
    ],
)
def test_beyond_a_limit_they_do_not(terms: dict[str, Any], one: BidSummary, why: str) -> None:
    ranking = rank(one, terms=replace(ANY_PROVIDER, **terms))
    assert ranking == Ranking((), (Refused(one, why),), f"none of 1 bids meets the offer; the nearest is {why}")


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
            "best of 3 bids: expected cost 0.00000000000000009 ACI, 0.000000000000000007 ACI under the next",
        ),
        ([bid(0, 90, 1), bid(1, 90, 1)], "as good as the next of 2 bids; drawn by hash"),
    ],
)
def test_reasons_in_words(bids: list[BidSummary], why: str) -> None:
    assert rank(*bids).why == why
    assert rank(*reversed(bids)).why == why


# Newcomers.


def test_one_job_in_twenty_tries_a_newcomer() -> None:
    digests = [hashlib.sha256(bytes([a, b])).digest() for a in range(64) for b in range(64)]
    assert 0.04 < sum(map(explores, digests)) / len(digests) < 0.06
    for one in digests[:100]:
        assert explores(one) == (int.from_bytes(hashed(b"explore", one), "big") % 1_000 < 50)


def test_the_best_newcomer_is_tried_and_only_then() -> None:
    known, cheap, dear = bid(0, 80), bid(1, 99, experience=999), bid(2, 100, experience=0)
    assert rank(known, cheap, dear).ranked == (known, cheap, dear)
    ranking = rank(known, dear, cheap, digest=EXPLORING)
    assert ranking.ranked == (cheap, known, dear)
    assert ranking.why == "a newcomer is tried: expected cost 0.000000000000000019 ACI above the best of 3 bids"
    # Who has had a full job is none.
    assert rank(known, replace(cheap, experience=1_000), digest=EXPLORING).ranked[0] == known


def test_a_newcomer_much_dearer_than_the_best_is_not_tried() -> None:
    known, edge, dear = bid(0, 80), bid(1, 100, experience=0), bid(1, 101, experience=0)
    offer = replace(OFFER, max_price=1_000)
    assert rank(known, edge, offer=offer, digest=EXPLORING).ranked[0] == edge
    assert rank(known, dear, offer=offer, digest=EXPLORING).ranked[0] == known


def test_many_names_give_a_newcomer_no_more_turns() -> None:
    honest = bid(1, 85, experience=0)
    sybils = [bid(number, 90, experience=0) for number in range(2, 8)]
    assert rank(bid(0, 80), *sybils, honest, digest=EXPLORING).ranked[0] == honest


# The order of arrival.

BIDS = st.lists(
    st.tuples(st.integers(98, 102), st.integers(48, 52), st.integers(990, 1_000), st.sampled_from([0, 5_000])),
    max_size=8,
).map(
    lambda rows: [
        bid(number, price, latency, success_milli=success, experience=experience)
        for number, (price, latency, success, experience) in enumerate(rows)
    ]
)
TERMS = st.builds(
    SelectionTerms, st.just(0), st.sampled_from([0, 50]), st.sampled_from([0, 90]), st.just(()), st.just(())
)
DIGESTS = st.sampled_from([DIGEST, EXPLORING])


@given(BIDS.flatmap(lambda bids: st.tuples(st.just(bids), st.permutations(bids))), TERMS, DIGESTS)
def test_the_order_of_arrival_does_not_matter(
    both: tuple[list[BidSummary], list[BidSummary]], terms: SelectionTerms, digest: bytes
) -> None:
    first, second = (rank(*bids, terms=terms, digest=digest) for bids in both)
    assert first.ranked == second.ranked
    assert first.why == second.why
    assert set(first.refused) == set(second.refused)
    assert {*first.ranked, *(refused.bid for refused in first.refused)} == set(both[0])
    assert [refused.bid for refused in first.refused] == [summary for summary in both[0] if summary not in first.ranked]


# Replaying.


class Known:
    """Experience as a test wants it."""

    def __init__(self, standings: dict[NodeId, Standing]) -> None:
        self._standings = standings

    def standing(self, provider: NodeId, model_root: bytes, now: int) -> Standing:
        return self._standings[provider]


def test_a_bid_is_summarised_with_what_is_known() -> None:
    offer = make_offer()
    made = make_bid(offer, KEYS[0], latency_ms=70)
    knowledge = Knowledge(StakeTable({NODES[0]: 9}), Known({NODES[0]: Standing(970, 4_000)}))
    summary = knowledge.summarise(offer.body, made, 0)
    assert (summary.provider, summary.bid_digest, summary.latency_ms) == (NODES[0], made.digest, 70)
    assert (summary.stake, summary.success_milli, summary.experience) == (9, 970, 4_000)
    assert (summary.quantisation, summary.region) == ("none", "eu-west")
    assert StakeTable({}).stake(NODES[0]) == 0


ROWS = st.lists(
    st.tuples(
        st.integers(1, 3), st.sampled_from([100, 300, 900]), st.integers(0, 2), st.sampled_from([500, 900, 1_000]),
        st.sampled_from([0, 999, 1_000, 9_000]), st.sampled_from(["none", "q4_0"]), st.sampled_from(["", "eu", "us"]),
    ),
    min_size=1,
    max_size=6,
)  # fmt: skip
"""Price, latency, stake, success, experience, quantisation and region of each provider."""
ASKED = st.builds(
    SelectionTerms,
    st.integers(0, 1),
    st.sampled_from([0, 10**14]),
    st.sampled_from([0, 10**14]),
    st.sampled_from([(), ("none",), ("none", "q4_0")]),
    st.sampled_from([(), ("eu", "us")]),
)


FEES = [
    next(
        fee for fee in range(1_000) if explores(make_offer(request=replace(REQUEST, priority_fee=fee)).digest) is wanted
    )
    for wanted in (False, True)
]
"""Of an offer that tries no newcomer, and of one that does."""


def receipted(data: st.DataObject) -> tuple[Envelope[Offer], Receipt] | None:
    """The receipt of a consumer's job among any providers, some of whom are passed over; None: nobody is left."""
    rows = data.draw(ROWS)
    standings = {key.node_id: Standing(row[3], row[4]) for key, row in zip(KEYS, rows, strict=False)}
    stakes = {key.node_id: row[2] for key, row in zip(KEYS, rows, strict=False)}
    request = replace(REQUEST, terms=data.draw(ASKED), priority_fee=data.draw(st.sampled_from(FEES)))
    bench = ConsumerBench(request, knowledge=Knowledge(StakeTable(stakes), Known(standings)))
    bench.start()
    made = dict[NodeId, tuple[KeyPair, Envelope[Bid]]]()
    for key, row in zip(KEYS, rows, strict=False):
        lifetime = data.draw(st.sampled_from([60_000, 60_000, 1_000]))
        terms = {"output_token_price": row[0] * 10**12, "latency_ms": row[1], "quantisation": row[5], "region": row[6]}
        made[key.node_id] = key, make_bid(bench.job.offer, key, lifetime_ms=lifetime, **terms)
        bench.feed(BidArrived(made[key.node_id][1]))
    bench.time_out()
    while bench.job.state is State.AWARDED:
        key, bench.chosen = made[bench.job._working.provider]
        bench.peer = Sealer(key, NETWORK)
        match data.draw(st.sampled_from(["accepts"] * 4 + ["is busy", "is silent", "is gone"])):
            case "is busy":
                bench.receive(Abort(bench.job.job_id, AbortCode.BUSY, ""))
            case "is silent":
                bench.time_out()
            case "is gone":
                bench.feed(StreamEnded("gone"))
            case _:
                bench.accept()
                bench.serve(key)
    return (bench.job.offer, bench.job.receipt.body) if bench.job.state is State.PENDING else None


@given(st.data())
def test_any_receipt_of_a_job_replays_to_its_winner(data: st.DataObject) -> None:
    made = receipted(data)
    if made is None:
        return
    offer, receipt = made
    ranking = replay(offer, receipt)
    best = winner(ranking, receipt.passed)
    assert best is not None
    assert best.provider == receipt.provider
    ahead = ranking.ranked[: ranking.ranked.index(best)]
    assert [one.provider for one in receipt.passed] == [one.provider for one in ahead]
    # Whatever is changed so that another should have won is noticed.
    others = [one for one in ranking.ranked if one.provider != receipt.provider]
    for one in others:
        with pytest.raises(NotReplayed):
            replay(offer, replace(receipt, shares=(replace(receipt.shares[-1], provider=one.provider),)))
    if receipt.passed:
        with pytest.raises(NotReplayed):
            replay(offer, replace(receipt, passed=()))
    without = tuple(one for one in receipt.bids if one.provider != receipt.provider)
    with pytest.raises(NotReplayed):
        replay(offer, replace(receipt, bids=without))
    dear = tuple(
        replace(one, worst_price=offer.body.max_price + 1) if one is best else one for one in receipt.bids
    )  # fmt: skip
    with pytest.raises(NotReplayed):
        replay(offer, replace(receipt, bids=dear))
    # So is a rival whose bid is made to look better than it was.
    terms = replace(receipt.terms, quantisations=(), regions=())
    out = {one.provider for one in receipt.passed} | {receipt.provider}
    for rival in (one for one in receipt.bids if one.provider not in out):
        better = replace(rival, stake=9, worst_price=0, latency_ms=0, success_milli=1_000, experience=0)
        bids = tuple(better if one is rival else one for one in receipt.bids)
        with pytest.raises(NotReplayed, match="should have won"):
            replay(offer, replace(receipt, bids=bids, terms=terms))


def test_what_cannot_be_replayed() -> None:
    bench = ConsumerBench().reach(State.PENDING)
    offer, receipt = bench.job.offer, bench.job.receipt.body
    assert replay(offer, receipt).ranked[0].provider == receipt.provider
    other = Sealer(CONSUMER, NETWORK).seal(offer.body, 1_800_000_000_001)
    with pytest.raises(NotReplayed, match="another offer"):
        replay(other, receipt)
    with pytest.raises(NotReplayed, match="the rule 'best/2' is not known"):
        replay(offer, replace(receipt, rule="best/2"))
    out = tuple(PassedOver(one.provider, Passing.DECLINED) for one in receipt.bids)
    with pytest.raises(NotReplayed, match="and nobody should have won"):
        replay(offer, replace(receipt, passed=out))
