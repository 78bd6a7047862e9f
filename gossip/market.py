"""The market over pubsub: offers and bids, each checked before it is delivered or forwarded.

Each model has its own two topics. Who serves or wants it takes part in them (`asks`), and nobody else carries them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from random import Random
from typing import Final, TypeVar

import trio

from aci_p2p.clock import Clock
from aci_p2p.gossip.inbox import Inbox
from aci_p2p.gossip.topic import Topic, TopicStatistics, open_topic
from aci_p2p.network.api import Network
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import LocalError, ResourceError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.market import MarketView
from aci_p2p.protocol.messages import MAX_BIDS, Bid, Offer
from aci_p2p.tasks import open_background

B = TypeVar("B")

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
    """Offers for all our models, of which our provider is the consumer."""
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


@dataclass(frozen=True, slots=True)
class _Topics:
    """Where a model is traded."""

    offers: Topic[Offer]
    """For it."""
    bids: Topic[Bid]
    """For these."""


class Market:
    """Offers and bids of one network, for the models that we take part in. Made by `open_market`."""

    def __init__(self, network: Network, network_id: str, clock: Clock, random: Random | None) -> None:
        """See `open_market`."""
        self._network = network
        self._network_id = network_id
        self._clock = clock
        self._random = random
        self._view = MarketView(network_id)
        self._models: dict[bytes, _Topics] = {}
        self._offers = Inbox[Envelope[Offer]](OFFER_QUEUE)
        self._bids = Inbox[Envelope[Bid]](OFFER_QUEUE)
        self._waiting: dict[bytes, trio.MemorySendChannel[Envelope[Bid]]] = {}
        self._job_bids_dropped = 0
        self._offers_heard = self._bids_heard = 0
        self._recent: deque[HeardOffer] = deque(maxlen=RECENT_OFFERS)

    @asynccontextmanager
    async def take_part(self, model_root: bytes) -> AsyncGenerator[None]:
        """Hear and forward what is offered and bid for a model within the block; for each model one block at a time."""

        def check_offer(data: bytes, now: int) -> Envelope[Offer]:
            offer = self._view.check_offer(model_root, data, now)
            self._offers_heard += 1
            self._recent.append(HeardOffer(offer, now))
            return offer

        def check_bid(data: bytes, now: int) -> Envelope[Bid]:
            bid = self._view.check_bid(model_root, data, now)
            self._bids_heard += 1
            return bid

        network, clock, random = self._network, self._clock, self._random
        offer_topic, bid_topic = self.offer_topic(model_root), self.bid_topic(model_root)
        async with (
            open_topic(network, offer_topic, check_offer, clock, inbox=self._offers, random=random) as offers,
            open_topic(network, bid_topic, check_bid, clock, inbox=self._bids, random=random) as bids,
        ):
            self._models[model_root] = _Topics(offers, bids)
            try:
                yield
            finally:
                del self._models[model_root]

    def offer_topic(self, model_root: bytes) -> str:
        """Name of the topic of the offers for a model."""
        return f"/aci/{self._network_id}/offers/{model_root.hex()}/1"

    def bid_topic(self, model_root: bytes) -> str:
        """Name of the topic of the bids."""
        return f"/aci/{self._network_id}/bids/{model_root.hex()}/1"

    def members(self) -> tuple[frozenset[NodeId], frozenset[NodeId]]:
        """Which peers take part in the offers, and which in the bids, for any of our models."""
        peers = self._network.topic_peers
        offers = frozenset(peer for root in self._models for peer in peers(self.offer_topic(root)))
        return offers, frozenset(peer for root in self._models for peer in peers(self.bid_topic(root)))

    async def next_offer(self) -> Envelope[Offer]:
        """Wait for the next offer of somebody else."""
        while True:
            offer = await self._offers.receive()
            if offer.sender != self._network.node_id:
                return offer

    async def publish_offer(self, offer: Envelope[Offer]) -> None:
        """Broadcast our offer. Raises MessageRefused when others would refuse it too, LocalError."""
        topics = self._topics(offer.body.model_root)
        # We hear most of its bids first, and check them against it before we forward them.
        self._view.check_offer(offer.body.model_root, offer.data, self._clock())
        await topics.offers.publish(offer)

    async def publish_bid(self, bid: Envelope[Bid]) -> None:
        """Broadcast our bid. Raises LocalError."""
        await self._topics(bid.body.model_root).bids.publish(bid)

    def _topics(self, model_root: bytes) -> _Topics:
        topics = self._models.get(model_root)
        if topics is None:
            msg = f"no part is taken in the market of model {model_root.hex()}"
            raise LocalError(msg, hint="follow the model first (Asks.follow), or wait until that is done (Asks.join)")
        return topics

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

    async def wait_until_reachable(self, model_root: bytes, peers: Sequence[NodeId], timeout_s: float) -> None:
        """Wait until `peers` take part in the offers for a model and we know it, or `timeout_s` seconds are over."""
        topic = self.offer_topic(model_root)
        with trio.move_on_after(timeout_s):
            while not set(peers) <= set(self._network.topic_peers(topic)):
                await self._network.changed()

    def statistics(self) -> MarketStatistics:
        """A snapshot of the queues; `exchanges` and what follows is of the models that we take part in now."""
        return MarketStatistics(
            offers=_together(self._offers, [topics.offers for topics in self._models.values()]),
            bids=_together(self._bids, [topics.bids for topics in self._models.values()]),
            job_bids_dropped=self._job_bids_dropped,
            waiting_jobs=len(self._waiting),
            offers_heard=self._offers_heard,
            bids_heard=self._bids_heard,
        )

    def recent_offers(self) -> list[HeardOffer]:
        """The last offers that came, the latest first; at most RECENT_OFFERS."""
        return list(reversed(self._recent))

    async def deliver_bids(self) -> None:
        """Hand bids to the jobs of ours that wait for them, until cancelled."""
        while True:
            bid = await self._bids.receive()
            waiting = self._waiting.get(bid.body.job_id)
            if waiting is None:
                continue
            try:
                waiting.send_nowait(bid)
            except (trio.WouldBlock, trio.BrokenResourceError):
                self._job_bids_dropped += 1


def _together(inbox: Inbox[Envelope[B]], topics: Sequence[Topic[B]]) -> TopicStatistics:
    """Topics that share an inbox, as one."""
    each = [topic.statistics() for topic in topics]
    return TopicStatistics(
        waiting=len(inbox),
        dropped=inbox.dropped,
        log_messages=sum(one.log_messages for one in each),
        log_bytes=sum(one.log_bytes for one in each),
        exchanges=sum(one.exchanges for one in each),
        failed_exchanges=sum(one.failed_exchanges for one in each),
        caught_up=sum(one.caught_up for one in each),
        served=sum(one.served for one in each),
    )


@asynccontextmanager
async def open_market(
    network: Network, network_id: str, clock: Clock, *, random: Random | None = None
) -> AsyncGenerator[Market]:
    """The market of a network within the block; no model is joined before `Market.take_part`.

    `network_id` names the topics; `clock` gives Unix milliseconds; `random` is as in `open_topic`.
    """
    async with open_background() as nursery:
        market = Market(network, network_id, clock, random)
        nursery.start_soon(market.deliver_bids)
        yield market
