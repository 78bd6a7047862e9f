"""Signed records in the DHT: their keys, and the rules by which they are stored and chosen.

The DHT is a hint, never an authority: every record is signed by the node it is about, and whoever reads one checks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import base58

from aci_p2p.clock import Clock
from aci_p2p.network.api import MAX_RECORD_KEY_BYTES
from aci_p2p.protocol.envelope import Envelope, open_envelope
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.pricing import check_capacity
from aci_p2p.protocol.publications import CapabilityRecord, NodeRecord
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason, require

NODE_PREFIX: Final = "/aci/node/"
CAPABILITY_PREFIX: Final = "/aci/capability/"
MAX_KEYS: Final = 1_024
"""Keys of either kind remembered: base58 takes longer than all else but the signature."""


@lru_cache(maxsize=MAX_KEYS)
def node_key(node: NodeId) -> str:
    """Where a node's record lies."""
    return f"{NODE_PREFIX}{node}"


@lru_cache(maxsize=MAX_KEYS)
def capability_key(model_root: bytes, node: NodeId) -> str:
    """Where a provider's record for one model lies."""
    return f"{CAPABILITY_PREFIX}{base58.b58encode(model_root).decode()}/{node}"


class RecordRules:
    """Judges the records of one network."""

    def __init__(self, network: str, clock: Clock) -> None:
        """`network`: id that records must be signed for; `clock`: Unix milliseconds."""
        self._network = network
        self._clock = clock

    def open(self, key: str, value: bytes) -> Envelope[NodeRecord] | Envelope[CapabilityRecord]:
        """Check the record stored under `key`. Raises MessageRefused."""
        # A key that one of our records can have.
        require(len(key) <= MAX_RECORD_KEY_BYTES, Decision.REJECT, Reason.BAD_RECORD_KEY)
        if key.startswith(NODE_PREFIX):
            return self.open_node(key, value)
        if key.startswith(CAPABILITY_PREFIX):
            return self.open_capability(key, value)
        raise MessageRefused(Decision.REJECT, Reason.BAD_RECORD_KEY)

    def open_node(self, key: str, value: bytes) -> Envelope[NodeRecord]:
        """Check the record of a node stored under `key`. Raises MessageRefused."""
        record = open_envelope(value, NodeRecord, network=self._network, now=self._clock())
        # Under the name of the node that signed it.
        require(key == node_key(record.sender), Decision.REJECT, Reason.BAD_RECORD_KEY)
        return record

    def open_capability(self, key: str, value: bytes) -> Envelope[CapabilityRecord]:
        """Check the record of a provider for a model stored under `key`. Raises MessageRefused."""
        record = open_envelope(value, CapabilityRecord, network=self._network, now=self._clock())
        expected = capability_key(record.body.model_root, record.sender)
        # Under the names of the model and of the node that signed it.
        require(key == expected, Decision.REJECT, Reason.BAD_RECORD_KEY)
        check_capacity(record.body)
        return record

    def validate(self, key: str, value: bytes) -> None:
        """Raise MessageRefused unless `value` may be stored under `key`."""
        self.open(key, value)

    def select(self, key: str, values: Sequence[bytes]) -> int:
        """Index of the newest valid value; the last among equals, so that a re-announcement refreshes."""
        best, best_sequence = 0, -1
        for index, value in enumerate(values):
            try:
                sequence = self.open(key, value).header.sequence
            except AciError:
                continue
            if sequence >= best_sequence:
                best, best_sequence = index, sequence
        return best
