"""Which bid should win, as the judge computes it for itself: it shares nothing with `aci_p2p.protocol.selection`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.messages import BidSummary, Offer
from aci_p2p.protocol.terms import SelectionTerms


def best_first(bids: Iterable[BidSummary], terms: SelectionTerms, offer: Envelope[Offer]) -> list[BidSummary]:
    """Bids that meet an offer, in the order in which they should be awarded by the rule expected-cost/1."""

    def cost(bid: BidSummary) -> int:
        waiting, failing = bid.latency_ms * terms.latency_value, (1_000 - bid.success_milli) * terms.retry_cost
        return bid.worst_price + (waiting + 999) // 1_000 + (failing + 999) // 1_000

    good = [bid for bid in bids if bid.worst_price <= offer.body.max_price]
    order = sorted(good, key=lambda bid: (cost(bid), _hash(b"tie", offer.digest, bid.provider.public_key)))
    explores = int.from_bytes(_hash(b"explore", offer.digest), "big") % 1_000 < 50  # noqa: PLR2004 - as specified
    newcomers = [bid for bid in order if bid.experience < 1_000]  # noqa: PLR2004 - as specified
    if explores and newcomers and 4 * cost(newcomers[0]) <= 5 * cost(order[0]):
        order.remove(newcomers[0])
        order.insert(0, newcomers[0])
    return order


def _hash(domain: bytes, *parts: bytes) -> bytes:
    state = hashlib.sha256()
    for part in (b"aci-p2p/1/" + domain, *parts):
        state.update(len(part).to_bytes(8, "big") + part)
    return state.digest()
