"""Proofs: what a provider signs about an answer, and how anyone checks it offline.

A proof file holds the provider's signed statement, the consumer's signed offer, and the openings of their hashes, in
one strict encoding: every byte is covered by a signature, a hash or the encoding itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, TypeVar

from aci_p2p.protocol import cbor, wire
from aci_p2p.protocol.commitments import (
    derive_job_id,
    derive_seed,
    input_bytes,
    input_commitment,
    nonce_commitment,
    text_digest,
    tokens_digest,
)
from aci_p2p.protocol.envelope import Envelope, open_envelope
from aci_p2p.protocol.errors import RemoteError
from aci_p2p.protocol.messages import MAX_ENVELOPE_BYTES, MAX_TOKEN_ID, MAX_TOKENS, NONCE, Conversation, Offer, Proof
from aci_p2p.protocol.pricing import max_input_tokens
from aci_p2p.protocol.validation import MessageRefused
from aci_p2p.protocol.wire import Bytes, ListOf, Struct, Text, Uint, Wire

B = TypeVar("B")

MAGIC: Final = "aci-proof/1"
"""First field of a proof file."""
MAX_ANSWER_BYTES: Final = 1 << 20
"""UTF-8 bytes of an answer; 32 Ki tokens at 32 bytes each."""
MAX_PROOF_BYTES: Final = 2 << 20
"""Largest proof file: prompt, answer and their signatures."""


class ProofInvalid(RemoteError):
    """A proof does not hold."""

    code = "proof_invalid"

    def __init__(self, check: str, problem: str) -> None:
        """`check`: which check failed, one of `CHECKS` or `file`; `problem`: in words."""
        super().__init__(f"the proof does not hold: {problem}")
        self.check = check


@dataclass(frozen=True, slots=True)
class ProofFile:
    """A proof with everything needed to check it offline."""

    magic: Annotated[str, Wire(1, Text(len(MAGIC)))]
    """Format and version, `aci-proof/1`."""
    network: Annotated[str, Wire(2, Text(32))]
    """Network id that the envelopes are signed for."""
    proof: Annotated[bytes, Wire(3, Bytes(MAX_ENVELOPE_BYTES, minimum=1))]
    """The provider's signed `Proof`."""
    offer: Annotated[bytes, Wire(4, Bytes(MAX_ENVELOPE_BYTES, minimum=1))]
    """The consumer's signed `Offer`."""
    conversation: Annotated[Conversation, Wire(5, Struct(Conversation))]
    """The prompt; opens the input commitment with `salt`."""
    salt: Annotated[bytes, Wire(6, NONCE)]
    """Opens the input commitment."""
    consumer_nonce: Annotated[bytes, Wire(7, NONCE)]
    """Opens the nonce commitment."""
    tokens: Annotated[tuple[int, ...], Wire(8, ListOf(Uint(MAX_TOKEN_ID), MAX_TOKENS))]
    """Output token ids."""
    text: Annotated[str, Wire(9, Text(MAX_ANSWER_BYTES))]
    """Text of the prover's own tokens: all of the answer, unless providers before it failed."""


@dataclass(frozen=True, slots=True)
class VerifiedProof:
    """A proof that passed every check, with what it says."""

    file: ProofFile
    """The file."""
    proof: Envelope[Proof]
    """The provider's statement."""
    offer: Envelope[Offer]
    """The consumer's offer."""

    def statements(self) -> tuple[str, ...]:
        """What the proof shows, in words."""
        body, engine = self.proof.body, self.proof.body.engine
        how = f"at temperature {body.temperature_milli / 1000:g}" if body.temperature_milli else "greedily"
        own = f"the tokens from {body.first_token + 1} on of" if body.first_token else "this answer of"
        return (
            f"provider {self.proof.sender} signed {own} {body.output_tokens} tokens and cannot deny it",
            f"consumer {self.offer.sender} asked for it: the prompt in the file is the one its offer committed to",
            f"the provider states that it ran the model with weights root {body.model_root.hex()}",
            f"the provider states that it ran it on {engine.name} ({engine.profile}, {engine.device}), {how}",
            "the sampling seed follows from both sides' nonces; the consumer's was fixed in its offer",
        )


