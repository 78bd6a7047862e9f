"""The DHT of simulated nodes: records at the nodes nearest to their keys, judged by the rules of real nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from aci_p2p.dht.records import RecordRules, capability_key
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.hashing import digest
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import CapabilityRecord
from aci_p2p.testing.simulator.node import NETWORK, SimNode
from aci_p2p.testing.simulator.transport import Transport

REPLICAS: Final = 20
"""Nodes that keep a record (Kademlia's k)."""
LOOKUP_TRIPS: Final = 6
"""One-way trips of a lookup: three rounds of questions and answers."""
