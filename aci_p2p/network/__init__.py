"""The network seam. Implementations are imported by name: `aci_p2p.network.libp2p`, `aci_p2p.network.memory`."""

from aci_p2p.network.api import (
    MAX_FRAME_BYTES,
    MAX_GOSSIP_BYTES,
    MAX_RECORD_BYTES,
    MAX_RECORD_KEY_BYTES,
    AddressInUse,
    GossipMessage,
    GossipValidator,
    Network,
    NetworkStatistics,
    PeerUnreachable,
    RecordSelector,
    RecordValidator,
    Stream,
    StreamClosed,
    StreamHandler,
    Subscription,
)

__all__ = [
    "MAX_FRAME_BYTES",
    "MAX_GOSSIP_BYTES",
    "MAX_RECORD_BYTES",
    "MAX_RECORD_KEY_BYTES",
    "AddressInUse",
    "GossipMessage",
    "GossipValidator",
    "Network",
    "NetworkStatistics",
    "PeerUnreachable",
    "RecordSelector",
    "RecordValidator",
    "Stream",
    "StreamClosed",
    "StreamHandler",
    "Subscription",
]
