"""Proof files: one good one, and every way in which one can be bad."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aci_p2p.protocol.commitments import (
    derive_job_id,
    derive_seed,
    input_bytes,
    input_commitment,
    nonce_commitment,
    text_digest,
    tokens_digest,
)
from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.errors import LocalError, RemoteError
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.lifecycle import State
from aci_p2p.protocol.messages import MAX_TOKENS, Conversation, Offer, Turn
from aci_p2p.protocol.proof import (
    CHECKS,
    LIMITATIONS,
    MAX_ANSWER_BYTES,
    MAX_PROOF_BYTES,
    ProofFile,
    ProofInvalid,
    encode_proof,
    verify_proof,
)
from tests.protocol.driver import (
    CONSUMER,
    CONVERSATION,
    INPUT_TOKENS,
    NETWORK,
    NOW,
    PROVIDER,
    PROVIDER_SECRETS,
    SECRETS,
    STRANGER,
    TEXT,
    TOKENS,
    ConsumerBench,
    alter,
    make_bid,
    make_offer,
    make_proof,
)

OFFER = make_offer()
GOOD = ConsumerBench().reach(State.PENDING).last.proof
MOST_PROMPT_TOKENS = input_bytes(CONVERSATION) + 2 * 16 + 128


@dataclass
class Forger:
    """Makes proof files with the keys of both sides, or its own, so that no signature covers up a bad field."""

    offer: dict[str, Any] = field(default_factory=dict[str, Any])
    """Changes to the offer, signed."""
    proof: dict[str, Any] = field(default_factory=dict[str, Any])
    """Changes to the proof, signed; hashes that follow from them are kept as an honest provider would have them."""
    file: dict[str, Any] = field(default_factory=dict[str, Any])
    """Changes to the file."""
    consumer: KeyPair = CONSUMER
    provider: KeyPair = PROVIDER
    signed_for: str = NETWORK

    def make(self) -> bytes:
        offer: Envelope[Offer] = Sealer(self.consumer, self.signed_for).seal(alter(OFFER.body, **self.offer), NOW)
        job_id = self.proof.get("job_id", offer.body.job_id)
        nonce = self.file.get("consumer_nonce", SECRETS.nonce)
        follows = {
            "tokens_hash": tokens_digest(job_id, TOKENS),
            "text_hash": text_digest(job_id, TEXT),
            "seed": derive_seed(nonce, self.proof.get("provider_nonce", PROVIDER_SECRETS.nonce), job_id),
        }
        body = make_proof(offer, make_bid(offer), **{**follows, **self.proof})
        proof = Sealer(self.provider, self.signed_for).seal(body, NOW)
        file = ProofFile(
            magic="aci-proof/1",
            network=NETWORK,
            proof=proof.data,
            offer=offer.data,
            conversation=CONVERSATION,
            salt=SECRETS.salt,
            consumer_nonce=SECRETS.nonce,
            tokens=TOKENS,
            text=TEXT,
        )
        return encode_proof(alter(file, **self.file))


def refuse(data: bytes, check: str, problem: str) -> None:
    with pytest.raises(ProofInvalid) as caught:
        verify_proof(data)
    error = caught.value
    assert (error.check, error.code) == (check, "proof_invalid")
    assert check in CHECKS
    assert isinstance(error, RemoteError)
    assert error.message.startswith("the proof does not hold: ")
    assert problem in error.message


def test_a_good_proof() -> None:
    verified = verify_proof(GOOD)
    assert encode_proof(verified.file) == GOOD
    assert (verified.proof.sender, verified.offer.sender) == (PROVIDER.node_id, CONSUMER.node_id)
    assert (verified.file.text, verified.file.tokens) == (TEXT, TOKENS)
    assert verified.proof.body.input_tokens == INPUT_TOKENS


def test_a_forger_who_changes_nothing() -> None:
    """The forgeries below fail for what they change."""
    assert verify_proof(Forger().make()).file.text == TEXT


def test_statements() -> None:
    verified = verify_proof(GOOD)
    statements = verified.statements()
    assert statements == (
        f"provider {PROVIDER.node_id} signed this answer of 3 tokens and cannot deny it",
        f"consumer {CONSUMER.node_id} asked for it: the prompt in the file is the one its offer committed to",
        f"the provider states that it ran the model with weights root {'05' * 32}",
        "the provider states that it ran it on fake/1 (fp32-ref, cpu), at temperature 0.7",
        "the sampling seed follows from both sides' nonces; the consumer's was fixed in its offer",
    )
    greedy = verify_proof(Forger({"temperature_milli": 0}, {"temperature_milli": 0}).make())
    assert greedy.statements()[3] == "the provider states that it ran it on fake/1 (fp32-ref, cpu), greedily"
    assert len(LIMITATIONS) == 5


# Any change.


def test_no_byte_may_change() -> None:
    for at in range(len(GOOD)):
        for mask in (0x01, 0x80):
            changed = bytearray(GOOD)
            changed[at] ^= mask
            with pytest.raises(ProofInvalid):
                verify_proof(bytes(changed))


@settings(max_examples=300)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_no_byte_may_have_another_value(at: int, value: int) -> None:
    changed = bytearray(GOOD)
    changed[at] = value
    if value == GOOD[at]:
        verify_proof(bytes(changed))
        return
    with pytest.raises(ProofInvalid):
        verify_proof(bytes(changed))


def test_nothing_may_be_missing() -> None:
    for end in range(len(GOOD)):
        refuse(GOOD[:end], "format", "not a proof file")


@given(st.binary(min_size=1, max_size=40))
def test_nothing_may_follow(more: bytes) -> None:
    refuse(GOOD + more, "format", "trailing bytes")


@settings(max_examples=200)
@given(st.binary(max_size=100))
def test_any_bytes(data: bytes) -> None:
    refuse(data, "format", "not a proof file")


# Each check, for its own reason.


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ({"magic": "aci-proof/2"}, "not a proof file of this version"),
        ({"magic": ""}, "not a proof file of this version"),
    ],
)
def test_format(file: dict[str, Any], problem: str) -> None:
    refuse(Forger(file=file).make(), "format", problem)


def test_size() -> None:
    refuse(GOOD + bytes(MAX_PROOF_BYTES), "format", f"more than {MAX_PROOF_BYTES} bytes")


@pytest.mark.parametrize("changed", [{"network": "aci-main"}, {"network": ""}, {"proof": OFFER.data}, {"proof": b"\0"}])
def test_provider_signature(changed: dict[str, Any]) -> None:
    refuse(Forger(file=changed).make(), "provider signature", "its proof is refused")


def test_a_signature_of_the_provider_that_does_not_verify() -> None:
    signed = verify_proof(GOOD).proof.data
    forged = Forger(file={"proof": signed[:-1] + bytes([signed[-1] ^ 1])}).make()
    refuse(forged, "provider signature", "bad signature")


@pytest.mark.parametrize("data", [verify_proof(GOOD).proof.data, b"\0", make_offer(Sealer(CONSUMER, "aci-main")).data])
def test_consumer_signature(data: bytes) -> None:
    refuse(Forger(file={"offer": data}).make(), "consumer signature", "its offer is refused")


def test_a_signature_of_the_consumer_that_does_not_verify() -> None:
    forged = Forger(file={"offer": OFFER.data[:-1] + bytes([OFFER.data[-1] ^ 1])}).make()
    refuse(forged, "consumer signature", "bad signature")


def test_envelopes_of_another_network() -> None:
    assert verify_proof(Forger(signed_for="aci-main", file={"network": "aci-main"}).make())
    refuse(Forger(signed_for="aci-main").make(), "provider signature", "wrong network")


OTHER = bytes([0xEE]) * 32


@pytest.mark.parametrize(
    ("proof", "problem"),
    [
        ({"offer_digest": OTHER}, "it answers another offer"),
        ({"consumer": STRANGER.node_id}, "it names another consumer"),
        ({"job_id": OTHER}, "it names another job"),
        ({"model_root": OTHER}, "it names another model"),
        ({"input_commitment": OTHER}, "it commits to another prompt"),
        ({"temperature_milli": 701}, "it was sampled at another temperature"),
        ({"output_tokens": 9}, "it has more tokens than were asked for"),
        ({"input_tokens": 0}, "it counts more prompt tokens than the prompt can have"),
        ({"input_tokens": MOST_PROMPT_TOKENS + 1}, "it counts more prompt tokens than the prompt can have"),
    ],
)
def test_offer(proof: dict[str, Any], problem: str) -> None:
    refuse(Forger(proof=proof).make(), "offer", problem)


def test_counts_at_their_edges() -> None:
    assert verify_proof(Forger(proof={"input_tokens": MOST_PROMPT_TOKENS}).make())
    assert verify_proof(Forger(proof={"input_tokens": 1}).make())
    assert verify_proof(Forger(offer={"max_tokens": 3}).make())


def test_an_offer_signed_anew() -> None:
    """The same consumer and job on other terms: the proof was not given for these."""
    body = replace(OFFER.body, max_price=1)
    other = Sealer(CONSUMER, NETWORK).seal(body, NOW)
    refuse(Forger(file={"offer": other.data}).make(), "offer", "it answers another offer")


def test_an_offer_taken_over() -> None:
    """A stranger signs the consumer's offer as its own, and a provider in league answers it."""
    refuse(Forger(consumer=STRANGER).make(), "offer", "it names another job")


