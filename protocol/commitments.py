"""What is hashed, and under which domain: job ids, commitments, seeds and output digests. All results are 32 bytes."""

from __future__ import annotations

from collections.abc import Iterable

from aci_p2p.protocol import cbor, wire
from aci_p2p.protocol.hashing import digest
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import Conversation


def input_commitment(conversation: Conversation, salt: bytes) -> bytes:
    """Commits to a conversation; the 32-byte salt keeps short prompts from being guessed."""
    return digest("input", salt, cbor.encode(wire.to_value(conversation)))


def nonce_commitment(consumer_nonce: bytes) -> bytes:
    """Commits to the consumer's part of the seed before the provider fixes its own."""
    return digest("consumer-nonce", consumer_nonce)


def derive_job_id(consumer: NodeId, inputs: bytes, nonce: bytes) -> bytes:
    """The job's id, from its consumer and both of the offer's commitments."""
    return digest("job", consumer.public_key, inputs, nonce)


def derive_seed(consumer_nonce: bytes, provider_nonce: bytes, job_id: bytes) -> bytes:
    """The sampling seed. Neither side can steer it: the consumer commits first, the provider answers blind."""
    return digest("seed", consumer_nonce, provider_nonce, job_id)


def tokens_digest(job_id: bytes, tokens: Iterable[int]) -> bytes:
    """Hash of output token ids, each as 4 bytes little-endian."""
    return digest("tokens", job_id, b"".join(token.to_bytes(4, "little") for token in tokens))


def text_digest(job_id: bytes, text: str) -> bytes:
    """Hash of the output text in UTF-8."""
    return digest("text", job_id, text.encode())


def output_root(tokens_hash: bytes, text_hash: bytes) -> bytes:
    """One hash for the whole output."""
    return digest("output", tokens_hash, text_hash)


def output_commitment(job_id: bytes, provider: NodeId, root: bytes, salt: bytes) -> bytes:
    """What a provider commits to before it reveals: bound to its key, so that a copy opens for nobody else."""
    return digest("output-commitment", job_id, provider.public_key, root, salt)


def input_bytes(conversation: Conversation) -> int:
    """UTF-8 bytes of all turns, as declared in the offer."""
    return sum(len(turn.role.encode()) + len(turn.content.encode()) for turn in conversation.turns)
