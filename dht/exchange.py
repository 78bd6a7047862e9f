"""Peer exchange: signed records over gossip, so that the DHT is not the only source. No I/O.

A node tells its neighbours now and then where it is and which models it serves; they check it, keep some of what they
hear and pass it on. Losses do no harm: what is missed comes again.

What is kept is a sample: of all identities heard of, those whose keyed hash is the smallest. So nobody's chance to be
kept grows with how often it speaks, and nobody else knows the key (Bortnikov et al., "Brahms", 2009).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from aci_p2p.network.buckets import TokenBucket
from aci_p2p.protocol.envelope import Envelope, kind_of, open_envelope
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import Kind
from aci_p2p.protocol.pricing import check_capacity
from aci_p2p.protocol.publications import CapabilityRecord, NodeRecord
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason, require

MAX_NODES: Final = 512
"""Nodes that are kept: more than a node has connections."""
MAX_CAPABILITIES: Final = 1_024
"""Models of providers that are kept."""
MIN_GAP_S: Final = 30.0
"""Seconds between two records of one node about the same thing; what comes sooner is not passed on."""
PUBLISH_GAP_S: Final = 300.0
"""Least seconds between publications of our own records, which follow announcements: if all of ten thousand nodes were
so busy, that would make 33 messages a second."""
PUBLISH_DELAY_S: Final = 1.0
"""Seconds from an announcement to its publication among neighbours: what changes at once is told at once."""
SECOND_PUBLISH_S: Final = 60.0
"""Seconds from the first publication to the second: by then the neighbours have neighbours."""
MAX_MODELS: Final = 16
"""Models of ours that we publish; the others are found in the DHT."""
RATE: Final = 40.0
"""Records a second from one neighbour, on average: all of a large network come through each."""
BURST: Final = 400.0
"""Records from one neighbour at once."""
MAX_NEIGHBOURS: Final = 512
"""Neighbours whose rate is remembered."""

B = TypeVar("B")


def exchange_topic(network: str) -> str:
    """The topic of a network's records."""
    return f"/aci/{network}/peers/1"


@dataclass(frozen=True, slots=True)
class _Kept(Generic[B]):
    rank: bytes
    record: Envelope[B]
    heard: float


class _Sample(Generic[B]):
    """The records of the smallest ranks among all that were heard."""

    def __init__(self, capacity: int, salt: bytes) -> None:
        self._capacity = capacity
        self._salt = salt
        self._kept: dict[bytes, _Kept[B]] = {}

    def get(self, key: bytes) -> _Kept[B] | None:
        return self._kept.get(key)

    def put(self, key: bytes, record: Envelope[B], heard: float) -> bool:
        """Keep a record; False when it does not belong to the sample."""
        rank = hashlib.sha256(self._salt + key).digest()
        self._kept[key] = _Kept(rank, record, heard)
        if len(self._kept) > self._capacity:
            del self._kept[max(self._kept, key=lambda one: self._kept[one].rank)]
        return key in self._kept

    def live(self, now: int) -> list[Envelope[B]]:
        """What has not expired, the latest first; the rest is forgotten."""
        self._kept = {key: one for key, one in self._kept.items() if one.record.header.expires_at > now}
        return [one.record for one in sorted(self._kept.values(), key=lambda one: -one.heard)]


class RecordExchange:
    """What one node has heard."""

    def __init__(self, network: str, own: NodeId, salt: bytes) -> None:
        """`salt`: secret random bytes, which decide who is kept."""
        self._network = network
        self._own = own
        self._nodes = _Sample[NodeRecord](MAX_NODES, salt)
        self._capabilities = _Sample[CapabilityRecord](MAX_CAPABILITIES, salt)
        self._rates: OrderedDict[NodeId, TokenBucket] = OrderedDict()

    def hear(self, forwarder: NodeId, data: bytes, now: int, at: float) -> Envelope[NodeRecord] | None:
        """Check what a neighbour passes on, at `now` (Unix milliseconds) and `at` (seconds that only grow).

        Returns a node's record that was kept. Raises MessageRefused.
        """
        kind = kind_of(data)
        if kind == Kind.NODE_RECORD:
            node = open_envelope(data, NodeRecord, network=self._network, now=now)
            return node if self._keep(self._nodes, node.sender.peer_id, node, forwarder, at) else None
        if kind == Kind.CAPABILITY_RECORD:
            capability = open_envelope(data, CapabilityRecord, network=self._network, now=now)
            check_capacity(capability.body)
            self._keep(self._capabilities, _key(capability), capability, forwarder, at)
            return None
        raise MessageRefused(Decision.REJECT, Reason.WRONG_KIND)

    def _keep(self, sample: _Sample[B], key: bytes, record: Envelope[B], forwarder: NodeId, at: float) -> bool:
        held = sample.get(key)
        if held is not None:
            # Newer than what we have of the same node about the same thing.
            newer = record.header.sequence > held.record.header.sequence
            require(newer, Decision.IGNORE, Reason.REPLAYED)
            # Not more often than is useful; that something ends may be told at once.
            ends = _is_withdrawal(record.body) and not _is_withdrawal(held.record.body)
            require(ends or at >= held.heard + MIN_GAP_S, Decision.IGNORE, Reason.FLOODED)
        # Not more from one neighbour than a large network brings forth.
        require(self._rate(forwarder, at).take(1, at), Decision.IGNORE, Reason.FLOODED)
        return sample.put(key, record, at) and record.sender != self._own

    def _rate(self, forwarder: NodeId, at: float) -> TokenBucket:
        bucket = self._rates.get(forwarder) or TokenBucket.full(RATE, BURST, at)
        self._rates[forwarder] = bucket
        self._rates.move_to_end(forwarder)
        if len(self._rates) > MAX_NEIGHBOURS:
            self._rates.popitem(last=False)
        return bucket

    def nodes(self, now: int) -> list[Envelope[NodeRecord]]:
        """Other nodes that can be dialled, the latest heard first."""
        return [record for record in self._nodes.live(now) if record.body.addresses and record.sender != self._own]

    def providers(self, model_root: bytes, now: int) -> list[Envelope[CapabilityRecord]]:
        """Other nodes that serve a model, the latest heard first."""
        return [
            record
            for record in self._capabilities.live(now)
            if record.body.model_root == model_root and record.body.slots and record.sender != self._own
        ]


def _key(record: Envelope[CapabilityRecord]) -> bytes:
    return record.sender.peer_id + record.body.model_root


def _is_withdrawal(body: object) -> bool:
    return isinstance(body, CapabilityRecord) and not body.slots
