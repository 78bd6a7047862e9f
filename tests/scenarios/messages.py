"""Signed messages as the nodes of a swarm send them, and as attackers bend them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from aci_p2p.protocol.commitments import derive_job_id
from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.messages import Offer
from aci_p2p.protocol.publications import CapabilityRecord, Engine
from aci_p2p.protocol.terms import Verification

MODEL_ROOT = hashlib.sha256(b"a rare model").digest()
"""Weights root that the offers ask for."""
BID_WINDOW_MS = 1_000
"""How long they wait for bids, milliseconds."""


def make_offer(sealer: Sealer, now: int, seed: bytes) -> Envelope[Offer]:
    """A valid offer, signed at `now` (Unix milliseconds); a different job for each `seed` and moment."""
    inputs = hashlib.sha256(b"input %d " % now + seed).digest()
    nonce = hashlib.sha256(b"nonce %d " % now + seed).digest()
    offer = Offer(
        job_id=derive_job_id(sealer.node_id, inputs, nonce),
        model_root=MODEL_ROOT,
        input_commitment=inputs,
        nonce_commitment=nonce,
        input_bytes=64,
        input_turns=1,
        max_tokens=16,
        temperature_milli=0,
        max_price=10**18,
        max_latency_ms=10_000,
        bid_deadline=now + BID_WINDOW_MS,
        verification=Verification.OPTIMISTIC,
        priority_fee=0,
    )
    return sealer.seal(offer, now)


def make_capability(root: bytes, addresses: Sequence[str]) -> CapabilityRecord:
    """What a provider of one model announces."""
    return CapabilityRecord(
        model_root=root,
        model_name="rare",
        context=512,
        engine=Engine("test 1", "fp32-ref", "cpu", "float32"),
        input_token_price=1,
        output_token_price=1,
        slots=1,
        addresses=tuple(addresses),
        free_slots=1,
        price_curve=(),
    )
