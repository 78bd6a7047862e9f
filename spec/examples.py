# ruff: noqa: INP001 - beside a script, not in a package
"""The parties, values and messages of one job that the test vectors show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from aci_p2p.protocol.commitments import (
    derive_job_id,
    derive_seed,
    input_bytes,
    input_commitment,
    nonce_commitment,
    output_commitment,
    output_root,
    text_digest,
    tokens_digest,
)
from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.messages import (
    Abort,
    AbortCode,
    Accept,
    Award,
    Bid,
    BidSummary,
    Body,
    Commit,
    Conversation,
    Finish,
    Input,
    Offer,
    Opening,
    Proof,
    Receipt,
    Reveal,
    Settled,
    Tokens,
    Turn,
    Voucher,
)
from aci_p2p.protocol.pricing import share_of
from aci_p2p.protocol.publications import Ask, CapabilityRecord, Engine, NodeRecord, PriceStep
from aci_p2p.protocol.sealing import Binding, OpeningKey, seal_opening
from aci_p2p.protocol.terms import PassedOver, Passing, SelectionTerms, Verification
from aci_p2p.protocol.validation import MessageRefused

SPEC: Final = Path(__file__).parent
NETWORK: Final = "aci-test"
NOW: Final = 1_800_000_000_000
"""Unix milliseconds."""
KEYS: Final = {
    name: KeyPair(bytes([number]) * 32) for number, name in enumerate(("consumer", "provider", "stranger"), 1)
}
CONSUMER, PROVIDER, STRANGER = KEYS.values()
SALT, CONSUMER_NONCE, PROVIDER_NONCE, OUTPUT_SALT, MODEL_ROOT, KEM_SEED = (bytes([n]) * 32 for n in range(0x11, 0x17))
CONVERSATION: Final = Conversation((Turn("system", "Be brief."), Turn("user", "Où est la gare ?")))
ENGINE: Final = Engine("aci-numpy/0.1.0", "fp32-ref", "cpu x86_64", "none")
TOKENS: Final = (11, 300, 4_000_000_000)
TEXT: Final = "Tout droit."
INPUT_TOKENS: Final = 21


def make_offer() -> Envelope[Offer]:
    commitments = input_commitment(CONVERSATION, SALT), nonce_commitment(CONSUMER_NONCE)
    offer = Offer(
        job_id=derive_job_id(CONSUMER.node_id, *commitments),
        model_root=MODEL_ROOT,
        input_commitment=commitments[0],
        nonce_commitment=commitments[1],
        input_bytes=input_bytes(CONVERSATION),
        input_turns=len(CONVERSATION.turns),
        max_tokens=64,
        temperature_milli=700,
        max_price=10**18,
        max_latency_ms=5_000,
        bid_deadline=NOW + 2_000,
        verification=Verification.OPTIMISTIC,
        priority_fee=3 * 10**12,
    )
    return Sealer(CONSUMER, NETWORK).seal(offer, NOW)


def make_bid() -> Envelope[Bid]:
    offer = make_offer()
    bid = Bid(
        job_id=offer.body.job_id,
        offer_digest=offer.digest,
        model_root=offer.body.model_root,
        input_token_price=3 * 10**12,
        output_token_price=5 * 10**12,
        latency_ms=300,
        addresses=(f"/ip4/192.0.2.1/tcp/4001/p2p/{PROVIDER.node_id}",),
        quantisation="q4_0",
        region="eu-west",
    )
    return Sealer(PROVIDER, NETWORK).seal(bid, NOW)


def make_award() -> Envelope[Award]:
    return Sealer(CONSUMER, NETWORK).seal(Award(make_offer().body.job_id, make_bid().digest, 0), NOW)


def make_proof(offer: Envelope[Offer]) -> Proof:
    job_id = offer.body.job_id
    return Proof(
        job_id=job_id,
        consumer=offer.sender,
        offer_digest=offer.digest,
        bid_digest=make_bid().digest,
        model_root=offer.body.model_root,
        input_commitment=offer.body.input_commitment,
        input_tokens=INPUT_TOKENS,
        output_tokens=len(TOKENS),
        tokens_hash=tokens_digest(job_id, TOKENS),
        text_hash=text_digest(job_id, TEXT),
        finish=Finish.STOP,
        temperature_milli=offer.body.temperature_milli,
        seed=derive_seed(CONSUMER_NONCE, PROVIDER_NONCE, job_id),
        provider_nonce=PROVIDER_NONCE,
        engine=ENGINE,
        first_token=0,
    )


def all_messages() -> Iterator[Envelope[Any]]:
    """One of every kind, as one job would carry them."""
    consumer, provider = Sealer(CONSUMER, NETWORK), Sealer(PROVIDER, NETWORK)
    offer, bid = make_offer(), make_bid()
    job_id = offer.body.job_id
    award = make_award()
    proof = provider.seal(make_proof(offer), NOW)
    root = output_root(proof.body.tokens_hash, proof.body.text_hash)
    summary = BidSummary(PROVIDER.node_id, bid.digest, 10**15, 300, 10**20, 980, 12_000, "q4_0", "eu-west")
    terms = SelectionTerms(10**20, 10**14, 5 * 10**14, ("q4_0", "none"), ("eu-west",))
    share = share_of(offer.body, bid, input_tokens=INPUT_TOKENS, first_token=0, output_tokens=len(TOKENS))
    theirs: list[Body] = [
        Accept(job_id, award.digest, PROVIDER_NONCE, OpeningKey(KEM_SEED).public),
        Tokens(job_id, 0, TOKENS, TEXT, INPUT_TOKENS),
        Commit(job_id, output_commitment(job_id, PROVIDER.node_id, root, OUTPUT_SALT)),
        Reveal(job_id, OUTPUT_SALT, proof.data),
        Settled(job_id, share.price),
        NodeRecord(("/ip4/192.0.2.1/tcp/4001",), ("provider",), "aci-p2p/0.1.0"),
        CapabilityRecord(
            MODEL_ROOT, "SmolLM2-135M-Instruct", 8_192, ENGINE, 10**12, 0, 4, (), 1, (PriceStep(500, 1_250),)
        ),
        Ask(
            MODEL_ROOT,
            "SmolLM2-135M-Instruct",
            ENGINE,
            8_192,
            10**12,
            4 * 10**12,
            (PriceStep(500, 1_250),),
            4,
            1,
            300,
            "eu-west",
            (f"/ip4/192.0.2.1/tcp/4001/p2p/{PROVIDER.node_id}",),
        ),
    ]
    ours: list[Body] = [
        Input(job_id, SEALED),
        Voucher(job_id, share),
        Receipt(
            job_id, offer.digest, proof.digest, (share,), share.price, "expected-cost/1", (summary,), terms,
            (PassedOver(STRANGER.node_id, Passing.DECLINED),),
        ),
        Abort(job_id, AbortCode.CANCELLED, "the consumer cancelled"),
    ]  # fmt: skip
    yield from (offer, bid, award, proof)
    yield from (provider.seal(body, NOW) for body in theirs)
    yield from (consumer.seal(body, NOW) for body in ours)


def binding_of(award: Envelope[Award]) -> Binding:
    return Binding(NETWORK, award.body.job_id, CONSUMER.node_id, PROVIDER.node_id, award.digest)


def _sealed(award: Envelope[Award]) -> bytes:
    """The prompt, sealed: as in the present vectors if that opens, for no two sealings are alike."""
    opening, key, binding = Opening(CONVERSATION, SALT, CONSUMER_NONCE, ()), OpeningKey(KEM_SEED), binding_of(award)
    with suppress(OSError, ValueError, KeyError, MessageRefused):
        sealed = bytes.fromhex(json.loads((SPEC / "vectors" / "sealing.json").read_text(encoding="utf-8"))["sealed"])
        if key.open(sealed, binding) == opening:
            return sealed
    return seal_opening(opening, key.public, binding)


SEALED: Final = _sealed(make_award())
"""The encapsulated key and the ciphertext, bytes; made once, for vectors must agree and no two sealings are alike."""
