"""Who a node is: an Ed25519 key, which is also its libp2p peer id.

Sources: RFC 8032 (Ed25519), libp2p peer-id specification (identity multihash of the protobuf-encoded public key).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import base58
from nacl.exceptions import BadSignatureError as NaclBadSignature
from nacl.signing import SigningKey, VerifyKey

from aci_p2p.protocol.errors import LocalError, RemoteError

PUBLIC_KEY_BYTES = 32
"""Ed25519 public key (RFC 8032 section 5.1.5)."""
SEED_BYTES = 32
"""Ed25519 private seed (RFC 8032 section 5.1.5)."""
SIGNATURE_BYTES = 64
"""Ed25519 signature (RFC 8032 section 5.1.6)."""
PEER_ID_TEXT_MAX = 64
"""Characters; a base58 Ed25519 peer id has 52. Checked before the quadratic base58 decoding."""
MAX_TEXTS = 1_024
"""Node ids that are kept as text, some 200 bytes each, and texts as node ids: twice a node's connections."""

_PEER_ID_PREFIX = bytes.fromhex("002408011220")
"""Identity multihash (0x00), its length (0x24), then protobuf: key type Ed25519 (08 01), 32 bytes of data (12 20)."""


class BadSignature(RemoteError):
    """A signature does not verify under the key it claims."""

    code = "bad_signature"


@dataclass(frozen=True, slots=True, order=True)
class NodeId:
    """A node's public identity."""

    public_key: bytes
    """Ed25519 public key, 32 bytes."""

    def __post_init__(self) -> None:
        if len(self.public_key) != PUBLIC_KEY_BYTES:
            msg = f"a node id is {PUBLIC_KEY_BYTES} bytes, not {len(self.public_key)}"
            raise LocalError(msg)

    @property
    def peer_id(self) -> bytes:
        """The libp2p peer id, 38 bytes."""
        return _PEER_ID_PREFIX + self.public_key

    @property
    def short(self) -> str:
        """Last eight characters of the peer id, for people (all Ed25519 peer ids begin alike)."""
        return str(self)[-8:]

    def __hash__(self) -> int:
        return hash(self.public_key)

    def __str__(self) -> str:
        """The libp2p peer id in base58btc (`12D3Koo...`)."""
        return _text_of(self.public_key)

    def __repr__(self) -> str:
        return f"NodeId({self})"

    @classmethod
    def from_peer_id(cls, peer_id: bytes) -> Self:
        """Read a binary libp2p peer id; raises LocalError when it does not inline an Ed25519 key."""
        if not peer_id.startswith(_PEER_ID_PREFIX) or len(peer_id) != len(_PEER_ID_PREFIX) + PUBLIC_KEY_BYTES:
            msg = "the peer id does not carry an Ed25519 key"
            raise LocalError(msg)
        return cls(peer_id[len(_PEER_ID_PREFIX) :])

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a base58 peer id; raises LocalError when it is malformed or not Ed25519."""
        if len(text) > PEER_ID_TEXT_MAX:
            msg = "the peer id is too long"
            raise LocalError(msg)
        try:
            raw = _bytes_of(text)
        except ValueError:
            msg = f"{text!r} is not a peer id"
            raise LocalError(msg, hint="a peer id looks like 12D3KooW...") from None
        return cls.from_peer_id(raw)

    def verify(self, message: bytes, signature: bytes) -> None:
        """Raise BadSignature unless `signature` (64 bytes) over `message` was made by this node's key."""
        try:
            VerifyKey(self.public_key).verify(message, signature)
        except (NaclBadSignature, ValueError, TypeError):
            msg = f"the signature of {self.short} does not verify"
            raise BadSignature(msg) from None


@lru_cache(maxsize=MAX_TEXTS)
def _bytes_of(text: str) -> bytes:
    # Records and multiaddrs name the same few nodes again and again, and base 58 is slow.
    return base58.b58decode(text)


@lru_cache(maxsize=MAX_TEXTS)
def _text_of(public_key: bytes) -> str:
    # So do logs.
    return base58.b58encode(_PEER_ID_PREFIX + public_key).decode("ascii")


class KeyPair:
    """A node's private key. Its `repr` and pickling never show the seed."""

    __slots__ = ("_signing_key", "node_id")

    node_id: NodeId
    """The public half."""

    def __init__(self, seed: bytes) -> None:
        """`seed`: 32 secret bytes (randomness is the caller's). Raises LocalError on another length."""
        if len(seed) != SEED_BYTES:
            msg = f"a key seed is {SEED_BYTES} bytes, not {len(seed)}"
            raise LocalError(msg)
        self._signing_key = SigningKey(seed)
        self.node_id = NodeId(bytes(self._signing_key.verify_key))

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes, for storage and for the transport's own handshake only."""
        return bytes(self._signing_key)

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature, 64 bytes."""
        return self._signing_key.sign(message).signature

    def __repr__(self) -> str:
        return f"KeyPair({self.node_id})"

    def __reduce__(self) -> str:
        msg = "a private key is not pickled"
        raise TypeError(msg)
