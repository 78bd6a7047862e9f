"""Asking for quotes on simulated streams, in the order in which `aci_p2p.quotes` does it on real ones."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from aci_p2p.protocol.admission import LEASE_MS
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import Offer
from aci_p2p.protocol.publications import Ask
from aci_p2p.protocol.round import BidArrived, QuoteDeclined, QuoteRefused, QuotesAsked, read_quote
from aci_p2p.protocol.validation import MessageRefused
from aci_p2p.testing.simulator.node import SimNode
from aci_p2p.testing.simulator.transport import End
from aci_p2p.testing.simulator.world import Timer


@dataclass(slots=True)
class _Quote:
    """A stream on which a provider was asked."""

    end: End
    """Our side of it."""
    patience: Timer
    """How long its answer, then its award, is waited for."""


class Quotes:
    """The quotes of one job."""

    def __init__(
        self,
        node: SimNode,
        find: Callable[[NodeId], SimNode | None],
        tell: Callable[[QuotesAsked | QuoteRefused | BidArrived], None],
    ) -> None:
        """`find`: who has an identity; `tell` hands an event to the job."""
        self._node = node
        self._find = find
        self._tell = tell
        self._asked: dict[NodeId, _Quote] = {}
        self._quoted: dict[NodeId, _Quote] = {}

    def ask(self, offer: Envelope[Offer], asks: Collection[Envelope[Ask]]) -> None:
        """Ask the providers of some asks."""
        self._tell(QuotesAsked(frozenset(ask.sender for ask in asks)))
        for ask in asks:
            self._ask_one(ask.sender, offer)

    def _ask_one(self, provider: NodeId, offer: Envelope[Offer]) -> None:
        target = self._find(provider)
        if target is None:
            self._tell(QuoteRefused(provider, "it cannot be reached"))
            return
        end = self._node.transport.dial(self._node, target)
        patience = self._node.world.after(LEASE_MS, self._refused, provider, "it did not answer in time")
        self._asked[provider] = _Quote(end, patience)
        end.on_frame = lambda frame: self._answered(provider, offer, frame)
        end.on_end = lambda detail: self._refused(provider, detail)
        end.send(offer.data)

    def _answered(self, provider: NodeId, offer: Envelope[Offer], frame: bytes) -> None:
        try:
            bid = read_quote(frame, provider, offer, self._node.clock)
        except (MessageRefused, QuoteDeclined) as error:
            self._refused(provider, error.message, error.retry_at if isinstance(error, QuoteDeclined) else None)
            return
        quote = self._asked.pop(provider)
        quote.patience.cancel()
        quote.patience = self._node.world.after(LEASE_MS, self._drop, provider)
        quote.end.on_frame = lambda _frame: self._drop(provider)
        quote.end.on_end = lambda _detail: self._drop(provider)
        self._quoted[provider] = quote
        self._tell(BidArrived(bid))

    def _refused(self, provider: NodeId, detail: str, retry_at: int | None = None) -> None:
        quote = self._asked.pop(provider, None)
        if quote is None:
            return
        quote.patience.cancel()
        quote.end.close()
        self._tell(QuoteRefused(provider, detail, retry_at))

    def _drop(self, provider: NodeId) -> None:
        quote = self._quoted.pop(provider, None)
        if quote is None:
            # Its stream ends after it was awarded, released or dropped.
            return
        quote.patience.cancel()
        quote.end.close()

    def award(self, provider: NodeId) -> End | None:
        """The stream of a quote, for the job to go on over; None: there is none."""
        quote = self._quoted.pop(provider, None)
        if quote is None:
            return None
        quote.patience.cancel()
        return quote.end

    def release(self) -> None:
        """Close the streams of all quotes that were not awarded."""
        for quote in self._forget():
            quote.end.close()

    def abandon(self) -> None:
        """The node has died: nothing more happens here."""
        self._forget()

    def _forget(self) -> list[_Quote]:
        quotes = [*self._asked.values(), *self._quoted.values()]
        for quote in quotes:
            quote.patience.cancel()
        self._asked.clear()
        self._quoted.clear()
        return quotes