LIMITATIONS: Final = (
    "that the model was really run: nothing here was re-executed, the signature makes the provider liable for it",
    "that the text spells the tokens, or that the prompt has as many as stated: both take the model's tokenizer",
    "that the provider fixed its nonce before it saw the consumer's: only the consumer could watch that",
    "that the hardware is what the provider says: it is self-declared, not attested",
    "that anything was paid",
)
"""What a proof in this form does not show, in words."""

CHECKS: Final = ("format", "provider signature", "consumer signature", "offer", "input", "seed", "tokens", "text")
"""The checks of `verify_proof`, in order."""


def encode_proof(file: ProofFile) -> bytes:
    """The bytes of a proof file. Raises LocalError when a field is out of bounds."""
    return cbor.encode(wire.to_value(file))


def verify_proof(data: bytes) -> VerifiedProof:
    """Check a proof file. Pure and offline; the clock plays no part. Raises ProofInvalid."""
    file = _read(data)
    proof = _open(file, file.proof, Proof, "provider signature")
    offer = _open(file, file.offer, Offer, "consumer signature")
    verified = VerifiedProof(file, proof, offer)
    check_offer_match(proof.body, offer)
    _check_openings(verified)
    return verified


def check_offer_match(proof: Proof, offer: Envelope[Offer]) -> None:
    """Check that a proof answers an offer on its terms. Raises ProofInvalid."""
    asked = offer.body
    job_id = derive_job_id(offer.sender, asked.input_commitment, asked.nonce_commitment)
    for holds, problem in (
        (proof.offer_digest == offer.digest, "it answers another offer"),
        (proof.consumer == offer.sender, "it names another consumer"),
        (proof.job_id == asked.job_id == job_id, "it names another job"),
        (proof.model_root == asked.model_root, "it names another model"),
        (proof.input_commitment == asked.input_commitment, "it commits to another prompt"),
        (proof.temperature_milli == asked.temperature_milli, "it was sampled at another temperature"),
        (proof.output_tokens <= asked.max_tokens, "it has more tokens than were asked for"),
        (proof.first_token <= proof.output_tokens, "its own part begins behind its end"),
        (0 < proof.input_tokens <= max_input_tokens(asked), "it counts more prompt tokens than the prompt can have"),
    ):
        if not holds:
            check = "offer"
            raise ProofInvalid(check, problem)


def _read(data: bytes) -> ProofFile:
    try:
        file = wire.from_value(ProofFile, cbor.decode(data, max_bytes=MAX_PROOF_BYTES))
    except (cbor.CborError, wire.Malformed) as error:
        check = "format"
        raise ProofInvalid(check, f"not a proof file ({error.message})") from None
    if file.magic != MAGIC:
        check = "format"
        raise ProofInvalid(check, "not a proof file of this version")
    return file


def _open(file: ProofFile, data: bytes, body: type[B], check: str) -> Envelope[B]:
    try:
        return open_envelope(data, body, network=file.network, now=None)
    except MessageRefused as error:
        raise ProofInvalid(check, f"its {body.__name__.lower()} is refused: {error.message}") from None


def _check_openings(verified: VerifiedProof) -> None:
    file, proof, offer = verified.file, verified.proof.body, verified.offer.body
    seed = derive_seed(file.consumer_nonce, proof.provider_nonce, proof.job_id)
    for check, holds, problem in (
        ("input", input_commitment(file.conversation, file.salt) == offer.input_commitment, "the prompt is another"),
        ("input", input_bytes(file.conversation) == offer.input_bytes, "the prompt has another length"),
        ("input", len(file.conversation.turns) == offer.input_turns, "the prompt has another number of turns"),
        ("seed", nonce_commitment(file.consumer_nonce) == offer.nonce_commitment, "the consumer's nonce is another"),
        ("seed", seed == proof.seed, "the sampling seed does not follow from the nonces"),
        ("tokens", len(file.tokens) == proof.output_tokens, "the number of tokens is another"),
        ("tokens", tokens_digest(proof.job_id, file.tokens) == proof.tokens_hash, "the tokens are others"),
        ("text", text_digest(proof.job_id, file.text) == proof.text_hash, "the text is another"),
    ):
        if not holds:
            raise ProofInvalid(check, problem)
