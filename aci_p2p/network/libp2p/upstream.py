"""The parts of py-libp2p that this package uses, loaded without the rest.

Importing any module of py-libp2p runs the `__init__` of the packages around it, and those load QUIC, TLS, ACME and
three HTTP clients: half of the processor time in which a node starts, and a third of its memory. So packages stay empty
while our parts load. Afterwards the parts are forgotten, so that a program that imports py-libp2p itself gets all of
it; one that has done so before shares its own with us. Only another thread must not import py-libp2p at that moment.

py-libp2p is not changed by this, and nothing of its own is replaced.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import get_ident
from types import ModuleType

PACKAGE = "libp2p"
"""Name of py-libp2p's package."""
_KEPT_WHOLE = "libp2p.utils"
"""The package whose `__init__` defines what our parts import from it; it loads nothing else."""
_DONE_WITHOUT = "aioquic"
"""What py-libp2p does without where it is missing: QUIC, which we do not use, for an eighth of the time of a start."""


def _is_upstream(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


class _EmptyPackages(MetaPathFinder):
    """Finds py-libp2p's packages as if their `__init__` were empty, and for this thread QUIC missing."""

    def __init__(self) -> None:
        self._thread = get_ident()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == _DONE_WITHOUT and get_ident() == self._thread:
            msg = "nothing here uses QUIC"
            raise ModuleNotFoundError(msg, name=fullname)
        if not _is_upstream(fullname) or fullname == _KEPT_WHOLE:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        found = next((spec for spec in others if spec is not None), None)
        if found is None or found.submodule_search_locations is None:
            return found
        empty = ModuleSpec(fullname, None, is_package=True)
        empty.submodule_search_locations = found.submodule_search_locations
        return empty


@contextmanager
def _parts_alone() -> Generator[None]:
    """Inside, modules of py-libp2p load without the packages around them, unless those are there already."""
    if PACKAGE in sys.modules:
        yield
        return
    finder = _EmptyPackages()
    sys.meta_path.insert(0, finder)
    try:
        # The package does this when it loads.
        from libp2p.utils.logging import setup_logging  # noqa: PLC0415 - only here is it found alone

        setup_logging()
        yield
    finally:
        sys.meta_path.remove(finder)
        # A copy: other threads may import meanwhile.
        for name in filter(_is_upstream, list(sys.modules)):
            del sys.modules[name]


with _parts_alone():
    from libp2p.abc import IRawConnection, ISecureConn
    from libp2p.connection_types import ConnectionType
    from libp2p.crypto.ed25519 import create_new_key_pair as create_ed25519_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
    from libp2p.host.autonat.pb.autonat_pb2 import Message as AutoNatMessage
    from libp2p.identity.identify.pb.identify_pb2 import Identify
    from libp2p.kad_dht.pb.kademlia_pb2 import Message as KademliaMessage
    from libp2p.kad_dht.pb.kademlia_pb2 import Record
    from libp2p.peer.id import ID  # pyright: ignore[reportMissingTypeStubs] - py.typed, but it says otherwise
    from libp2p.peer.pb.crypto_pb2 import PublicKey
    from libp2p.peer.pb.envelope_pb2 import Envelope
    from libp2p.pubsub.pb.rpc_pb2 import RPC, ControlGraft, ControlIHave, ControlIWant, ControlMessage, ControlPrune
    from libp2p.pubsub.pb.rpc_pb2 import Message as GossipsubMessage
    from libp2p.relay.circuit_v2.pb.circuit_pb2 import (
        HopMessage,
        Limit,
        PeerId,
        Reservation,
        Status,
        StopMessage,
        Voucher,
    )
    from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
    from libp2p.security.noise.io import NoiseTransportReadWriter
    from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
    from libp2p.security.noise.transport import Transport as NoiseTransport
    from libp2p.security.secure_session import SecureSession
    from libp2p.utils.address_validation import get_available_interfaces

# py-libp2p means to be silent unless LIBP2P_DEBUG is set, but leaves its logger without a handler, so that Python would
# print the mistakes of peers on the terminal. Handlers that the program adds to that logger get everything. What logs
# such mistakes has one of its own, since py-libp2p removes those of its logger when the program imports it later.
for _name in (PACKAGE, NoiseTransport.__module__.rpartition(".")[0]):
    logging.getLogger(_name).addHandler(logging.NullHandler())

__all__ = [
    "ID",
    "NOISE",
    "RPC",
    "AutoNatMessage",
    "ConnectionType",
    "ControlGraft",
    "ControlIHave",
    "ControlIWant",
    "ControlMessage",
    "ControlPrune",
    "Envelope",
    "GossipsubMessage",
    "HolePunch",
    "HopMessage",
    "IRawConnection",
    "ISecureConn",
    "Identify",
    "KademliaMessage",
    "Limit",
    "NoiseTransport",
    "NoiseTransportReadWriter",
    "PeerId",
    "PublicKey",
    "Record",
    "Reservation",
    "SecureSession",
    "Status",
    "StopMessage",
    "Voucher",
    "create_ed25519_key_pair",
    "create_x25519_key_pair",
    "get_available_interfaces",
]
