"""Domain-separated SHA-256, so that no hash made for one purpose can stand for another."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final

DIGEST_BYTES: Final = 32
"""SHA-256 (FIPS 180-4)."""

_PREFIX: Final = b"aci-p2p/1/"
_DOMAINS_MAX: Final = 64
"""Domains whose encoding is kept; ACI has under 30."""


def digest(domain: str, *parts: bytes) -> bytes:
    """SHA-256 over the domain and the parts, each behind its length as 8 bytes big-endian; 32 bytes."""
    state = hashlib.sha256(_domain(domain))
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.digest()


@lru_cache(_DOMAINS_MAX)
def _domain(name: str) -> bytes:
    """A domain as it is hashed."""
    domain = _PREFIX + name.encode("ascii")
    return len(domain).to_bytes(8, "big") + domain
