"""The market over pubsub: offers and bids, each checked before it is delivered or forwarded."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from random import Random
from typing import Final

import trio

from aci_p2p.clock import Clock
from aci_p2p.gossip.topic import Topic, TopicStatistics, open_topic
from aci_p2p.network.api import Network
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import ResourceError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.market import MarketView
from aci_p2p.protocol.messages import MAX_BIDS, Bid, Offer
from aci_p2p.tasks import open_background

OFFER_QUEUE: Final = 256
"""Offers waiting for our provider; one that lags so far behind would bid too late for the oldest."""
MAX_WAITING_JOBS: Final = 1_024
"""Jobs of ours that wait for bids at once."""
RECENT_OFFERS: Final = 16
"""Offers kept to be shown: more than a screen has room for."""


@dataclass(frozen=True, slots=True)
class MarketStatistics:
    """A snapshot of the market's queues."""

    offers: TopicStatistics
    """Offers, of which our provider is the consumer."""
    bids: TopicStatistics
    """Bids, on their way to the jobs that wait for them."""
    job_bids_dropped: int
    """Bids lost because a job of ours had MAX_BIDS waiting."""
    waiting_jobs: int
    """Jobs of ours that wait for bids."""
    offers_heard: int
    """Valid offers that came, since the market opened."""
    bids_heard: int
    """The same of bids."""


@dataclass(frozen=True, slots=True)
class HeardOffer:
    """An offer that came lately."""

    offer: Envelope[Offer]
    """What it says."""
    heard_at: int
    """When it came, Unix milliseconds."""


class _Heard:
    """Checks what comes, and counts and keeps what is valid, whether anybody takes it or not."""

    def __init__(self, view: MarketView) -> None:
        self._view = view
        self.offers = 0
        """Valid offers."""
        self.bids = 0
        """Valid bids."""
        self.recent: deque[HeardOffer] = deque(maxlen=RECENT_OFFERS)
        """The last offers, the oldest first."""

    def check_offer(self, data: bytes, now: int) -> Envelope[Offer]:
        """As MarketView.check_offer."""
        offer = self._view.check_offer(data, now)
        self.offers += 1
        self.recent.append(HeardOffer(offer, now))
        return offer

    def check_bid(self, data: bytes, now: int) -> Envelope[Bid]:
        """As MarketView.check_bid."""
        bid = self._view.check_bid(data, now)
        self.bids += 1
        return bid


class Market:
    """Offers and bids of one network. Made by `open_market`."""

    def __init__(
        self,
        network: Network,
        view: MarketView,
        offers: Topic[Offer],
        bids: Topic[Bid],
        clock: Clock,
        heard: _Heard,
    ) -> None:
        """`view` checks what `offers` and `bids` carry, `heard` counts it; `clock` gives Unix milliseconds."""
        self._network = network
        self._view = view
        self._offers = offers
        self._bids = bids
        self._clock = clock
        self._waiting: dict[bytes, trio.MemorySendChannel[Envelope[Bid]]] = {}
        self._job_bids_dropped = 0
        self._heard = heard

    @property
    def offer_topic(self) -> str:
        """Name of the offers' topic."""
        return self._offers.name

    @property
    def bid_topic(self) -> str:
        """Name of the bids' topic."""
        return self._bids.name

    async def next_offer(self) -> Envelope[Offer]:
        """Wait for the next offer of somebody else."""
        while True:
            offer = await self._offers.receive()
            if offer.sender != self._network.node_id:
                return offer

    async def publish_offer(self, offer: Envelope[Offer]) -> None:
        """Broadcast our offer. Raises MessageRefused when others would refuse it too."""
        # We hear most of its bids first, and check them against it before we forward them.
        self._view.check_offer(offer.data, self._clock())
        await self._offers.publish(offer)

    async def publish_bid(self, bid: Envelope[Bid]) -> None:
        """Broadcast our bid."""
        await self._bids.publish(bid)

    @contextmanager
    def bids(self, job_id: bytes) -> Generator[trio.MemoryReceiveChannel[Envelope[Bid]]]:
        """The bids for a job of ours that arrive within the block. Raises ResourceError over MAX_WAITING_JOBS."""
        if len(self._waiting) >= MAX_WAITING_JOBS:
            msg = f"{len(self._waiting)} jobs wait for bids already"
            raise ResourceError(msg, hint="wait for some of them, or run another node")
        send, receive = trio.open_memory_channel[Envelope[Bid]](MAX_BIDS)
        self._waiting[job_id] = send
        try:
            with send, receive:
                yield receive
        finally:
            del self._waiting[job_id]

    async def wait_until_reachable(self, peers: Sequence[NodeId], timeout_s: float) -> None:
        """Wait until `peers` have joined the offers' topic and we know it, or `timeout_s` seconds are over."""
        with trio.move_on_after(timeout_s):
            while not set(peers) <= set(self._network.topic_peers(self.offer_topic)):
                await self._network.changed()

    def statistics(self) -> MarketStatistics:
        """A snapshot of the queues."""
        return MarketStatistics(
            offers=self._offers.statistics(),
            bids=self._bids.statistics(),
            job_bids_dropped=self._job_bids_dropped,
            waiting_jobs=len(self._waiting),
            offers_heard=self._heard.offers,
            bids_heard=self._heard.bids,
        )

    def recent_offers(self) -> list[HeardOffer]:
        """The last offers that came, the latest first; at most RECENT_OFFERS."""
        return list(reversed(self._heard.recent))

    async def deliver_bids(self) -> None:
        """Hand bids to the jobs of ours that wait for them, until cancelled."""
        async for bid in self._bids:
            waiting = self._waiting.get(bid.body.job_id)
            if waiting is None:
                continue
            try:
                waiting.send_nowait(bid)
            except (trio.WouldBlock, trio.BrokenResourceError):
                self._job_bids_dropped += 1


@asynccontextmanager
async def open_market(
    network: Network, network_id: str, clock: Clock, *, random: Random | None = None
) -> AsyncGenerator[Market]:
    """Join the market's topics within the block.

    `network_id` names the topics; `clock` gives Unix milliseconds; `random` is as in `open_topic`.
    """
    view = MarketView(network_id)
    heard = _Heard(view)
    offer_topic, bid_topic = f"/aci/{network_id}/offers/1", f"/aci/{network_id}/bids/1"
    async with (
        open_topic(network, offer_topic, heard.check_offer, clock, capacity=OFFER_QUEUE, random=random) as offers,
        open_topic(network, bid_topic, heard.check_bid, clock, capacity=OFFER_QUEUE, random=random) as bids,
        open_background() as nursery,
    ):
        market = Market(network, view, offers, bids, clock, heard)
        nursery.start_soon(market.deliver_bids)
        yield market
