"""Signed envelopes: who says what, in which network, from when until when.

An envelope is a CBOR map of the fields of `Header`, the body and an Ed25519 signature. The signature covers a domain
(kind and network) and the whole map without itself, so that nothing signed for one purpose or network can stand for
another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, Any, Final, Generic, TypeVar

from aci_p2p.protocol import cbor, wire
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.hashing import digest
from aci_p2p.protocol.identity import SIGNATURE_BYTES, BadSignature, KeyPair, NodeId
from aci_p2p.protocol.messages import KIND_OF, KINDS, Kind
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason, require
from aci_p2p.protocol.wire import Bytes, EnumOf, Node, Text, Uint, Wire

VERSION: Final = 1
"""Envelope version."""
MAX_SKEW_MS: Final = 30_000
"""Clocks of honest nodes differ by less; NTP keeps within a second, unsynchronised laptops within half a minute."""
MAX_NETWORK_BYTES: Final = 32
"""Bytes of a network id such as `aci-main`."""

_FIELDS_HEAD: Final = b"\xa8"
"""Of a map of 8 entries in CBOR: the fields without the signature."""
_SIGNATURE_HEAD: Final = b"\x09\x58\x40"
"""Key 9, and the head of a byte string of SIGNATURE_BYTES."""

MAX_KEPT: Final = 512
"""Envelopes kept opened: the same record comes over gossip, from the DHT, and again when a newer one is compared."""
MAX_KEPT_BYTES: Final = 4_096
"""Largest of them, bytes: every record, offer and bid; prompts and receipts come once."""

B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of every envelope, body and signature included, as they stand on the wire."""

    version: Annotated[int, Wire(1, Uint(255))]
    """Envelope version."""
    kind: Annotated[Kind, Wire(2, EnumOf(Kind))]
    """What the body is."""
    network: Annotated[str, Wire(3, Text(MAX_NETWORK_BYTES))]
    """Network id, such as `aci-main`."""
    sender: Annotated[NodeId, Wire(4, Node())]
    """Who signs."""
    sequence: Annotated[int, Wire(5, Uint())]
    """Strictly increasing per sender."""
    issued_at: Annotated[int, Wire(6, Uint())]
    """Unix milliseconds."""
    expires_at: Annotated[int, Wire(7, Uint())]
    """Unix milliseconds; worthless from then on."""
    body: Annotated[bytes, Wire(8, Bytes(max(rules.max_bytes for rules in KINDS.values()), minimum=1))]
    """The message in CBOR."""
    signature: Annotated[bytes, Wire(9, Bytes(SIGNATURE_BYTES))]
    """Ed25519 over the domain and the map of fields 1 to 8."""


@dataclass(frozen=True, slots=True)
class Envelope(Generic[B]):
    """A message whose envelope passed every check."""

    header: Header
    """Who, when, until when."""
    body: B
    """The message."""
    data: bytes
    """The envelope as it travels."""

    @property
    def sender(self) -> NodeId:
        """Who signed."""
        return self.header.sender

    @property
    def digest(self) -> bytes:
        """What other messages call this envelope by, 32 bytes."""
        return envelope_digest(self.data)


def envelope_digest(data: bytes) -> bytes:
    """Digest of an envelope's bytes, 32 bytes."""
    return digest("envelope", data)


def _digest_to_sign(header: Header, fields: bytes) -> bytes:
    """What is signed, 32 bytes: of the domain and of `fields`, the header's encoded map without its signature."""
    return digest(f"sign/{header.kind.name}", header.network.encode(), fields)


def _without_signature(data: bytes) -> bytes:
    """An envelope's map without the signature, its last entry: deterministic encoding leaves the rest as it is."""
    return _FIELDS_HEAD + data[len(_FIELDS_HEAD) : -len(_SIGNATURE_HEAD) - SIGNATURE_BYTES]


