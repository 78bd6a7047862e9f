"""The market over pubsub: topics, validation, offers and bids."""

from aci_p2p.gossip.market import Market, MarketStatistics, open_market

__all__ = ["Market", "MarketStatistics", "open_market"]
