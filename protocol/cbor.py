"""Strict deterministic CBOR: RFC 8949 section 4.2.1 (core deterministic encoding), the subset that ACI uses.

Integers of 64 bits, byte and text strings, booleans, arrays, and maps with integer keys in bytewise order of their
encodings. No floats, null, tags, indefinite lengths, duplicate keys or non-shortest heads: decoding refuses whatever
would re-encode differently. Size, depth and item counts are capped before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias, cast

from aci_p2p.protocol.errors import LocalError, RemoteError

Value: TypeAlias = "int | bytes | str | bool | list[Value] | dict[int, Value]"
"""What ACI's CBOR can carry."""

MAX_DEPTH: Final = 8
"""Nested arrays and maps; our deepest message has 4. Bounds the recursion."""
MAX_ITEMS: Final = 65_536
"""Entries of all arrays and maps of a document together, for decoding; the longest answer with the longest conversation
has under 40,000. Bounds the time, under 0.1 s, and the memory that a document of empty arrays costs."""
MAX_BYTES: Final = 1 << 20
"""Bytes of one document, as the largest stream frame."""

_UINT, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)
_FALSE, _TRUE = 20, 21
_INLINE_MAX = 23
"""Largest argument held in the initial byte; 24 to 27 announce 1, 2, 4 or 8 bytes."""
_UINT64_MAX = (1 << 64) - 1


class CborError(RemoteError):
    """The bytes are not strict deterministic CBOR of our subset."""

    code = "cbor"

    def __init__(self, problem: str, offset: int) -> None:
        """`problem` in words; `offset` in bytes from the start."""
        super().__init__(f"not deterministic CBOR: {problem} at byte {offset}")
        self.problem = problem
        self.offset = offset


class NotEncodable(LocalError):
    """A value that our CBOR subset cannot carry was given to `encode`."""

    code = "not_encodable"


def encode(value: Value) -> bytes:
    """Encode deterministically. Raises NotEncodable on another type, a large integer or too much depth."""
    out = bytearray()
    _write(out, value, 0)
    return bytes(out)


def decode(data: bytes, *, max_bytes: int = MAX_BYTES) -> Value:
    """Decode one document that fills `data` exactly. Raises CborError."""
    if len(data) > max_bytes:
        problem = f"more than {max_bytes} bytes"
        raise CborError(problem, max_bytes)
    reader = _Reader(data)
    value = reader.value(0)
    if reader.at != len(data):
        problem = "trailing bytes"
        raise CborError(problem, reader.at)
    return value


def _head(out: bytearray, major: int, argument: int) -> None:
    if argument <= _INLINE_MAX:
        out.append(major << 5 | argument)
        return
    size_code = 0 if argument < 1 << 8 else 1 if argument < 1 << 16 else 2 if argument < 1 << 32 else 3
    out.append(major << 5 | (_INLINE_MAX + 1 + size_code))
    out += argument.to_bytes(1 << size_code, "big")


def _write(out: bytearray, value: Value, depth: int) -> None:
    if depth > MAX_DEPTH:
        msg = "nested too deep for CBOR"
        raise NotEncodable(msg)
    write = _WRITERS.get(type(value)) or _writer_of_kin(value)
    write(out, value, depth)


def _write_bool(out: bytearray, value: bool, _depth: int) -> None:  # noqa: FBT001 - what is written
    out.append(_SIMPLE << 5 | (_TRUE if value else _FALSE))


def _write_int(out: bytearray, value: int, _depth: int) -> None:
    if 0 <= value <= _INLINE_MAX:
        out.append(value)
        return
    major, argument = (_UINT, value) if value >= 0 else (_NEGATIVE, -1 - value)
    if argument > _UINT64_MAX:
        msg = f"{value} does not fit in 64 bits"
        raise NotEncodable(msg)
    _head(out, major, argument)


def _write_bytes(out: bytearray, value: bytes, _depth: int) -> None:
    _head(out, _BYTES, len(value))
    out += value


def _write_text(out: bytearray, value: str, _depth: int) -> None:
    try:
        text = value.encode()
    except UnicodeEncodeError:
        msg = "text with a lone surrogate"
        raise NotEncodable(msg) from None
    _head(out, _TEXT, len(text))
    out += text


def _write_list(out: bytearray, value: list[Value], depth: int) -> None:
    _head(out, _ARRAY, len(value))
    for item in value:
        _write(out, item, depth + 1)


