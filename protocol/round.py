"""One offer and the bids for it: which are weighed, and whose turn it is. Sans-I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from aci_p2p.protocol.admission import MAX_WAIT_MS
from aci_p2p.protocol.envelope import Envelope, kind_of, open_envelope
from aci_p2p.protocol.errors import RemoteError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import MAX_BIDS, SECOND, Abort, Bid, BidSummary, Kind, Offer
from aci_p2p.protocol.request import NoBids
from aci_p2p.protocol.selection import Knowledge, Ranking, SelectionRule
from aci_p2p.protocol.terms import PassedOver, Passing, SelectionTerms
from aci_p2p.protocol.text import printable
from aci_p2p.protocol.validation import Decision, Reason, require

QUOTE_WAIT_MS: Final = 400
"""How long quotes are awaited, milliseconds: two round trips around the world."""
QUOTE_PATIENCE_MS: Final = 30
"""How long more once one has come: who is much farther away would be slow with each token too."""
SEEK_MS: Final = 30 * SECOND
"""How long a quote whose award is not answered leads to another round: as long as a bid over gossip is firm."""
MAX_UNANSWERED: Final = 24
"""Awards in a row that wait for their answer in vain, two minutes in all. A liar with many names could make a job wait
for each of them; counted, since bids outlive a clock that is turned back."""


@dataclass(frozen=True, slots=True)
class QuotesAsked:
    """These providers were asked for quotes: each answers with `BidArrived` or `QuoteRefused`, or not at all."""

    providers: frozenset[NodeId]
    """Empty: nobody is known whom one could ask."""
    retry_at: int | None = None
    """When to ask again, Unix milliseconds, since all that serve the model are full; None: they are not."""


@dataclass(frozen=True, slots=True)
class QuoteRefused:
    """A provider gives no quote."""

    provider: NodeId
    """Which."""
    detail: str
    """Why, in words."""
    retry_at: int | None = None
    """When to ask it again, by its word or for want of a stream, Unix milliseconds; None: nobody says."""


@dataclass(frozen=True, slots=True)
class BidArrived:
    """A checked bid came, over gossip or as a quote."""

    bid: Envelope[Bid]
    """The bid."""


class Round:
    """An offer, made at the beginning and again when a provider has failed and no bid is left."""

    def __init__(
        self,
        offer: Envelope[Offer],
        terms: SelectionTerms,
        rule: SelectionRule,
        knowledge: Knowledge,
        accepted_tokens: int,
    ) -> None:
        """`rule` orders the bids by `terms` and by our `knowledge`; `accepted_tokens` of the answer are there."""
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
        self.passed: list[PassedOver] = []
        """Who had a turn, and does not have the job; in order."""
        self._terms = terms
        self._rule = rule
        self._knowledge = knowledge
        self._accepted_tokens = accepted_tokens
        self._bids: dict[bytes, Envelope[Bid]] = {}
        self._had_turn: set[bytes] = set()
        self._busy_until: int | None = None

    @property
    def bidders(self) -> frozenset[NodeId]:
        """Whose bids are weighed."""
        return frozenset(summary.provider for summary in self.summaries)

    def take(self, bid: Envelope[Bid], now: int) -> BidSummary | None:
        """Weigh a bid; None when it does not belong here, or there are enough."""
        if (
            bid.sender in self.bidders
            or len(self._bids) >= MAX_BIDS
            or bid.body.job_id != self.offer.body.job_id
            or bid.body.offer_digest != self.offer.digest
            or bid.body.model_root != self.offer.body.model_root
        ):
            return None
        summary = self._knowledge.summarise(self.offer.body, bid, now, accepted_tokens=self._accepted_tokens)
        self._bids[bid.digest] = bid
        self.summaries.append(summary)
        return summary

    def rank(self) -> Ranking:
        """All bids in order."""
        return self._rule.rank(self.offer.body, self.offer.digest, self._terms, self.summaries)

    def next(
        self, now: int, failed: Collection[NodeId], is_affordable: Callable[[Envelope[Bid]], bool]
    ) -> Envelope[Bid] | None:
        """The best bid that is still firm and has had no turn; this is its turn. None: there is none."""
        for summary in self.rank().ranked:
            bid = self._bids[summary.bid_digest]
            if bid.digest in self._had_turn:
                continue
            self._had_turn.add(bid.digest)
            if now >= bid.header.expires_at:
                self.expired = bid.sender
                self.pass_over(bid.sender, Passing.EXPIRED)
            elif bid.sender in failed or not is_affordable(bid):
                self.pass_over(bid.sender, Passing.TOO_DEAR if bid.sender not in failed else Passing.FAILED)
            else:
                return bid
        return None

    def note_busy(self, retry_at: int | None, now: int) -> None:
        """A provider has no room before `retry_at`; more than MAX_WAIT_MS from now is not believed."""
        if retry_at is not None:
            until = min(max(retry_at, now), now + MAX_WAIT_MS)
            self._busy_until = min(self._busy_until or until, until)

    def why_nobody(self, last_decline: str, bid_window_ms: int) -> NoBids:
        """Why nobody has the job; `last_decline`: who declined last, and why; empty: nobody did."""
        if self.expired:
            last_decline = f"{self.expired.short}: its bid has expired"
        ranking = self.rank()
        if last_decline:
            message = f"every chosen provider declined; the last: {last_decline}"
            hint = "try again in a moment"
        elif ranking.refused:
            message = ranking.why
            hint = "raise the maximum price or latency, or wait for cheaper providers"
        elif self._busy_until is not None:
            message = "no provider of this model has a free slot"
            hint = "wait longer for one, or try again in a moment"
        else:
            message = f"nobody bid within {bid_window_ms / SECOND:g} s"
            hint = "check that a provider of this model is connected, or wait longer for bids"
        return NoBids(message, bids=len(self.summaries), hint=hint, retry_at=self._busy_until)

    def pass_over(self, provider: NodeId, why: Passing) -> None:
        """A provider had its turn, and does not have the job."""
        self.passed.append(PassedOver(provider, why))

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

    def __init__(self, message: str, *, retry_at: int | None) -> None:
        """`retry_at`: when to ask it again, by its word, Unix milliseconds."""
        super().__init__(message)
        self.retry_at = retry_at


def read_quote(data: bytes, provider: NodeId, offer: Envelope[Offer], now: int) -> Envelope[Bid]:
    """Check a provider's answer to an offer that was sent to it alone. Raises MessageRefused, QuoteDeclined."""
    kind, network = kind_of(data), offer.header.network
    # A bid, or a reason why not.
    require(kind in (Kind.BID, Kind.ABORT), Decision.REJECT, Reason.WRONG_KIND)
    if kind is Kind.ABORT:
        abort = open_envelope(data, Abort, network=network, now=now).body
        raise QuoteDeclined(
            printable(abort.detail) or abort.abort.name.lower().replace("_", " "), retry_at=abort.retry_at or None
        )
    bid = open_envelope(data, Bid, network=network, now=now)
    # Its own word, about our offer.
    require(bid.sender == provider, Decision.REJECT, Reason.WRONG_SENDER)
    require(bid.body.offer_digest == offer.digest, Decision.REJECT, Reason.WRONG_JOB)
    # For its model.
    require(bid.body.model_root == offer.body.model_root, Decision.REJECT, Reason.WRONG_MODEL)
    return bid
