"""Asking providers for firm quotes, each on a stream that becomes the job's if it wins."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from contextlib import nullcontext
from random import Random
from typing import Final, TypeAlias

import trio

from aci_p2p.clock import MS_PER_S, Clock
from aci_p2p.gossip import Asks
from aci_p2p.jobs import StreamPump
from aci_p2p.network.api import Network, NoFreeStream
from aci_p2p.protocol.admission import LEASE_MS, RETRY_MS
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import JOB_PROTOCOL
from aci_p2p.protocol.messages import Offer
from aci_p2p.protocol.round import BidArrived, QuoteDeclined, QuoteRefused, QuotesAsked, read_quote

QUOTES: Final = 4
"""Providers that are asked at once: with one in twenty dead, one answers in all but six of a million jobs."""
LEASE_S: Final = LEASE_MS / MS_PER_S
"""Seconds that a quote's stream is kept for the award; the provider holds its slot no longer."""

Tell: TypeAlias = Callable[[QuotesAsked | QuoteRefused | BidArrived], Awaitable[None]]
"""Hands an event to the job."""


class _Quote:
    """A stream on which a provider has quoted."""

    def __init__(self) -> None:
        self.is_weighed = False
        """Whether the job has heard of it: what it was told waits in its queue for a while."""
        self._pump: StreamPump | None = None
        self._decided = trio.Event()

    async def wait(self) -> StreamPump | None:
        """The job's pump, if the award comes in time."""
        with trio.move_on_after(LEASE_S):
            await self._decided.wait()
        return self._pump

    def decide(self, pump: StreamPump | None) -> None:
        """Award the job to this provider, with the job's pump, or to another."""
        self._pump = pump
        self._decided.set()


class Quotes:
    """The quotes of one job."""

    def __init__(self, network: Network, asks: Asks, clock: Clock, random: Random) -> None:
        """`clock` gives Unix milliseconds; `random` spreads jobs over providers."""
        self._network = network
        self._asks = asks
        self._clock = clock
        self._random = random
        self._open: dict[NodeId, _Quote] = {}

    async def ask(self, offer: Envelope[Offer], exclude: Collection[NodeId], tell: Tell) -> None:
        """Ask the best providers, and serve the stream of the one that wins to its end; `tell` the job meanwhile."""
        out = {*exclude, self._network.node_id}
        book, root, now = self._asks.book, offer.body.model_root, self._clock()
        asks = book.best(root, offer=offer.body, k=QUOTES, now=now, exclude=out, random=self._random)
        retry_at = now + RETRY_MS if book.is_full(root, now, out) else None
        await tell(QuotesAsked(frozenset(ask.sender for ask in asks), retry_at))
        async with trio.open_nursery() as nursery:
            for ask in asks:
                self._network.learn_addresses(ask.sender, ask.body.addresses)
                nursery.start_soon(self._ask_one, ask.sender, offer, tell)

    async def _ask_one(self, provider: NodeId, offer: Envelope[Offer], tell: Tell) -> None:
        patience = trio.CancelScope(deadline=trio.current_time() + LEASE_S)
        try:
            with patience:
                async with self._network.open_stream(provider, JOB_PROTOCOL, eager=True) as stream:
                    await stream.send(offer.data)
                    bid = read_quote(await stream.receive(), provider, offer, self._clock())
                    patience.deadline = float("inf")
                    quote = self._open[provider] = _Quote()
                    await tell(BidArrived(bid))
                    pump = await quote.wait()
                    if pump is not None:
                        await pump.run(nullcontext(stream))
        except* AciError as group:
            error = group.exceptions[0]
            await tell(QuoteRefused(provider, str(error), self._retry_at(error)))
        finally:
            self._open.pop(provider, None)
        if patience.cancelled_caught:
            await tell(QuoteRefused(provider, "it did not answer in time"))

    def _retry_at(self, error: BaseException) -> int | None:
        """When to ask a provider again that has given no quote, Unix milliseconds; None: not for this job."""
        if isinstance(error, NoFreeStream):
            return self._clock() + RETRY_MS
        return error.retry_at if isinstance(error, QuoteDeclined) else None

    def award(self, provider: NodeId, pump: StreamPump) -> bool:
        """Let the job go on over the stream of a quote; False: there is none."""
        quote = self._open.pop(provider, None)
        if quote is None:
            return False
        quote.decide(pump)
        return True

    def weighed(self, provider: NodeId) -> None:
        """The job has heard of a provider's quote."""
        if (quote := self._open.get(provider)) is not None:
            quote.is_weighed = True

    def release(self, *, unheard: bool) -> None:
        """Close the streams of all quotes that were not awarded; if `unheard`, also of those yet to be weighed."""
        for provider, quote in tuple(self._open.items()):
            if unheard or quote.is_weighed:
                self._open.pop(provider).decide(None)
