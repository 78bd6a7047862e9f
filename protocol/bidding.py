"""A provider's bids: which offers it answers, at what price, and which award is good. Sans-I/O."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

from aci_p2p.protocol.admission import LEASE_MS, Admission, AdmissionStatistics, Busy, Lease
from aci_p2p.protocol.envelope import Envelope, Sealer, open_envelope
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.market import check_terms
from aci_p2p.protocol.messages import SECOND, Abort, AbortCode, Award, Bid, Offer
from aci_p2p.protocol.pricing import factor_milli, load_milli, scaled_price
from aci_p2p.protocol.publications import MAX_LATENCY_MS, PriceStep
from aci_p2p.protocol.validation import Decision, Reason, require

BID_LIFETIME_MS: Final = 30 * SECOND
"""A bid is firm for half a minute: the longest window to wait for bids, and time to fall back on the next one."""
MAX_OUTSTANDING: Final = 4_096
"""Bids of ours that may still be awarded, and as many quotes."""
MAX_PER_CONSUMER: Final = 32
"""Bids by broadcast that one consumer may have waiting: a job a second. A consumer that offers for the sake of offering
must not use up what we may say to all others (`replay.MAX_PER_SENDER`). Quotes hold slots, which bounds them."""
FIRST_LATENCY_MS: Final = 2_000
"""Promised time to the first token before any was measured: loading a small model takes a second."""
WON_MS: Final = 60 * SECOND
"""How long a job that was won is not bid for again: as long as its offer lives. Later its record tells."""
MOST_WON: Final = 1_024
"""Jobs remembered so, 17 a second for WON_MS. One that is forgotten early costs a bid in vain: its record tells at the
award."""
LATENCY_WEIGHT: Final = 4
"""The measured latency moves by a quarter of each new measurement."""


@dataclass(frozen=True, slots=True)
class Offering:
    """One model that we serve, and for how much."""

    name: str
    """Name in our model store."""
    root: bytes
    """Weights root, 32 bytes."""
    context: int
    """Longest sequence, tokens."""
    input_token_price: int
    """Base units for each prompt token."""
    output_token_price: int
    """Base units for each output token."""
    quantisation: str = "none"
    """Weight format that it is computed with."""
    region: str = ""
    """Where we are; empty: we do not say."""
    price_curve: tuple[PriceStep, ...] = ()
    """How these prices, of an idle provider, change with the load; none: they do not."""


@dataclass(frozen=True, slots=True)
class Won:
    """A good award."""

    offer: Envelope[Offer]
    """The job's offer."""
    bid: Envelope[Bid]
    """Our bid that won."""
    model: str
    """Name of the model in our store."""
    lease: Lease | None = None
    """The slot that is kept for it; a bid that was broadcast has none before its award."""


@dataclass(frozen=True, slots=True)
class Declined:
    """An award that we cannot take."""

    answer: Abort
    """What its consumer is told."""


