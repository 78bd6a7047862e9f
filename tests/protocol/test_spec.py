"""The specification: its generated parts are up to date, and the code agrees with the test vectors.

The vectors are read as another implementation would read them: from the JSON alone.
"""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from aci_p2p.protocol import cbor, wire
from aci_p2p.protocol.cbor import CborError, Value
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
from aci_p2p.protocol.envelope import MAX_SKEW_MS, kind_of, open_envelope
from aci_p2p.protocol.hashing import digest
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.messages import KINDS, Abort, Conversation, Kind
from aci_p2p.protocol.proof import CHECKS, LIMITATIONS, MAX_PROOF_BYTES, ProofInvalid, verify_proof
from aci_p2p.protocol.sealing import Binding, OpeningKey
from aci_p2p.protocol.validation import MessageRefused, Reason

SPEC = Path(__file__).resolve().parents[2] / "spec"


def vectors(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((SPEC / "vectors" / f"{name}.json").read_text(encoding="utf-8"))
    return data


CBOR, COMMITMENTS, ENVELOPE, PROOF, SEALING = map(vectors, ("cbor", "commitments", "envelope", "proof", "sealing"))


def test_generated_files_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SPEC), *sys.path])
    generated: dict[str, str] = runpy.run_path(str(SPEC / "generate.py"))["generated"]()
    stale = [path for path, text in generated.items() if (SPEC / path).read_text(encoding="utf-8") != text]
    assert not stale, "run: python spec/generate.py"
    assert {f"vectors/{path.name}" for path in (SPEC / "vectors").iterdir()} < generated.keys()


def test_index_names_every_document() -> None:
    index = (SPEC / "README.md").read_text(encoding="utf-8")
    for path in SPEC.iterdir():
        assert path.name in index or path.name in ("README.md", "__pycache__"), path


# Written by hand, but held to the code where it states numbers and names.


def test_checks_name_every_reason() -> None:
    text = (SPEC / "checks.md").read_text(encoding="utf-8")
    unused = {Reason.OK, Reason.VALIDATOR_FAILED}
    assert [reason for reason in Reason if f"`{reason}`" not in text and reason not in unused] == []


def test_proof_names_every_check_and_limitation() -> None:
    text = (SPEC / "proof.md").read_text(encoding="utf-8")
    assert [check for check in CHECKS if f"| {check} |" not in text] == []
    assert [limitation for limitation in LIMITATIONS if limitation not in " ".join(text.split())] == []
    assert f"{MAX_PROOF_BYTES:,} bytes" in text


def test_encoding_states_the_limits() -> None:
    text = (SPEC / "encoding.md").read_text(encoding="utf-8")
    for limit in (cbor.MAX_BYTES, cbor.MAX_ITEMS, MAX_SKEW_MS):
        assert f"{limit:,}" in text
    lives = {60_000: "60 s", 3 * 3_600_000: "3 h", 10 * 365 * 24 * 3_600_000: "10 years"}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    for kind, rules in KINDS.items():
        expected = [str(kind.value), kind.name, f"{rules.max_bytes:,}", lives[rules.lifetime_ms]]
        assert expected in [[*row[:2], *row[3:]] for row in rows]


# CBOR.


