"""One offer and the bids for it: which are weighed, and whose turn it is. Sans-I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection

from aci_p2p.protocol.envelope import Envelope, kind_of, open_envelope
from aci_p2p.protocol.errors import RemoteError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import MAX_BIDS, Abort, Bid, BidSummary, Kind, Offer
from aci_p2p.protocol.pricing import worst_price
from aci_p2p.protocol.selection import Ranking, SelectionRule
from aci_p2p.protocol.text import printable
from aci_p2p.protocol.validation import Decision, Reason, require


class Round:
    """An offer, made at the beginning and again when a provider has failed and no bid is left."""

    def __init__(self, offer: Envelope[Offer], rule: SelectionRule, accepted_tokens: int) -> None:
        """`rule` orders the bids; `accepted_tokens` of the answer are there already."""
        self.offer = offer
        """What is offered."""
        self.summaries: list[BidSummary] = []
        """Bids as they are weighed, in order of arrival."""
        self.awaited: set[NodeId] | None = set()
        """Providers that were asked for quotes and have not answered; None: the offer is broadcast."""
        self.ends_at = 0
        """When waiting for bids ends, Unix milliseconds."""
        self.expired: NodeId | None = None
        """Whose bid was passed over last because it had expired."""
        self._rule = rule
        self._accepted_tokens = accepted_tokens
        self._bids: dict[bytes, Envelope[Bid]] = {}
        self._had_turn: set[bytes] = set()

    @property
    def bidders(self) -> frozenset[NodeId]:
        """Whose bids are weighed."""
        return frozenset(summary.provider for summary in self.summaries)

    def take(self, bid: Envelope[Bid]) -> BidSummary | None:
        """Weigh a bid; None when it does not belong here, or there are enough."""
        if (
            bid.sender in self.bidders
            or len(self._bids) >= MAX_BIDS
            or bid.body.job_id != self.offer.body.job_id
            or bid.body.offer_digest != self.offer.digest
        ):
            return None
        worst = worst_price(self.offer.body, bid.body, accepted_tokens=self._accepted_tokens)
        summary = BidSummary(bid.sender, bid.digest, worst, bid.body.latency_ms)
        self._bids[bid.digest] = bid
        self.summaries.append(summary)
        return summary

    def rank(self) -> Ranking:
        """All bids in order."""
        return self._rule.rank(self.offer.body, self.offer.digest, self.summaries)

    def next(
        self, now: int, failed: Collection[NodeId], is_affordable: Callable[[Envelope[Bid]], bool]
    ) -> Envelope[Bid] | None:
        """The best bid that is still firm and has had no turn; this is its turn. None: there is none."""
        for summary in self.rank().ranked:
            bid = self._bids[summary.bid_digest]
            if bid.digest in self._had_turn or bid.sender in failed or not is_affordable(bid):
                continue
            self._had_turn.add(bid.digest)
            if now < bid.header.expires_at:
                return bid
            self.expired = bid.sender
        return None

    def has_more(self, now: int, failed: Collection[NodeId]) -> bool:
        """Whether a firm bid is left that has had no turn."""
        return any(
            now < bid.header.expires_at and bid.sender not in failed
            for digest, bid in self._bids.items()
            if digest not in self._had_turn
        )


class QuoteDeclined(RemoteError):
    """A provider gives no quote."""

    code = "quote_declined"


def read_quote(data: bytes, provider: NodeId, offer: Envelope[Offer], now: int) -> Envelope[Bid]:
    """Check a provider's answer to an offer that was sent to it alone. Raises MessageRefused, QuoteDeclined."""
    kind, network = kind_of(data), offer.header.network
    # A bid, or a reason why not.
    require(kind in (Kind.BID, Kind.ABORT), Decision.REJECT, Reason.WRONG_KIND)
    if kind is Kind.ABORT:
        abort = open_envelope(data, Abort, network=network, now=now).body
        raise QuoteDeclined(printable(abort.detail) or abort.abort.name.lower().replace("_", " "))
    bid = open_envelope(data, Bid, network=network, now=now)
    # Its own word, about our offer.
    require(bid.sender == provider, Decision.REJECT, Reason.WRONG_SENDER)
    require(bid.body.offer_digest == offer.digest, Decision.REJECT, Reason.WRONG_JOB)
    return bid
