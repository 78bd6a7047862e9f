"""What a node knows of the market, and the checks that every offer and bid passes before it is forwarded."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, Protocol, TypeVar

from aci_p2p.protocol.commitments import derive_job_id
from aci_p2p.protocol.envelope import MAX_SKEW_MS, Envelope, open_envelope
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import MAX_BIDS, SECOND, Bid, Offer
from aci_p2p.protocol.replay import ReplayGuard
from aci_p2p.protocol.validation import Decision, Reason, require

B = TypeVar("B")

MAX_OFFERS: Final = 4_096
"""Live offers remembered; at 60 s each that is 68 new jobs per second on the topics of one node."""
MAX_BID_WINDOW_MS: Final = 10 * SECOND
"""Longest time that a consumer may wait for bids, milliseconds; longer holds providers' slots for nothing."""


def check_terms(offer: Envelope[Offer]) -> None:
    """What holds of every offer, wherever it comes from. Raises MessageRefused."""
    body = offer.body
    job_id = derive_job_id(offer.sender, body.input_commitment, body.nonce_commitment)
    # The job belongs to who offers it.
    require(body.job_id == job_id, Decision.REJECT, Reason.BAD_JOB_ID)
    # Asks for something.
    require(body.max_tokens > 0 and body.input_turns > 0, Decision.REJECT, Reason.MALFORMED)
    # Waits for bids while the offer lives, and not for long.
    window = body.bid_deadline - offer.header.issued_at
    require(0 < window <= MAX_BID_WINDOW_MS, Decision.REJECT, Reason.BAD_DEADLINE)
    require(body.bid_deadline <= offer.header.expires_at, Decision.REJECT, Reason.BAD_DEADLINE)


class Opener(Protocol):
    """Checks and reads an envelope."""

    def __call__(self, data: bytes, body_type: type[B], *, network: str, now: int | None) -> Envelope[B]:
        """See `open_envelope`."""
        ...


class _Known:
    """A live offer and who has bid for it."""

    __slots__ = ("bidders", "offer")

    def __init__(self, offer: Envelope[Offer]) -> None:
        self.offer = offer
        self.bidders: set[NodeId] = set()


class MarketView:
    """Live offers and bids as one node has seen them. Bounded; time is an argument."""

    def __init__(self, network: str, opener: Opener = open_envelope) -> None:
        """`network`: id of the network whose market this is; `opener` checks envelopes as `open_envelope` does."""
        self._network = network
        self._open = opener
        self._replay = ReplayGuard()
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    def __len__(self) -> int:
        """Live offers remembered."""
        return len(self._known)

    def offer(self, job_id: bytes) -> Envelope[Offer] | None:
        """A live offer, if it was seen."""
        known = self._known.get(job_id)
        return known.offer if known else None

    def check_offer(self, model_root: bytes, data: bytes, now: int) -> Envelope[Offer]:
        """Check an offer that was broadcast on a model's topic, and remember it. Raises MessageRefused."""
        offer = self._open(data, Offer, network=self._network, now=now)
        # About the model whose topic it came on.
        require(offer.body.model_root == model_root, Decision.REJECT, Reason.WRONG_MODEL)
        # Not seen before, and its consumer does not flood.
        self._replay.check(model_root, offer.header, now)
        body = offer.body
        check_terms(offer)
        known = self._known.get(body.job_id)
        # Newer than what is known of this job: its consumer asks again when a provider has failed.
        newer = known is None or offer.header.sequence > known.offer.header.sequence
        require(newer, Decision.IGNORE, Reason.REPLAYED)
        self._replay.remember(model_root, offer.header)
        self._forget_expired(now)
        self._known.pop(body.job_id, None)
        self._known[body.job_id] = _Known(offer)
        return offer

    def check_bid(self, model_root: bytes, data: bytes, now: int) -> Envelope[Bid]:
        """Check a bid that was broadcast on a model's topic. Raises MessageRefused.

        A bid whose offer has not come by here yet passes: gossip reorders, and its consumer must still hear it.
        """
        bid = self._open(data, Bid, network=self._network, now=now)
        # About the model whose topic it came on.
        require(bid.body.model_root == model_root, Decision.REJECT, Reason.WRONG_MODEL)
        # Not seen before, and its provider does not flood.
        self._replay.check(model_root, bid.header, now)
        known = self._known.get(bid.body.job_id)
        if known:
            # Answers the terms that were offered; its forwarder may not have seen them, or been told others.
            require(bid.body.offer_digest == known.offer.digest, Decision.IGNORE, Reason.WRONG_JOB)
            # For the model that was asked for.
            require(model_root == known.offer.body.model_root, Decision.IGNORE, Reason.WRONG_MODEL)
            # One bid from each provider.
            require(bid.sender not in known.bidders, Decision.IGNORE, Reason.DUPLICATE_BID)
            # No more bids than a consumer weighs.
            require(len(known.bidders) < MAX_BIDS, Decision.IGNORE, Reason.TOO_MANY_BIDS)
            # In time, give or take the skew of clocks.
            in_time = bid.header.issued_at <= known.offer.body.bid_deadline + MAX_SKEW_MS
            require(in_time, Decision.IGNORE, Reason.EXPIRED)
            known.bidders.add(bid.sender)
        self._replay.remember(model_root, bid.header)
        return bid

    def _forget_expired(self, now: int) -> None:
        while self._known:
            oldest = next(iter(self._known.values()))
            if len(self._known) < MAX_OFFERS and oldest.offer.header.expires_at > now:
                return
            self._known.popitem(last=False)