def diagnostic(value: Value) -> str:
    """RFC 8949 section 8."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, bytes):
        return f"h'{value.hex()}'"
    if isinstance(value, list):
        return f"[{', '.join(map(diagnostic, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {diagnostic(item)}' for key, item in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("vector", CBOR["valid"], ids=lambda vector: vector["diagnostic"][:30])
def test_cbor(vector: dict[str, str]) -> None:
    data = bytes.fromhex(vector["hex"])
    value = cbor.decode(data)
    assert diagnostic(value) == vector["diagnostic"]
    assert cbor.encode(value) == data


@pytest.mark.parametrize("vector", CBOR["invalid"], ids=lambda vector: vector["why"])
def test_cbor_refused(vector: dict[str, str]) -> None:
    with pytest.raises(CborError):
        cbor.decode(bytes.fromhex(vector["hex"]))


# Commitments.


def test_commitments() -> None:
    def given(name: str) -> bytes:
        return bytes.fromhex(COMMITMENTS[name])

    conversation = wire.from_value(Conversation, cbor.decode(given("conversation")))
    consumer, provider = NodeId(given("consumer")), NodeId(given("provider"))
    job_id, tokens, text = given("job_id"), COMMITMENTS["tokens"], COMMITMENTS["text"]
    assert input_bytes(conversation) == COMMITMENTS["input_bytes"]
    assert input_commitment(conversation, given("salt")) == given("input_commitment")
    assert nonce_commitment(given("consumer_nonce")) == given("nonce_commitment")
    assert derive_job_id(consumer, given("input_commitment"), given("nonce_commitment")) == job_id
    assert derive_seed(given("consumer_nonce"), given("provider_nonce"), job_id) == given("seed")
    assert tokens_digest(job_id, tokens) == given("tokens_digest")
    assert text_digest(job_id, text) == given("text_digest")
    assert output_root(given("tokens_digest"), given("text_digest")) == given("output_root")
    commitment = output_commitment(job_id, provider, given("output_root"), given("output_salt"))
    assert commitment == given("output_commitment")


def test_a_sealed_prompt() -> None:
    def given(name: str) -> bytes:
        return bytes.fromhex(SEALING[name])

    key = OpeningKey(given("kem_seed"))
    assert key.public == given("kem_key")
    parties = NodeId(given("consumer")), NodeId(given("provider"))
    binding = Binding(SEALING["network"], given("job_id"), *parties, given("award_digest"))
    names = ("job_id", "consumer", "provider", "award_digest")
    assert hashed("sealed-input", SEALING["network"].encode(), *map(given, names)) == binding.info() == given("info")
    assert cbor.encode(wire.to_value(key.open(given("sealed"), binding))) == given("opening")


FORMULAS = {
    "input_commitment": ("input", "salt", "conversation"),
    "nonce_commitment": ("consumer-nonce", "consumer_nonce"),
    "job_id": ("job", "consumer", "input_commitment", "nonce_commitment"),
    "seed": ("seed", "consumer_nonce", "provider_nonce", "job_id"),
    "output_root": ("output", "tokens_digest", "text_digest"),
    "output_commitment": ("output-commitment", "job_id", "provider", "output_root", "output_salt"),
}
"""As in proof.md: what goes into each hash, in order, behind its domain."""


def hashed(domain: str, *parts: bytes) -> bytes:
    """As in encoding.md, without our code."""
    framed = [len(part).to_bytes(8, "big") + part for part in (b"aci-p2p/1/" + domain.encode(), *parts)]
    return hashlib.sha256(b"".join(framed)).digest()


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name: str) -> None:
    domain, *parts = FORMULAS[name]
    assert hashed(domain, *(bytes.fromhex(COMMITMENTS[part]) for part in parts)).hex() == COMMITMENTS[name]
    text = (SPEC / "proof.md").read_text(encoding="utf-8")
    assert f"| `{domain}` | {', '.join(parts).replace('_', ' ')} |" in text


def test_formulas_of_the_output() -> None:
    job_id = bytes.fromhex(COMMITMENTS["job_id"])
    tokens = b"".join(token.to_bytes(4, "little") for token in COMMITMENTS["tokens"])
    assert hashed("tokens", job_id, tokens).hex() == COMMITMENTS["tokens_digest"]
    assert hashed("text", job_id, COMMITMENTS["text"].encode()).hex() == COMMITMENTS["text_digest"]


@pytest.mark.parametrize("vector", COMMITMENTS["digest"], ids=lambda vector: "+".join(vector["parts"]))
def test_digest(vector: dict[str, Any]) -> None:
    parts = [bytes.fromhex(part) for part in vector["parts"]]
    assert digest(vector["domain"], *parts).hex() == hashed(vector["domain"], *parts).hex() == vector["hash"]


# Envelopes.


@pytest.mark.parametrize("vector", ENVELOPE["keys"].values(), ids=ENVELOPE["keys"])
def test_keys(vector: dict[str, str]) -> None:
    node = KeyPair(bytes.fromhex(vector["seed"])).node_id
    assert node.public_key.hex() == vector["public_key"]
    assert str(node) == vector["peer_id"]
    assert NodeId.parse(vector["peer_id"]) == node


@pytest.mark.parametrize("vector", ENVELOPE["valid"], ids=lambda vector: vector["kind"])
def test_envelopes(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    kind = Kind[vector["kind"]]
    envelope = open_envelope(data, KINDS[kind].body, network=ENVELOPE["network"], now=ENVELOPE["now"])
    header = envelope.header
    assert kind_of(data) is header.kind is kind
    assert envelope.digest.hex() == vector["digest"] == hashed("envelope", data).hex()
    assert header.sender.public_key.hex() == vector["sender"]
    assert header.body.hex() == vector["body"]
    assert header.signature.hex() == vector["signature"]
    assert (header.sequence, header.issued_at, header.expires_at) == (
        vector["sequence"], vector["issued_at"], vector["expires_at"],
    )  # fmt: skip
    assert cbor.encode(wire.to_value(envelope.body)).hex() == vector["body"]

    # The signed bytes, without our envelope code.
    value = cbor.decode(data)
    assert isinstance(value, dict)
    del value[9]
    signed = hashed(f"sign/{vector['kind']}", ENVELOPE["network"].encode(), cbor.encode(value))
    assert signed.hex() == vector["signed"]
    header.sender.verify(signed, header.signature)


def test_a_vector_for_every_kind() -> None:
    assert [vector["kind"] for vector in ENVELOPE["valid"]] == [kind.name for kind in Kind]


@pytest.mark.parametrize("vector", ENVELOPE["invalid"], ids=lambda vector: vector["why"])
def test_envelopes_refused(vector: dict[str, str]) -> None:
    with pytest.raises(MessageRefused) as caught:
        open_envelope(bytes.fromhex(vector["hex"]), Abort, network=ENVELOPE["network"], now=ENVELOPE["now"])
    validation = caught.value.validation
    assert (validation.decision.value, validation.reason) == (vector["decision"], vector["reason"])


# Proofs.


@pytest.mark.parametrize("vector", PROOF["valid"], ids=["good"])
def test_proofs(vector: dict[str, Any]) -> None:
    verified = verify_proof(bytes.fromhex(vector["hex"]))
    assert verified.proof.sender.public_key.hex() == vector["provider"]
    assert verified.offer.sender.public_key.hex() == vector["consumer"]
    assert (list(verified.file.tokens), verified.file.text) == (vector["tokens"], vector["text"])


@pytest.mark.parametrize("vector", PROOF["invalid"], ids=lambda vector: vector["why"])
def test_proofs_refused(vector: dict[str, str]) -> None:
    with pytest.raises(ProofInvalid) as caught:
        verify_proof(bytes.fromhex(vector["hex"]))
    assert caught.value.check == vector["check"]


def test_a_vector_for_every_check() -> None:
    assert {vector["check"] for vector in PROOF["invalid"]} == set(CHECKS)
