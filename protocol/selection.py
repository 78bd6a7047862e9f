"""Choosing a bid. The rule's inputs go into the receipt, so anyone can replay the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from aci_p2p.protocol.hashing import digest
from aci_p2p.protocol.messages import BidSummary, Offer
from aci_p2p.protocol.pricing import format_amount


@dataclass(frozen=True, slots=True)
class Refused:
    """A bid that does not meet the offer."""

    bid: BidSummary
    """The bid."""
    why: str
    """In words, for people."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """The outcome of a selection."""

    ranked: tuple[BidSummary, ...]
    """Best first."""
    refused: tuple[Refused, ...]
    """Bids that do not meet the offer."""
    why: str
    """Why the first is first, or why there is none; in words."""


class SelectionRule(Protocol):
    """Orders bids. Pure: the same inputs give the same order on every machine."""

    @property
    def name(self) -> str:
        """Name and version, as receipts carry it."""
        ...

    def rank(self, offer: Offer, offer_digest: bytes, bids: Sequence[BidSummary]) -> Ranking:
        """Order `bids` for `offer`."""
        ...


class PriceThenLatency:
    """The cheapest bid wins; then the fastest; then a hash that spreads equal winners over jobs.

    The hash is of offer and provider, not of the bid, of which a provider could sign variants until one comes first.
    """

    name = "price-latency/1"

    def rank(self, offer: Offer, offer_digest: bytes, bids: Sequence[BidSummary]) -> Ranking:
        """Order `bids` for `offer`; bids over its maximum price or latency are refused."""
        refused: list[Refused] = []
        good: list[BidSummary] = []
        for bid in bids:
            if bid.worst_price > offer.max_price:
                over = format_amount(bid.worst_price - offer.max_price)
                refused.append(Refused(bid, f"dearer than the maximum price by {over}"))
            elif bid.latency_ms > offer.max_latency_ms:
                over_ms = bid.latency_ms - offer.max_latency_ms
                refused.append(Refused(bid, f"slower than the maximum latency by {over_ms} ms"))
            else:
                good.append(bid)
        good.sort(
            key=lambda bid: (bid.worst_price, bid.latency_ms, digest("tie", offer_digest, bid.provider.public_key))
        )
        return Ranking(tuple(good), tuple(refused), _explain(good, refused))


def _explain(good: Sequence[BidSummary], refused: Sequence[Refused]) -> str:
    if not good:
        if not refused:
            return "nobody bid"
        return f"none of {len(refused)} bids meets the offer; the nearest is {min(refused, key=_shortfall).why}"
    best = good[0]
    if len(good) == 1:
        return f"the only bid that meets the offer: {format_amount(best.worst_price)} at most"
    second = good[1]
    if best.worst_price < second.worst_price:
        saving = format_amount(second.worst_price - best.worst_price)
        return f"cheapest of {len(good)} bids: {format_amount(best.worst_price)} at most, {saving} under the next"
    if best.latency_ms < second.latency_ms:
        return f"as cheap as the next of {len(good)} bids and {second.latency_ms - best.latency_ms} ms faster"
    return f"as cheap and as fast as the next of {len(good)} bids; drawn by hash"


def _shortfall(refused: Refused) -> tuple[int, int]:
    return refused.bid.worst_price, refused.bid.latency_ms
