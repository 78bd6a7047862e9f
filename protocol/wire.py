"""Messages as frozen dataclasses with a declared wire form.

Each field carries its map key and codec in its annotation, so one declaration gives the encoder, the strict decoder
and the CDDL (RFC 8610) of the specification:

    @dataclass(frozen=True, slots=True)
    class Ping:
        nonce: Annotated[bytes, Wire(1, Bytes(8))]
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast, get_type_hints

from aci_p2p.protocol.cbor import Value
from aci_p2p.protocol.errors import LocalError, RemoteError
from aci_p2p.protocol.hashing import DIGEST_BYTES
from aci_p2p.protocol.identity import PUBLIC_KEY_BYTES, NodeId

AMOUNT_BYTES_MAX: Final = 16
"""Amounts are below 2^128 base units (10^-18 ACI); CBOR integers end at 2^64, which is 18 ACI."""
UINT64_MAX: Final = (1 << 64) - 1

_declared: Final[dict[type[Any], _Declaration]] = {}
"""By class, read once; as many as there are message classes."""
_members: Final[dict[type[IntEnum], dict[int, Any]]] = {}
"""Members by their values, read once for each enumeration."""

T = TypeVar("T")
E = TypeVar("E", bound=IntEnum)


class Malformed(RemoteError):
    """Well-formed CBOR that is not the message it should be."""

    code = "malformed"


class Codec(ABC, Generic[T]):
    """How one field is written and strictly read."""

    @abstractmethod
    def encode(self, value: T) -> Value:
        """The CBOR value; raises LocalError when `value` is outside the field's bounds."""

    @abstractmethod
    def decode(self, value: Value) -> T:
        """Read back; raises Malformed on another type or outside the bounds."""

    @abstractmethod
    def cddl(self) -> str:
        """The type in CDDL."""


@dataclass(frozen=True, slots=True)
class Uint(Codec[int]):
    """Unsigned integer up to `maximum`."""

    maximum: int = UINT64_MAX
    """Largest value allowed."""

    def encode(self, value: int) -> Value:
        if not 0 <= value <= self.maximum:
            msg = f"{value} is not between 0 and {self.maximum}"
            raise LocalError(msg)
        return value

    def decode(self, value: Value) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= self.maximum:
            msg = f"expected an integer between 0 and {self.maximum}"
            raise Malformed(msg)
        return value

    def cddl(self) -> str:
        return "uint" if self.maximum == UINT64_MAX else f"0..{self.maximum}"


@dataclass(frozen=True, slots=True)
class Bytes(Codec[bytes]):
    """Byte string of exactly `size` bytes, or of `minimum` to `size` bytes."""

    size: int
    """Largest length, bytes."""
    minimum: int | None = None
    """Smallest length, bytes; None: exactly `size`."""

    def _fits(self, value: bytes) -> bool:
        return (self.size if self.minimum is None else self.minimum) <= len(value) <= self.size

    def encode(self, value: bytes) -> Value:
        if not self._fits(value):
            msg = f"{len(value)} bytes do not fit {self.cddl()}"
            raise LocalError(msg)
        return value

    def decode(self, value: Value) -> bytes:
        if not isinstance(value, bytes) or not self._fits(value):
            msg = f"expected {self.cddl()}"
            raise Malformed(msg)
        return value

    def cddl(self) -> str:
        return f"bstr .size {self.size}" if self.minimum is None else f"bstr .size ({self.minimum}..{self.size})"


DIGEST: Final = Bytes(DIGEST_BYTES)
"""A SHA-256 digest."""


@dataclass(frozen=True, slots=True)
class Text(Codec[str]):
    """UTF-8 text of at most `size` bytes."""

    size: int
    """Largest length, bytes of UTF-8."""

    def encode(self, value: str) -> Value:
        if len(value.encode("utf-8", "replace")) > self.size:
            msg = f"text longer than {self.size} bytes"
            raise LocalError(msg)
        return value

    def decode(self, value: Value) -> str:
        if not isinstance(value, str) or len(value.encode()) > self.size:
            msg = f"expected {self.cddl()}"
            raise Malformed(msg)
        return value

    def cddl(self) -> str:
        return f"tstr .size (0..{self.size})"


