"""Signed messages over pubsub: topics that catch up on what they missed, and the market of offers and bids."""

from aci_p2p.gossip.market import HeardOffer, Market, MarketStatistics, open_market
from aci_p2p.gossip.topic import Topic, TopicStatistics, open_topic

__all__ = ["HeardOffer", "Market", "MarketStatistics", "Topic", "TopicStatistics", "open_market", "open_topic"]
