"""Discovery: signed records, bootstrap, address cache, peer exchange, lookup of a model's providers."""

from aci_p2p.dht.bootstrap import BootstrapFailed, BootstrapReport
from aci_p2p.dht.discovery import Describe, Discovery, DiscoveryOptions, open_discovery
from aci_p2p.dht.records import RecordRules, capability_key, node_key

__all__ = [
    "BootstrapFailed",
    "BootstrapReport",
    "Describe",
    "Discovery",
    "DiscoveryOptions",
    "RecordRules",
    "capability_key",
    "node_key",
    "open_discovery",
]
