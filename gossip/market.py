"""The market over pubsub: offers and bids, each checked before it is delivered or forwarded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import trio

from aci_p2p.clock import Clock
from aci_p2p.network.api import Network, Subscription
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import ResourceError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.market import MarketView
from aci_p2p.protocol.messages import MAX_BIDS, Bid, Offer
from aci_p2p.protocol.validation import ACCEPTED, MessageRefused, Validation
from aci_p2p.tasks import open_background

OFFER_QUEUE: Final = 256
"""Offers waiting for our provider; a provider that lags this far behind bids too late anyway."""
MAX_WAITING_JOBS: Final = 1_024
"""Jobs of ours that wait for bids at once."""
READY_POLL_S: Final = 0.02
"""Seconds between looks at who has joined a topic."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MarketStatistics:
    """A snapshot of the market's queues."""

    offers_waiting: int
    """Offers not yet taken by our provider."""
    offers_dropped: int
    """Offers lost because our provider lagged."""
    bids_dropped: int
    """Bids lost because a consumer of ours lagged."""
    waiting_jobs: int
    """Jobs of ours that wait for bids."""


class Market:
    """Offers and bids of one network. Made by `open_market`."""

    def __init__(self, network: Network, network_id: str, clock: Clock) -> None:
        """`network_id` names the topics; `clock` gives Unix milliseconds."""
        self._network = network
        self._clock = clock
        self._view = MarketView(network_id)
        self.offer_topic = f"/aci/{network_id}/offers/1"
        self.bid_topic = f"/aci/{network_id}/bids/1"
        self._checked_offers: OrderedDict[bytes, Envelope[Offer]] = OrderedDict()
        self._checked_bids: OrderedDict[bytes, Envelope[Bid]] = OrderedDict()
        self._offers_in, self._offers_out = trio.open_memory_channel[Envelope[Offer]](OFFER_QUEUE)
        self._waiting: dict[bytes, trio.MemorySendChannel[Envelope[Bid]]] = {}
        self._offers_dropped = 0
        self._bids_dropped = 0

    async def next_offer(self) -> Envelope[Offer]:
        """Wait for the next offer of somebody else."""
        return await self._offers_out.receive()

    async def publish_offer(self, offer: Envelope[Offer]) -> None:
        """Broadcast our offer. Raises MessageRefused when others would refuse it too."""
        # We hear most of its bids first, and check them against it before we forward them.
        self._view.check_offer(offer.data, self._clock())
        await self._network.publish(self.offer_topic, offer.data)

    async def publish_bid(self, bid: Envelope[Bid]) -> None:
        """Broadcast our bid."""
        await self._network.publish(self.bid_topic, bid.data)

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
            while not set(peers) <= set(self._network.topic_peers(self.offer_topic)):  # noqa: ASYNC110 - no notice comes
                await trio.sleep(READY_POLL_S)

    def statistics(self) -> MarketStatistics:
        """A snapshot of the queues."""
        return MarketStatistics(
            offers_waiting=self._offers_in.statistics().current_buffer_used,
            offers_dropped=self._offers_dropped,
            bids_dropped=self._bids_dropped,
            waiting_jobs=len(self._waiting),
        )

    def validate_offer(self, _forwarder: NodeId, data: bytes) -> Validation:
        """Judge a message on the offers' topic."""
        return self._validate(self._view.check_offer, self._checked_offers, data)

    def validate_bid(self, _forwarder: NodeId, data: bytes) -> Validation:
        """Judge a message on the bids' topic."""
        return self._validate(self._view.check_bid, self._checked_bids, data)

    def _validate(
        self, check: Callable[[bytes, int], Envelope[T]], checked: OrderedDict[bytes, Envelope[T]], data: bytes
    ) -> Validation:
        try:
            checked[data] = check(data, self._clock())
        except MessageRefused as error:
            return error.validation
        # As many as the subscription can hold; older ones were dropped there too.
        if len(checked) > OFFER_QUEUE:
            checked.popitem(last=False)
        return ACCEPTED

    async def deliver_offers(self, subscription: Subscription) -> None:
        """Hand accepted offers to our provider, until cancelled."""
        async for message in subscription:
            offer = self._checked_offers.pop(message.data, None)
            if offer is None or offer.sender == self._network.node_id:
                continue
            try:
                self._offers_in.send_nowait(offer)
            except trio.WouldBlock:
                self._offers_dropped += 1

    async def deliver_bids(self, subscription: Subscription) -> None:
        """Hand accepted bids to the jobs of ours that wait for them, until cancelled."""
        async for message in subscription:
            bid = self._checked_bids.pop(message.data, None)
            waiting = self._waiting.get(bid.body.job_id) if bid else None
            if bid is None or waiting is None:
                continue
            try:
                waiting.send_nowait(bid)
            except (trio.WouldBlock, trio.BrokenResourceError):
                self._bids_dropped += 1


@asynccontextmanager
async def open_market(network: Network, network_id: str, clock: Clock) -> AsyncGenerator[Market]:
    """Join the market's topics within the block."""
    market = Market(network, network_id, clock)
    async with (
        network.subscribe(market.offer_topic, market.validate_offer, capacity=OFFER_QUEUE) as offers,
        network.subscribe(market.bid_topic, market.validate_bid, capacity=OFFER_QUEUE) as bids,
        open_background() as nursery,
    ):
        nursery.start_soon(market.deliver_offers, offers)
        nursery.start_soon(market.deliver_bids, bids)
        yield market