@pytest.mark.parametrize("field_name", ["job_id", "input_commitment", "nonce_commitment"])
def test_a_job_id_that_does_not_follow(field_name: str) -> None:
    refuse(Forger(offer={field_name: OTHER}).make(), "offer", "it names another job")


def test_a_stranger_may_answer_its_own_job() -> None:
    commitments = input_commitment(CONVERSATION, SECRETS.salt), nonce_commitment(SECRETS.nonce)
    job_id = derive_job_id(STRANGER.node_id, *commitments)
    verified = verify_proof(Forger(offer={"job_id": job_id}, consumer=STRANGER, provider=STRANGER).make())
    assert verified.proof.sender == verified.offer.sender == STRANGER.node_id


@pytest.mark.parametrize(
    "file",
    [
        {"salt": OTHER},
        {"conversation": Conversation((Turn("system", "Be brief."), Turn("user", "Où est la gare !")))},
        {"conversation": Conversation(CONVERSATION.turns[::-1])},
        {"conversation": Conversation((Turn("user", "Be brief."), *CONVERSATION.turns[1:]))},
        {"conversation": Conversation(CONVERSATION.turns[:1])},
        {"conversation": Conversation(())},
    ],
)
def test_input(file: dict[str, Any]) -> None:
    refuse(Forger(file=file).make(), "input", "the prompt is another")


