"""The prompt, sealed to the provider that has won: nobody else reads it, whoever carries or logs its frame.

HPKE (RFC 9180), base mode, with MLKEM768-X25519 (X-Wing: draft-connolly-cfrg-xwing-kem), HKDF-SHA256 and
ChaCha20-Poly1305: safe while either of X25519 and ML-KEM-768 is. The provider makes a key for each job and puts it into
its signed ACCEPT. A key follows from its seed; sealing draws randomness of its own, inside the library.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from aci_p2p.protocol import cbor, wire
from aci_p2p.protocol.hashing import digest
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import KEM_KEY_BYTES, Opening
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason

_SUITE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_MLKEM_SEED_BYTES: Final = 64
_X25519_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Binding:
    """The job that a prompt is sealed for. What is sealed for one opens for no other."""

    network: str
    """Network id."""
    job_id: bytes
    """32 bytes."""
    consumer: NodeId
    """Who seals."""
    provider: NodeId
    """Who opens."""
    award_digest: bytes
    """Digest of the award's envelope, 32 bytes."""

    def info(self) -> bytes:
        """HPKE's `info`, 32 bytes."""
        parties = (self.consumer.public_key, self.provider.public_key)
        return digest("sealed-input", self.network.encode(), self.job_id, *parties, self.award_digest)


class OpeningKey:
    """A provider's key for one job."""

    def __init__(self, seed: bytes) -> None:
        """`seed`: 32 fresh random bytes, X-Wing's decapsulation key."""
        expanded = hashlib.shake_256(seed).digest(_MLKEM_SEED_BYTES + _X25519_BYTES)
        mlkem = MLKEM768PrivateKey.from_seed_bytes(expanded[:_MLKEM_SEED_BYTES])
        x25519 = X25519PrivateKey.from_private_bytes(expanded[_MLKEM_SEED_BYTES:])
        self._key = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        """X-Wing's encapsulation key, 1,216 bytes."""

    def open(self, sealed: bytes, binding: Binding) -> Opening:
        """What was sealed to this key for this job. Raises MessageRefused."""
        try:
            return wire.from_value(Opening, cbor.decode(_SUITE.decrypt(sealed, self._key, binding.info())))
        except InvalidTag:
            # Sealed to this key, for this job, and not altered.
            raise MessageRefused(Decision.REJECT, Reason.BAD_SEAL) from None
        except (cbor.CborError, wire.Malformed) as error:
            # An opening, in deterministic CBOR.
            raise MessageRefused(Decision.REJECT, Reason.MALFORMED, error.message) from None


def seal_opening(opening: Opening, key: bytes, binding: Binding) -> bytes:
    """Seal what goes to the winner alone; `key` is the one of its ACCEPT, 1,216 bytes.

    Raises MessageRefused when it is no key, LocalError when the opening is out of bounds.
    """
    plaintext = cbor.encode(wire.to_value(opening))
    edge = KEM_KEY_BYTES - _X25519_BYTES
    try:
        public = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(key[:edge]), X25519PublicKey.from_public_bytes(key[edge:])
        )
        return _SUITE.encrypt(plaintext, public, binding.info())
    except ValueError:
        # A key, and none for which everybody knows the secret.
        raise MessageRefused(Decision.REJECT, Reason.BAD_SEAL, "no key to seal to") from None
