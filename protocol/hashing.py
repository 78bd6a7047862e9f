"""Domain-separated SHA-256, so that no hash made for one purpose can stand for another."""

from __future__ import annotations

import hashlib
from typing import Final

DIGEST_BYTES: Final = 32
"""SHA-256 (FIPS 180-4)."""

_PREFIX: Final = b"aci-p2p/1/"


def digest(domain: str, *parts: bytes) -> bytes:
    """SHA-256 over the domain and the parts, each behind its length as 8 bytes big-endian; 32 bytes."""
    state = hashlib.sha256()
    for part in (_PREFIX + domain.encode("ascii"), *parts):
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.digest()