@pytest.mark.parametrize("by", [-1, 1])
def test_input_size(by: int) -> None:
    size = OFFER.body.input_bytes + by
    refuse(Forger(offer={"input_bytes": size}).make(), "input", "the prompt has another length")
    turns = OFFER.body.input_turns + by
    refuse(Forger(offer={"input_turns": turns}).make(), "input", "the prompt has another number of turns")


def test_seed() -> None:
    refuse(Forger(file={"consumer_nonce": OTHER}).make(), "seed", "the consumer's nonce is another")
    problem = "the sampling seed does not follow from the nonces"
    refuse(Forger(proof={"seed": OTHER}).make(), "seed", problem)
    swapped = derive_seed(PROVIDER_SECRETS.nonce, SECRETS.nonce, OFFER.body.job_id)
    refuse(Forger(proof={"seed": swapped}).make(), "seed", problem)
    stale = derive_seed(SECRETS.nonce, PROVIDER_SECRETS.nonce, OFFER.body.job_id)
    refuse(Forger(proof={"provider_nonce": OTHER, "seed": stale}).make(), "seed", problem)
    assert verify_proof(Forger(proof={"provider_nonce": OTHER}).make())


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        (TOKENS[:-1], "the number of tokens is another"),
        ((*TOKENS, 1), "the number of tokens is another"),
        ((), "the number of tokens is another"),
        (TOKENS[::-1], "the tokens are others"),
        ((*TOKENS[:-1], 14), "the tokens are others"),
        ((*TOKENS[:-1], 13 + 2**24), "the tokens are others"),
    ],
)
def test_tokens(tokens: tuple[int, ...], problem: str) -> None:
    refuse(Forger(file={"tokens": tokens}).make(), "tokens", problem)


def test_the_number_of_tokens_that_was_signed() -> None:
    refuse(Forger(proof={"output_tokens": 2}).make(), "tokens", "the number of tokens is another")
    refuse(Forger(proof={"tokens_hash": OTHER}).make(), "tokens", "the tokens are others")


@pytest.mark.parametrize("text", ["", TEXT + " ", TEXT.upper(), TEXT[::-1]])
def test_text(text: str) -> None:
    refuse(Forger(file={"text": text}).make(), "text", "the text is another")
    refuse(Forger(proof={"text_hash": OTHER}).make(), "text", "the text is another")


def test_hashes_are_bound_to_the_job() -> None:
    """The right tokens and text, hashed for another job."""
    refuse(Forger(proof={"tokens_hash": tokens_digest(OTHER, TOKENS)}).make(), "tokens", "the tokens are others")
    refuse(Forger(proof={"text_hash": text_digest(OTHER, TEXT)}).make(), "text", "the text is another")


# Bounds.


@pytest.mark.parametrize(
    "file",
    [
        {"text": "x" * (MAX_ANSWER_BYTES + 1)},
        {"tokens": (0,) * (MAX_TOKENS + 1)},
        {"tokens": (1 << 32,)},
        {"magic": "aci-proof/10"},
        {"salt": b""},
        {"proof": bytes(4_097)},
        {"network": "x" * 33},
    ],
)
def test_what_no_file_holds(file: dict[str, Any]) -> None:
    with pytest.raises(LocalError):
        Forger(file=file).make()


def test_the_largest_answer_to_the_largest_prompt() -> None:
    turns = tuple(Turn("u" * 16, "x" * 496) for _ in range(1_024))
    conversation, tokens, text = Conversation(turns), (2**32 - 1,) * MAX_TOKENS, "é" * (MAX_ANSWER_BYTES // 2)
    commitments = input_commitment(conversation, SECRETS.salt), nonce_commitment(SECRETS.nonce)
    job_id = derive_job_id(CONSUMER.node_id, *commitments)
    data = Forger(
        offer={
            "job_id": job_id, "input_commitment": commitments[0], "input_bytes": 512 << 10, "input_turns": 1_024,
            "max_tokens": MAX_TOKENS,
        },
        proof={
            "output_tokens": MAX_TOKENS, "tokens_hash": tokens_digest(job_id, tokens),
            "text_hash": text_digest(job_id, text),
        },
        file={"conversation": conversation, "tokens": tokens, "text": text},
    ).make()  # fmt: skip
    assert len(data) <= MAX_PROOF_BYTES
    assert verify_proof(data).file.text == text
