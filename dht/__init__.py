"""Discovery: signed records, bootstrap, lookup of a model's providers."""

from aci_p2p.dht.discovery import BootstrapFailed, Discovery, open_discovery
from aci_p2p.dht.records import RecordRules, capability_key, node_key

__all__ = ["BootstrapFailed", "Discovery", "RecordRules", "capability_key", "node_key", "open_discovery"]