class Sealer:
    """Signs messages as one node in one network, with a sequence that only grows. Two of one key would repeat it."""

    def __init__(self, key: KeyPair, network: str) -> None:
        """`network`: id of at most 32 bytes, such as `aci-main`."""
        self._key = key
        self._network = network
        self._sequence = 0

    @property
    def node_id(self) -> NodeId:
        """Who signs."""
        return self._key.node_id

    @property
    def network(self) -> str:
        """The network id in every envelope."""
        return self._network

    def seal(self, body: B, now: int, *, lifetime_ms: int | None = None) -> Envelope[B]:
        """Sign `body` at `now` (Unix milliseconds), by default for the longest lifetime of its kind.

        The sequence follows the clock, so that it keeps growing over a restart without being stored. Raises LocalError
        when a field is out of bounds.
        """
        kind = KIND_OF[type(body)]
        rules = KINDS[kind]
        lifetime = rules.lifetime_ms if lifetime_ms is None else lifetime_ms
        if not 0 < lifetime <= rules.lifetime_ms:
            msg = f"the {kind.name.lower()} lives {rules.lifetime_ms} ms at most, not {lifetime}"
            raise LocalError(msg)
        self._sequence = max(self._sequence + 1, now << 10)
        header = partial(
            Header,
            version=VERSION,
            kind=kind,
            network=self._network,
            sender=self._key.node_id,
            sequence=self._sequence,
            issued_at=now,
            expires_at=now + lifetime,
            body=cbor.encode(wire.to_value(body)),
        )
        unsigned = header(signature=bytes(SIGNATURE_BYTES))
        data = cbor.encode(wire.to_value(unsigned))
        signature = self._key.sign(_digest_to_sign(unsigned, _without_signature(data)))
        data = data[:-SIGNATURE_BYTES] + signature
        if len(data) > rules.max_bytes:
            msg = f"the {kind.name.lower()} takes {len(data)} bytes, {rules.max_bytes} at most"
            raise LocalError(msg)
        return Envelope(header(signature=signature), body, data)


def open_envelope(data: bytes, body_type: type[B], *, network: str, now: int | None) -> Envelope[B]:
    """Check and read an envelope that should carry a `body_type`.

    `now` is Unix milliseconds; None leaves the clock out, for stored statements (proofs, receipts) read at any later
    time. Raises MessageRefused.
    """
    kind = KIND_OF[body_type]
    header = _read_header(data, kind)
    # Signed for this network, not for a test network or a fork.
    require(header.network == network, Decision.REJECT, Reason.WRONG_NETWORK)
    # Lives as long as its kind may, and no longer: replays need not be remembered for ever.
    require(0 < header.expires_at - header.issued_at <= KINDS[kind].lifetime_ms, Decision.REJECT, Reason.BAD_LIFETIME)
    if now is not None:
        check_age(header, now)
    return _verify_kept(data, kind) if len(data) <= MAX_KEPT_BYTES else _verify(data, kind)


def _verify(data: bytes, kind: Kind) -> Envelope[Any]:
    header = _parse_header(data)
    try:
        header.sender.verify(_digest_to_sign(header, _without_signature(data)), header.signature)
    except BadSignature:
        # Signed by its sender.
        raise MessageRefused(Decision.REJECT, Reason.BAD_SIGNATURE) from None
    return Envelope(header, _parse(KINDS[kind].body, _decode(header.body)), data)


_verify_kept = lru_cache(maxsize=MAX_KEPT)(_verify)


def check_age(header: Header, now: int) -> None:
    """Raise MessageRefused unless an envelope is of `now`, Unix milliseconds."""
    # Not over; an honest forwarder may have been slow.
    require(now < header.expires_at, Decision.IGNORE, Reason.EXPIRED)
    # Not from the future, beyond the skew of honest clocks.
    require(header.issued_at <= now + MAX_SKEW_MS, Decision.IGNORE, Reason.FROM_FUTURE)


def _read_header(data: bytes, kind: Kind) -> Header:
    # No larger than any honest message of its kind.
    require(len(data) <= KINDS[kind].max_bytes, Decision.REJECT, Reason.TOO_LARGE)
    header = _parse_header(data)
    # The kind that belongs here.
    require(header.kind == kind, Decision.REJECT, Reason.WRONG_KIND)
    return header


def kind_of(data: bytes) -> Kind:
    """Which kind an envelope claims, unchecked otherwise. Raises MessageRefused when it is no envelope."""
    return header_of(data).kind


def header_of(data: bytes) -> Header:
    """What an envelope claims, unchecked otherwise. Raises MessageRefused when it is no envelope."""
    return _parse_header(data)


def _parse_header(data: bytes) -> Header:
    return _parse_header_kept(data) if len(data) <= MAX_KEPT_BYTES else _parse_new_header(data)


def _parse_new_header(data: bytes) -> Header:
    value = _decode(data)
    version = value.get(1) if isinstance(value, dict) else None
    # A later version is no fault of its sender, whatever else it carries.
    require(not isinstance(version, int) or version == VERSION, Decision.IGNORE, Reason.UNKNOWN_VERSION)
    return _parse(Header, value)


_parse_header_kept = lru_cache(maxsize=MAX_KEPT)(_parse_new_header)


def _decode(data: bytes) -> cbor.Value:
    try:
        return cbor.decode(data)
    except cbor.CborError as error:
        # Deterministic CBOR, so that one message has one encoding.
        raise MessageRefused(Decision.REJECT, Reason.NOT_CANONICAL, error.problem) from None


def _parse(cls: type[B], value: cbor.Value) -> B:
    try:
        return wire.from_value(cls, value)
    except wire.Malformed as error:
        # Exactly the declared fields, each within its bounds.
        raise MessageRefused(Decision.REJECT, Reason.MALFORMED, error.message) from None
