"""Choosing a bid. The rule's inputs go into the receipt, so anyone can replay the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol

from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import RemoteError
from aci_p2p.protocol.hashing import digest
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import SECOND, Bid, BidSummary, Offer, Receipt
from aci_p2p.protocol.pricing import format_amount, worst_price
from aci_p2p.protocol.terms import SUCCESS_MILLI_MAX, PassedOver, SelectionTerms
from aci_p2p.protocol.text import printable

EXPLORE_MILLI: Final = 50
"""Thousandths of jobs that try a newcomer: one in twenty finds better providers, and risks little."""
EXPLORE_ABOVE_MILLI: Final = 250
"""Thousandths of the best bid's expected cost that a newcomer may be above it to be tried."""
NEWCOMER_EXPERIENCE: Final = 1_000
"""Thousandths of a job: with less experience of it than one full job, a provider is a newcomer."""
_MILLI: Final = 1_000


# What is known of providers before they are chosen.


@dataclass(frozen=True, slots=True)
class Standing:
    """What a consumer's own experience makes it expect of a provider with a model."""

    success_milli: int
    """How likely it is to answer, thousandths."""
    experience: int
    """How much experience that is, thousandths of a job."""


class Standings(Protocol):
    """Experience with providers; `Reputation` is one."""

    def standing(self, provider: NodeId, model_root: bytes, now: int) -> Standing:
        """What is to be expected of a provider with a model."""
        ...


class Stakes(Protocol):
    """What providers have at stake."""

    def stake(self, node: NodeId) -> int:
        """A provider's stake, base units; 0 for one that has none."""
        ...