def _write_map(out: bytearray, value: dict[int, Value], depth: int) -> None:
    for key in value:
        if type(key) is not int and (not isinstance(cast("object", key), int) or isinstance(key, bool)):
            msg = "map keys are integers"
            raise NotEncodable(msg)
    _head(out, _MAP, len(value))
    keys = sorted(value)
    if keys and keys[0] < 0:
        # As their encodings sort: negative ones last, the largest of them first.
        keys.sort(key=_place)
    for key in keys:
        _write_int(out, key, depth)
        _write(out, value[key], depth + 1)


def _place(key: int) -> tuple[bool, int]:
    return key < 0, abs(key)


_WRITERS: Final[dict[type, Callable[[bytearray, Any, int], None]]] = {
    bool: _write_bool,
    int: _write_int,
    bytes: _write_bytes,
    str: _write_text,
    list: _write_list,
    dict: _write_map,
}


def _writer_of_kin(value: object) -> Callable[[bytearray, Any, int], None]:
    """Of a value of a subclass, such as an IntEnum. Raises NotEncodable."""
    for kind, write in _WRITERS.items():
        if isinstance(value, kind):
            return write
    msg = f"a {type(value).__name__} has no place in our CBOR"
    raise NotEncodable(msg)


class _Reader:
    """Reads one document; `at` is the offset in bytes of what comes next."""

    __slots__ = ("_data", "_items_left", "at")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._items_left = MAX_ITEMS
        self.at = 0

    def value(self, depth: int) -> Value:
        """The next value, which lies in `depth` arrays and maps."""
        start = self.at
        if depth > MAX_DEPTH:
            problem = "nested too deep"
            raise CborError(problem, start)
        major, argument = self._head()
        if major <= _NEGATIVE:
            return argument if major == _UINT else -1 - argument
        if major == _BYTES:
            return self._string(argument, start)
        if major == _TEXT:
            return self._text(argument, start)
        if major == _ARRAY:
            self._count(argument, start)
            return [self.value(depth + 1) for _ in range(argument)]
        if major == _MAP:
            self._count(argument, start)
            return self._map(argument, depth)
        if major == _SIMPLE and argument in (_FALSE, _TRUE):
            return argument == _TRUE
        problem = "a tag, null or another simple value"
        raise CborError(problem, start)

    def _head(self) -> tuple[int, int]:
        """Major type and argument."""
        start = self.at
        try:
            initial = self._data[start]
        except IndexError:
            problem = "truncated"
            raise CborError(problem, start) from None
        self.at = start + 1
        major, info = initial >> 5, initial & 0x1F
        if info <= _INLINE_MAX:
            return major, info
        size_code = info - _INLINE_MAX - 1
        if size_code > 3 or major == _SIMPLE:  # noqa: PLR2004 - codes 0 to 3 are 1, 2, 4 and 8 bytes
            problem = "indefinite, reserved or floating point"
            raise CborError(problem, start)
        size = 1 << size_code
        argument = int.from_bytes(self._string(size, start), "big")
        if argument <= _INLINE_MAX if size == 1 else argument < 1 << (4 * size):
            problem = "not the shortest form"
            raise CborError(problem, start)
        return major, argument

    def _string(self, length: int, start: int) -> bytes:
        begin = self.at
        raw = self._data[begin : begin + length]
        if len(raw) < length:
            problem = "truncated"
            raise CborError(problem, start)
        self.at = begin + length
        return raw

    def _text(self, length: int, start: int) -> str:
        try:
            return self._string(length, start).decode("utf-8", "strict")
        except UnicodeDecodeError:
            problem = "text that is not UTF-8"
            raise CborError(problem, start) from None

    def _count(self, count: int, start: int) -> None:
        """Every item takes a byte at least, so a count beyond the remaining bytes is refused before any work."""
        self._items_left -= count
        if self._items_left < 0 or count > len(self._data) - self.at:
            problem = "more items than the document can hold"
            raise CborError(problem, start)

    def _map(self, count: int, depth: int) -> dict[int, Value]:
        entries: dict[int, Value] = {}
        last = b""
        head, value, data = self._head, self.value, self._data
        for _ in range(count):
            start = self.at
            major, argument = head()
            if major > _NEGATIVE:
                problem = "a map key that is not an integer"
                raise CborError(problem, start)
            encoded = data[start : self.at]
            if encoded <= last:
                problem = "map keys repeated or out of order"
                raise CborError(problem, start)
            last = encoded
            entries[argument if major == _UINT else -1 - argument] = value(depth + 1)
        return entries
