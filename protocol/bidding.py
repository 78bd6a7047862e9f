"""A provider's bids: which offers it answers, at what price, and which award is good. Sans-I/O."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from aci_p2p.protocol.envelope import Envelope, Sealer, open_envelope
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.market import check_terms
from aci_p2p.protocol.messages import MAX_LATENCY_MS, SECOND, Abort, AbortCode, Award, Bid, Offer, PriceStep
from aci_p2p.protocol.pricing import factor_milli, load_milli, scaled_price
from aci_p2p.protocol.validation import Decision, Reason, require

BID_LIFETIME_MS: Final = 30 * SECOND
"""A bid is firm for half a minute: the longest window to wait for bids, and time to fall back on the next one."""
MAX_OUTSTANDING: Final = 4_096
"""Bids of ours that may still be awarded."""
MAX_PER_CONSUMER: Final = 32
"""Bids of ours that one consumer may have waiting: a job a second. A consumer that offers for the sake of offering must
not use up what we may say to all others (`replay.MAX_PER_SENDER`)."""
FIRST_LATENCY_MS: Final = 2_000
"""Promised time to the first token before any was measured: loading a small model takes a second."""
LEASE_MS: Final = 5 * SECOND
"""A quote holds a slot for so long: a consumer that has asked a few providers chooses within a second."""
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
        self._slots = slots
        self._outstanding: OrderedDict[bytes, Won] = OrderedDict()
        self._consumers: Counter[NodeId] = Counter()
        self._latency_ms = FIRST_LATENCY_MS
        self.draining = False
        """Whether no more jobs are taken."""

    def __len__(self) -> int:
        """Bids that may still be awarded."""
        return len(self._outstanding)

    @property
    def offerings(self) -> tuple[Offering, ...]:
        """What we serve."""
        return tuple(self._offerings.values())

    @property
    def slots(self) -> int:
        """Jobs that run at once."""
        return self._slots

    @property
    def latency_ms(self) -> int:
        """Time to the first token that our next bid promises, milliseconds."""
        return self._latency_ms

    def offer(self, offerings: Sequence[Offering], slots: int) -> None:
        """Serve other models, for other prices, or more or fewer jobs at once; bids that are out stay firm."""
        self._offerings = {offering.root: offering for offering in offerings}
        self._slots = slots
        self._forget_unserved()

    def offering(self, root: bytes) -> Offering | None:
        """What we serve under a weights root."""
        return self._offerings.get(root)

    def bid(
        self,
        offer: Envelope[Offer],
        now: int,
        *,
        running: int,
        addresses: Sequence[str],
        lifetime_ms: int = BID_LIFETIME_MS,
    ) -> Envelope[Bid] | None:
        """Our firm bid for an offer, remembered until it expires.

        None when we do not serve the model, lack a slot (`running` are taken), could never fit the answer, or have bid
        for too many offers of the same consumer.
        """
        offering = self._offerings.get(offer.body.model_root)
        is_full = self.draining or running >= self._slots
        if offering is None or is_full or offer.body.max_tokens >= offering.context:
            return None
        self._forget_expired(now)
        if self._consumers[offer.sender] >= MAX_PER_CONSUMER:
            return None
        factor = factor_milli(offering.price_curve, load_milli(self._slots, self._slots - running))
        body = Bid(
            job_id=offer.body.job_id,
            offer_digest=offer.digest,
            input_token_price=scaled_price(offering.input_token_price, factor),
            output_token_price=scaled_price(offering.output_token_price, factor),
            latency_ms=self._latency_ms,
            addresses=tuple(addresses),
            quantisation=offering.quantisation,
            region=offering.region,
        )
        bid = self._sealer.seal(body, now, lifetime_ms=lifetime_ms)
        self._outstanding[bid.digest] = Won(offer, bid, offering.name)
        self._consumers[offer.sender] += 1
        return bid

    def quote(
        self, frame: bytes, peer: NodeId, now: int, *, running: int, addresses: Sequence[str]
    ) -> Envelope[Bid] | Declined:
        """Our bid for an offer that `peer` sent to us alone, firm for LEASE_MS. Raises MessageRefused."""
        offer = open_envelope(frame, Offer, network=self._sealer.network, now=now)
        # Its own offer: a slot is held for who asks.
        require(offer.sender == peer, Decision.REJECT, Reason.WRONG_SENDER)
        check_terms(offer)
        bid = self.bid(offer, now, running=running, addresses=addresses, lifetime_ms=LEASE_MS)
        if bid is not None:
            return bid
        job_id = offer.body.job_id
        if offer.body.model_root not in self._offerings:
            return Declined(Abort(job_id, AbortCode.MODEL_UNAVAILABLE, "the model is not served here"))
        if self.draining or running >= self._slots:
            return Declined(Abort(job_id, AbortCode.BUSY, "all slots are taken"))
        return Declined(Abort(job_id, AbortCode.BUSY, "too many tokens for the model, or too many offers at once"))

    def release(self, bid: Envelope[Bid]) -> None:
        """A quote's consumer has gone: it will not be awarded."""
        self._forget(bid.digest)

    def take(self, frame: bytes, now: int, *, running: int) -> Won | Declined:
        """Judge the first frame of a job's stream; a bid can be awarded once. Raises MessageRefused."""
        award = open_envelope(frame, Award, network=self._sealer.network, now=now)
        known = self._outstanding.get(award.body.bid_digest)
        # From the consumer that the bid answers: bids are public, and whoever heard ours must not be able to use it up.
        require(known is None or award.sender == known.offer.sender, Decision.REJECT, Reason.WRONG_SENDER)
        self._forget(award.body.bid_digest)
        job_id = award.body.job_id
        if known is None:
            return Declined(Abort(job_id, AbortCode.TIMEOUT, "there is no such bid, or it expired"))
        if self.draining:
            return Declined(Abort(job_id, AbortCode.BUSY, "the provider is shutting down"))
        if running >= self._slots:
            return Declined(Abort(job_id, AbortCode.BUSY, "all slots are taken by now"))
        return known

    def measured(self, latency_ms: int) -> None:
        """A job had its first token after so many milliseconds: later bids promise accordingly."""
        self._latency_ms += (min(latency_ms, MAX_LATENCY_MS) - self._latency_ms) // LATENCY_WEIGHT

    def withdraw(self, root: bytes) -> Offering | None:
        """Serve a model no more, and forget the bids for it."""
        offering = self._offerings.pop(root, None)
        self._forget_unserved()
        return offering

    def _forget_unserved(self) -> None:
        for digest, known in tuple(self._outstanding.items()):
            if known.offer.body.model_root not in self._offerings:
                self._forget(digest)

    def _forget(self, digest: bytes) -> None:
        known = self._outstanding.pop(digest, None)
        if known is not None:
            consumer = known.offer.sender
            self._consumers[consumer] -= 1
            if not self._consumers[consumer]:
                del self._consumers[consumer]

    def _forget_expired(self, now: int) -> None:
        while self._outstanding:
            digest, known = next(iter(self._outstanding.items()))
            if len(self._outstanding) < MAX_OUTSTANDING and known.bid.header.expires_at > now:
                return
            self._forget(digest)