@dataclass(frozen=True, slots=True)
class StakeTable:
    """Stakes that are fixed."""

    stakes: Mapping[NodeId, int]
    """Base units by provider."""

    def stake(self, node: NodeId) -> int:
        """A provider's stake, base units."""
        return self.stakes.get(node, 0)


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What a consumer knows of providers."""

    stakes: Stakes
    """What they have at stake."""
    standings: Standings
    """How they have served it."""

    def summarise(self, offer: Offer, bid: Envelope[Bid], now: int, *, accepted_tokens: int = 0) -> BidSummary:
        """A bid as it is weighed, with what is known of who made it; `accepted_tokens` of the answer are there."""
        standing = self.standings.standing(bid.sender, offer.model_root, now)
        return BidSummary(
            provider=bid.sender,
            bid_digest=bid.digest,
            worst_price=worst_price(offer, bid.body, accepted_tokens=accepted_tokens).total,
            latency_ms=bid.body.latency_ms,
            stake=self.stakes.stake(bid.sender),
            success_milli=standing.success_milli,
            experience=standing.experience,
            quantisation=bid.body.quantisation,
            region=bid.body.region,
        )


# The choice.


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

    def rank(self, offer: Offer, offer_digest: bytes, terms: SelectionTerms, bids: Sequence[BidSummary]) -> Ranking:
        """Order `bids` for `offer`."""
        ...


class ExpectedCost:
    """The bid with the lowest expected cost wins, and in a few jobs the best newcomer, if it is not much dearer.

    Equal bids are drawn by a hash of offer and provider, not of the bid, of which a provider could sign variants until
    one comes first.
    """

    name = "expected-cost/1"

    def rank(self, offer: Offer, offer_digest: bytes, terms: SelectionTerms, bids: Sequence[BidSummary]) -> Ranking:
        """Order `bids` for `offer`; those that do not meet it or the terms are refused."""
        refused: list[Refused] = []
        good: list[BidSummary] = []
        for bid in bids:
            why = shortfall(offer, terms, bid)
            if why:
                refused.append(Refused(bid, why))
            else:
                good.append(bid)
        good.sort(
            key=lambda bid: (expected_cost(terms, bid), digest("tie", offer_digest, bid.provider.public_key)),
        )
        newcomer = _newcomer(offer_digest, terms, good)
        if newcomer is not None:
            good.remove(newcomer)
            good.insert(0, newcomer)
        return Ranking(tuple(good), tuple(refused), _explain(terms, good, refused))


def expected_cost(terms: SelectionTerms, bid: BidSummary) -> int:
    """What choosing a bid costs the consumer in all, base units."""
    return bid.worst_price + waiting_cost(terms, bid) + failure_cost(terms, bid)


def waiting_cost(terms: SelectionTerms, bid: BidSummary) -> int:
    """What waiting for the first token costs the consumer, base units, rounded up."""
    return -(-bid.latency_ms * terms.latency_value // SECOND)


def failure_cost(terms: SelectionTerms, bid: BidSummary) -> int:
    """What the provider's failure costs the consumer, times how likely it is, base units, rounded up."""
    return -(-(SUCCESS_MILLI_MAX - bid.success_milli) * terms.retry_cost // SUCCESS_MILLI_MAX)


def shortfall(offer: Offer, terms: SelectionTerms, bid: BidSummary) -> str:
    """Why a bid does not meet the offer or the terms, and by how much, in words; empty: it meets them."""
    if bid.worst_price > offer.max_price:
        return f"dearer than the maximum price by {format_amount(bid.worst_price - offer.max_price)}"
    if bid.latency_ms > offer.max_latency_ms:
        return f"slower than the maximum latency by {bid.latency_ms - offer.max_latency_ms} ms"
    if bid.stake < terms.min_stake:
        return f"staked below the minimum by {format_amount(terms.min_stake - bid.stake)}"
    if terms.quantisations and bid.quantisation not in terms.quantisations:
        return f"of quantisation {_label(bid.quantisation)}, not {' or '.join(map(_label, terms.quantisations))}"
    if terms.regions and bid.region not in terms.regions:
        return f"in region {_label(bid.region)}, not {' or '.join(map(_label, terms.regions))}"
    return ""


def explores(offer_digest: bytes) -> bool:
    """Whether the job of an offer is one of those that try a newcomer."""
    return int.from_bytes(digest("explore", offer_digest), "big") % _MILLI < EXPLORE_MILLI


def _newcomer(offer_digest: bytes, terms: SelectionTerms, good: Sequence[BidSummary]) -> BidSummary | None:
    """Who is tried before the best bid; of several newcomers the best, so that many names give nobody more turns."""
    if not good or not explores(offer_digest):
        return None
    newcomer = next((bid for bid in good if bid.experience < NEWCOMER_EXPERIENCE), None)
    most = expected_cost(terms, good[0]) * (_MILLI + EXPLORE_ABOVE_MILLI)
    return newcomer if newcomer is not None and expected_cost(terms, newcomer) * _MILLI <= most else None


def _explain(terms: SelectionTerms, good: Sequence[BidSummary], refused: Sequence[Refused]) -> str:
    if not good:
        if not refused:
            return "nobody bid"
        nearest = min(refused, key=lambda one: (one.bid.worst_price, one.bid.latency_ms, one.bid.provider))
        return f"none of {len(refused)} bids meets the offer; the nearest is {nearest.why}"
    cost = expected_cost(terms, good[0])
    if len(good) == 1:
        return f"the only bid that meets the offer: {format_amount(good[0].worst_price)} at most"
    next_cost = expected_cost(terms, good[1])
    if cost > next_cost:
        more = format_amount(cost - next_cost)
        return f"a newcomer is tried: expected cost {more} above the best of {len(good)} bids"
    if cost < next_cost:
        saving = format_amount(next_cost - cost)
        return f"best of {len(good)} bids: expected cost {format_amount(cost)}, {saving} under the next"
    return f"as good as the next of {len(good)} bids; drawn by hash"


def _label(text: str) -> str:
    return printable(text) or "unknown"


# Replaying a choice.

RULES: Final[Mapping[str, SelectionRule]] = MappingProxyType({rule.name: rule for rule in (ExpectedCost(),)})
"""Every rule that receipts may name, by name."""


class NotReplayed(RemoteError):
    """A receipt's choice is not the one that follows from what it says."""

    code = "not_replayed"


def winner(ranking: Ranking, passed: Sequence[PassedOver]) -> BidSummary | None:
    """The best bid whose provider was not passed over."""
    out = {one.provider for one in passed}
    return next((bid for bid in ranking.ranked if bid.provider not in out), None)


def replay(offer: Envelope[Offer], receipt: Receipt) -> Ranking:
    """Choose again, from the offer and its receipt alone. Raises NotReplayed when another provider should have won."""
    if receipt.offer_digest != offer.digest:
        msg = "the receipt is for another offer"
        raise NotReplayed(msg)
    rule = RULES.get(receipt.rule)
    if rule is None:
        msg = f"the rule {printable(receipt.rule)!r} is not known"
        raise NotReplayed(msg)
    ranking = rule.rank(offer.body, offer.digest, receipt.terms, receipt.bids)
    best = winner(ranking, receipt.passed)
    if best is None or best.provider != receipt.provider:
        named, should = (one.short if one else "nobody" for one in (receipt.provider, best and best.provider))
        msg = f"the receipt names {named}, and {should} should have won"
        raise NotReplayed(msg)
    return ranking