class BidBook:
    """What we serve, and the bids that may still be awarded. Time is an argument."""

    def __init__(self, sealer: Sealer, offerings: Sequence[Offering], slots: int) -> None:
        """`slots` jobs run at once."""
        self._sealer = sealer
        self._offerings = {offering.root: offering for offering in offerings}
        self._admission = Admission(slots)
        self._won: OrderedDict[bytes, int] = OrderedDict()
        # Apart, so that each is in the order in which they expire.
        self._bids: OrderedDict[bytes, Won] = OrderedDict()
        self._quotes: OrderedDict[bytes, Won] = OrderedDict()
        self._broadcast: Counter[NodeId] = Counter()
        self._latency_ms = FIRST_LATENCY_MS
        self.draining = False
        """Whether no more jobs are taken."""
        self.is_suspended = False
        """Whether no more jobs are taken before our disk stores again what happens to them."""

    def __len__(self) -> int:
        """Bids that may still be awarded."""
        return len(self._bids) + len(self._quotes)

    @property
    def offerings(self) -> tuple[Offering, ...]:
        """What we serve."""
        return tuple(self._offerings.values())

    @property
    def slots(self) -> int:
        """Jobs that run at once."""
        return self._admission.slots

    @property
    def takes_jobs(self) -> bool:
        """Whether there is nothing against further jobs but a lack of slots."""
        return not (self.draining or self.is_suspended)

    @property
    def admission(self) -> AdmissionStatistics:
        """A snapshot of our slots."""
        return self._admission.statistics()

    @property
    def latency_ms(self) -> int:
        """Time to the first token that our next bid promises, milliseconds."""
        return self._latency_ms

    def offer(self, offerings: Sequence[Offering], slots: int) -> None:
        """Serve other models, for other prices, or more or fewer jobs at once; bids that are out stay firm."""
        self._offerings = {offering.root: offering for offering in offerings}
        self._admission.slots = slots
        self._forget_unserved()

    def offering(self, root: bytes) -> Offering | None:
        """What we serve under a weights root."""
        return self._offerings.get(root)

    def bid(self, offer: Envelope[Offer], now: int, *, addresses: Sequence[str]) -> Envelope[Bid] | None:
        """Our firm bid for an offer that was broadcast, remembered until it expires. It reserves nothing.

        None when we do not serve the model, have no slot for its consumer, could never fit the answer, or have bid for
        too many of its offers.
        """
        root = offer.body.model_root
        if root not in self._offerings or self._objection(self._offerings[root], offer, now) is not None:
            return None
        if self._broadcast[offer.sender] >= MAX_PER_CONSUMER:
            return None
        # Our quote for it came late: the slot that it holds must not stand in the way of our bid. It stays firm, for it
        # may be there before the bid is.
        for quoted in self._bids_for(offer):
            self.release(quoted)
        if self._admission.check(offer.sender, now) is not None:
            return None
        return self._make_bid(offer, now, addresses, None).bid

    def quote(self, frame: bytes, peer: NodeId, now: int, *, addresses: Sequence[str]) -> Won | Declined:
        """Our bid for an offer that `peer` sent to us alone, firm for LEASE_MS, with a slot reserved.

        Raises MessageRefused.
        """
        offer = open_envelope(frame, Offer, network=self._sealer.network, now=now)
        # Its own offer: a slot is held for who asks.
        require(offer.sender == peer, Decision.REJECT, Reason.WRONG_SENDER)
        check_terms(offer)
        job_id = offer.body.job_id
        offering = self._offerings.get(offer.body.model_root)
        if offering is None:
            return Declined(Abort(job_id, AbortCode.MODEL_UNAVAILABLE, "the model is not served here", 0))
        if (objection := self._objection(offering, offer, now)) is not None:
            return Declined(Abort(job_id, AbortCode.BUSY, objection, 0))
        lease = self._admission.lease(offer.sender, now)
        if isinstance(lease, Busy):
            return Declined(Abort(job_id, AbortCode.BUSY, lease.detail, lease.until))
        return self._make_bid(offer, now, addresses, lease, LEASE_MS)

    def _objection(self, offering: Offering, offer: Envelope[Offer], now: int) -> str | None:
        """Why we do not take a job, whether there is a slot or not."""
        self._forget_expired(now)
        if not self.takes_jobs:
            return self._why_none
        if offer.body.max_tokens >= offering.context:
            return f"prompt and answer may take {offering.context} tokens"
        # A job is won once.
        return "the provider has this job" if offer.body.job_id in self._won else None

    def _make_bid(
        self,
        offer: Envelope[Offer],
        now: int,
        addresses: Sequence[str],
        lease: Lease | None,
        lifetime_ms: int = BID_LIFETIME_MS,
    ) -> Won:
        offering, slots = self._offerings[offer.body.model_root], self._admission.statistics()
        free = max(self.slots - slots.running - slots.reserved, 0)
        factor = factor_milli(offering.price_curve, load_milli(self.slots, free))
        body = Bid(
            job_id=offer.body.job_id,
            offer_digest=offer.digest,
            model_root=offer.body.model_root,
            input_token_price=scaled_price(offering.input_token_price, factor),
            output_token_price=scaled_price(offering.output_token_price, factor),
            latency_ms=self._latency_ms,
            addresses=tuple(addresses),
            quantisation=offering.quantisation,
            region=offering.region,
        )
        bid = self._sealer.seal(body, now, lifetime_ms=lifetime_ms)
        won = Won(offer, bid, offering.name, lease)
        if lease is None:
            self._bids[bid.digest] = won
            self._broadcast[offer.sender] += 1
        else:
            self._quotes[bid.digest] = won
        return won

    @property
    def _why_none(self) -> str:
        return "the provider is shutting down" if self.draining else "the provider cannot store jobs"

    def take_back(self, quoted: Won) -> None:
        """A quote's consumer has gone: it will not be awarded, and its slot is free."""
        self._forget(quoted.bid.digest)
        self.release(quoted)

    def take(self, frame: bytes, now: int) -> Won | Declined:
        """Judge an award; a bid can be awarded once. Its job has a slot until `release`. Raises MessageRefused."""
        award = open_envelope(frame, Award, network=self._sealer.network, now=now)
        known = self._bids.get(award.body.bid_digest) or self._quotes.get(award.body.bid_digest)
        # From the consumer that the bid answers: bids are public, and whoever heard ours must not be able to use it up.
        require(known is None or award.sender == known.offer.sender, Decision.REJECT, Reason.WRONG_SENDER)
        self._forget(award.body.bid_digest)
        job_id = award.body.job_id
        if known is None:
            return Declined(Abort(job_id, AbortCode.TIMEOUT, "there is no such bid, or it expired"))
        if not self.takes_jobs:
            self.release(known)
            return Declined(Abort(job_id, AbortCode.BUSY, self._why_none))
        if known.lease is None or not self._admission.begin(known.lease, now):
            lease = self._admission.lease(award.sender, now, returns=False)
            if isinstance(lease, Busy):
                return Declined(Abort(job_id, AbortCode.BUSY, lease.detail, lease.until))
            self._admission.begin(lease, now)
            known = replace(known, lease=lease)
        # The job of our bid: what the award calls it is checked later.
        self._won[known.offer.body.job_id] = now + WON_MS
        for other in self._bids_for(known.offer):
            self.take_back(other)
        if len(self._won) > MOST_WON:
            self._won.popitem(last=False)
        return known

    def confirm(self, won: Won, *, is_on_record: bool) -> Won | Declined:
        """Decline what was won after all, if we have served the job before, or take none any more."""
        # A job is served once: a smaller one of its name would take the place of the promise to pay for it.
        if is_on_record:
            return self.refuse(won, AbortCode.PROTOCOL, "this job was served before")
        # Its record was read meanwhile, and who waits for the last job to end was told that there is none.
        return won if self.takes_jobs else self.refuse(won, AbortCode.BUSY, self._why_none)

    def refuse(self, won: Won, code: AbortCode, detail: str) -> Declined:
        """Decline what was won after all, and free its slot."""
        self.release(won)
        return Declined(Abort(won.offer.body.job_id, code, detail))

    def release(self, won: Won) -> None:
        """The job is over, and its slot free."""
        if won.lease is not None:
            self._admission.release(won.lease)

    def measured(self, latency_ms: int) -> None:
        """A job had its first token after so many milliseconds: later bids promise accordingly."""
        self._latency_ms += (min(latency_ms, MAX_LATENCY_MS) - self._latency_ms) // LATENCY_WEIGHT

    def withdraw(self, root: bytes) -> Offering | None:
        """Serve a model no more, and forget the bids for it."""
        offering = self._offerings.pop(root, None)
        self._forget_unserved()
        return offering

    def _forget_unserved(self) -> None:
        for digest, known in (*self._bids.items(), *self._quotes.items()):
            if known.offer.body.model_root not in self._offerings:
                self._forget(digest)

    def _forget(self, digest: bytes) -> None:
        self._quotes.pop(digest, None)
        known = self._bids.pop(digest, None)
        if known is not None:
            consumer = known.offer.sender
            self._broadcast[consumer] -= 1
            if not self._broadcast[consumer]:
                del self._broadcast[consumer]

    def _bids_for(self, offer: Envelope[Offer]) -> list[Won]:
        job_id, consumer = offer.body.job_id, offer.sender
        known = chain(self._bids.values(), self._quotes.values())
        return [won for won in known if won.offer.body.job_id == job_id and won.offer.sender == consumer]

    def _forget_expired(self, now: int) -> None:
        while self._won and next(iter(self._won.values())) <= now:
            self._won.popitem(last=False)
        for known in (self._bids, self._quotes):
            while known:
                digest, oldest = next(iter(known.items()))
                if len(known) < MAX_OUTSTANDING and oldest.bid.header.expires_at > now:
                    break
                self._forget(digest)
