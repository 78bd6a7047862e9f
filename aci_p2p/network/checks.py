"""Checks on what our own code hands to the network: wrong use is a LocalError, whatever the transport."""

from __future__ import annotations

from aci_p2p.network.api import MAX_FRAME_BYTES, MAX_GOSSIP_BYTES, MAX_RECORD_BYTES, MAX_RECORD_KEY_BYTES
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId

RECORD_NAMESPACE = "/aci/"
"""Prefix of every DHT value's key."""
PROVIDER_KEY_BYTES = 32
"""Length of a provider key: a SHA-256 digest."""


def check_frame(frame: bytes) -> None:
    """Raises LocalError for a frame over MAX_FRAME_BYTES."""
    if len(frame) > MAX_FRAME_BYTES:
        msg = f"a frame of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}"
        raise LocalError(msg)


def check_gossip(data: bytes) -> None:
    """Raises LocalError for a gossip message over MAX_GOSSIP_BYTES."""
    if len(data) > MAX_GOSSIP_BYTES:
        msg = f"a gossip message of {len(data)} bytes is over the limit of {MAX_GOSSIP_BYTES}"
        raise LocalError(msg)


def check_record(key: str, value: bytes) -> None:
    """Raises LocalError for a key outside `/aci/` or too long, and for a value over MAX_RECORD_BYTES."""
    if not key.startswith(RECORD_NAMESPACE) or len(key.encode()) > MAX_RECORD_KEY_BYTES:
        msg = f"a record key is {RECORD_NAMESPACE}... of at most {MAX_RECORD_KEY_BYTES} bytes, not {key[:80]!r}"
        raise LocalError(msg)
    if len(value) > MAX_RECORD_BYTES:
        msg = f"a record of {len(value)} bytes is over the limit of {MAX_RECORD_BYTES}"
        raise LocalError(msg)


def check_provider_key(key: bytes) -> None:
    """Raises LocalError for a key that is not a SHA-256 digest."""
    if len(key) != PROVIDER_KEY_BYTES:
        msg = f"a provider key is {PROVIDER_KEY_BYTES} bytes, not {len(key)}"
        raise LocalError(msg)


def peer_alone(address: str) -> NodeId | None:
    """The peer of `/p2p/<peer id>`; None for a multiaddr that says more. Raises LocalError."""
    match address.split("/"):
        case ["", "p2p", peer]:
            return NodeId.parse(peer)
        case _:
            return None
