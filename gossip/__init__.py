"""Signed messages over pubsub: topics that catch up on what they missed, offers and bids, and standing asks."""

from aci_p2p.gossip.asks import Asks, AsksStatistics, open_asks
from aci_p2p.gossip.market import HeardOffer, Market, MarketStatistics, open_market
from aci_p2p.gossip.topic import Topic, TopicStatistics, open_topic

__all__ = [
    "Asks",
    "AsksStatistics",
    "HeardOffer",
    "Market",
    "MarketStatistics",
    "Topic",
    "TopicStatistics",
    "open_asks",
    "open_market",
    "open_topic",
]