@dataclass(frozen=True, slots=True)
class Amount(Codec[int]):
    """Base units (10^-18 ACI): big-endian bytes without leading zeros."""

    size: int = AMOUNT_BYTES_MAX
    """Largest length, bytes."""

    def encode(self, value: int) -> Value:
        if not 0 <= value < 1 << (8 * self.size):
            msg = f"{value} is not an amount"
            raise LocalError(msg)
        return value.to_bytes((value.bit_length() + 7) // 8, "big")

    def decode(self, value: Value) -> int:
        if not isinstance(value, bytes) or len(value) > self.size or value.startswith(b"\0"):
            msg = "expected an amount"
            raise Malformed(msg)
        return int.from_bytes(value, "big")

    def cddl(self) -> str:
        return "amount" if self.size == AMOUNT_BYTES_MAX else f"bstr .size (0..{self.size})"


@dataclass(frozen=True, slots=True)
class Node(Codec[NodeId]):
    """A node's Ed25519 public key."""

    def encode(self, value: NodeId) -> Value:
        return value.public_key

    def decode(self, value: Value) -> NodeId:
        if not isinstance(value, bytes) or len(value) != PUBLIC_KEY_BYTES:
            msg = "expected a node id"
            raise Malformed(msg)
        return NodeId(value)

    def cddl(self) -> str:
        return "node-id"


@dataclass(frozen=True, slots=True)
class EnumOf(Codec[E]):
    """One of an IntEnum's values."""

    enum: type[E]
    """The enumeration."""

    def encode(self, value: E) -> Value:
        return int(value)

    def decode(self, value: Value) -> E:
        members = _members.get(self.enum)
        if members is None:
            members = _members[self.enum] = {int(member): member for member in self.enum}
        if isinstance(value, bool) or not isinstance(value, int) or value not in members:
            msg = f"expected a {self.enum.__name__}"
            raise Malformed(msg)
        return cast("E", members[value])

    def cddl(self) -> str:
        return " / ".join(str(int(member)) for member in self.enum)


@dataclass(frozen=True, slots=True)
class ListOf(Codec[tuple[T, ...]]):
    """At most `maximum` items of one codec."""

    item: Codec[T]
    """Codec of each item."""
    maximum: int
    """Largest number of items."""

    def encode(self, value: tuple[T, ...]) -> Value:
        if len(value) > self.maximum:
            msg = f"more than {self.maximum} items"
            raise LocalError(msg)
        return [self.item.encode(item) for item in value]

    def decode(self, value: Value) -> tuple[T, ...]:
        if not isinstance(value, list) or len(value) > self.maximum:
            msg = f"expected at most {self.maximum} items"
            raise Malformed(msg)
        return tuple(self.item.decode(item) for item in value)

    def cddl(self) -> str:
        return f"[0*{self.maximum} {self.item.cddl()}]"


@dataclass(frozen=True, slots=True)
class Struct(Codec[T]):
    """A nested dataclass with declared fields."""

    type: type[T]
    """The dataclass."""

    def encode(self, value: T) -> Value:
        return to_value(value)

    def decode(self, value: Value) -> T:
        return from_value(self.type, value)

    def cddl(self) -> str:
        return cddl_name(self.type)


@dataclass(frozen=True, slots=True)
class Wire:
    """A field's place in its message."""

    key: int
    """Map key on the wire; never reused once published."""
    codec: Codec[Any]
    """How its value is written."""


class _Declaration(NamedTuple):
    """What a message class declares."""

    fields: tuple[tuple[str, Wire], ...]
    """Names and wire forms, in order of their keys."""
    keys: frozenset[int]
    """Their keys."""


def fields_of(cls: type[Any]) -> tuple[tuple[str, Wire], ...]:
    """The declared fields of a message class, in order of their keys. Raises TypeError on a class without them."""
    return _declaration_of(cls).fields


def _declaration_of(cls: type[Any]) -> _Declaration:
    known = _declared.get(cls)
    if known is None:
        known = _declared[cls] = _read_declaration(cls)
    return known


def _read_declaration(cls: type[Any]) -> _Declaration:
    hints = get_type_hints(cls, include_extras=True)
    declared: list[tuple[str, Wire]] = []
    for field in dataclasses.fields(cls):
        wires = [meta for meta in getattr(hints[field.name], "__metadata__", ()) if isinstance(meta, Wire)]
        if len(wires) != 1:
            msg = f"{cls.__name__}.{field.name} does not declare one wire form"
            raise TypeError(msg)
        declared.append((field.name, wires[0]))
    declared.sort(key=lambda entry: entry[1].key)
    keys = frozenset(wire.key for _, wire in declared)
    if len(keys) != len(declared):
        msg = f"{cls.__name__} uses a wire key twice"
        raise TypeError(msg)
    return _Declaration(tuple(declared), keys)


def to_value(message: object) -> Value:
    """A message as a CBOR map; raises LocalError when a field is out of bounds."""
    value: dict[int, Value] = {}
    for name, wire in fields_of(type(message)):
        try:
            value[wire.key] = wire.codec.encode(getattr(message, name))
        except LocalError as error:
            msg = f"{type(message).__name__}.{name}: {error.message}"
            raise LocalError(msg) from None
    return value


def from_value(cls: type[T], value: Value) -> T:
    """Read a message: exactly its declared keys, each within bounds. Raises Malformed."""
    if not isinstance(value, dict):
        msg = f"{cls.__name__} is not a map"
        raise Malformed(msg)
    declared, keys = _declaration_of(cls)
    if value.keys() != keys:
        msg = f"{cls.__name__} has missing or unknown fields"
        raise Malformed(msg)
    arguments: dict[str, Any] = {}
    for name, wire in declared:
        try:
            arguments[name] = wire.codec.decode(value[wire.key])
        except Malformed as error:
            msg = f"{cls.__name__}.{name}: {error.message}"
            raise Malformed(msg) from None
    return cls(**arguments)


def cddl_name(cls: type[Any]) -> str:
    """A class name in CDDL's spelling (`JobOffer` is `job-offer`)."""
    return "".join(f"-{char.lower()}" if char.isupper() else char for char in cls.__name__).lstrip("-")


def cddl_of(cls: type[Any]) -> str:
    """The CDDL rule of a message class (RFC 8610)."""
    lines = [f"{cddl_name(cls)} = {{"]
    lines += [f"  {wire.key}: {wire.codec.cddl()}, ; {name}" for name, wire in fields_of(cls)]
    return "\n".join([*lines, "}"])
