"""Strict deterministic CBOR: RFC 8949 section 4.2.1 (core deterministic encoding), the subset that ACI uses.

Integers of 64 bits, byte and text strings, booleans, arrays, and maps with integer keys in bytewise order of their
encodings. No floats, null, tags, indefinite lengths, duplicate keys or non-shortest heads: decoding refuses whatever
would re-encode differently. Size, depth and item counts are capped before anything is allocated.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from aci_p2p.protocol.errors import LocalError, RemoteError

Value: TypeAlias = "int | bytes | str | bool | list[Value] | dict[int, Value]"
"""What ACI's CBOR can carry."""

MAX_DEPTH: Final = 8
"""Nested arrays and maps; our deepest message has 4. Bounds the recursion."""
MAX_ITEMS: Final = 65_536
"""Entries of one array or map; a token list of the longest answer fits."""
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
    value, end = _read(data, 0, 0)
    if end != len(data):
        problem = "trailing bytes"
        raise CborError(problem, end)
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
    if isinstance(value, bool):
        out.append(_SIMPLE << 5 | (_TRUE if value else _FALSE))
    elif isinstance(value, int):
        major, argument = (_UINT, value) if value >= 0 else (_NEGATIVE, -1 - value)
        if argument > _UINT64_MAX:
            msg = f"{value} does not fit in 64 bits"
            raise NotEncodable(msg)
        _head(out, major, argument)
    elif isinstance(value, bytes):
        _head(out, _BYTES, len(value))
        out += value
    elif isinstance(value, str):
        try:
            text = value.encode()
        except UnicodeEncodeError:
            msg = "text with a lone surrogate"
            raise NotEncodable(msg) from None
        _head(out, _TEXT, len(text))
        out += text
    elif isinstance(value, list):
        _head(out, _ARRAY, len(value))
        for item in value:
            _write(out, item, depth + 1)
    else:
        _write_map(out, value, depth)


def _write_map(out: bytearray, value: object, depth: int) -> None:
    if not isinstance(value, dict):
        msg = f"a {type(value).__name__} has no place in our CBOR"
        raise NotEncodable(msg)
    entries: list[tuple[bytes, Value]] = []
    for key, item in value.items():
        if not isinstance(key, int) or isinstance(key, bool):
            msg = "map keys are integers"
            raise NotEncodable(msg)
        encoded = bytearray()
        _write(encoded, key, depth)
        entries.append((bytes(encoded), item))
    entries.sort(key=lambda entry: entry[0])
    _head(out, _MAP, len(entries))
    for encoded_key, item in entries:
        out += encoded_key
        _write(out, item, depth + 1)


def _read_head(data: bytes, at: int) -> tuple[int, int, int]:
    """Major type, argument and the offset behind them."""
    if at >= len(data):
        problem = "truncated"
        raise CborError(problem, at)
    major, info = data[at] >> 5, data[at] & 0x1F
    if info <= _INLINE_MAX:
        return major, info, at + 1
    size_code = info - _INLINE_MAX - 1
    if size_code > 3 or major == _SIMPLE:  # noqa: PLR2004 - codes 0 to 3 are 1, 2, 4 and 8 bytes
        problem = "indefinite, reserved or floating point"
        raise CborError(problem, at)
    size = 1 << size_code
    end = at + 1 + size
    if end > len(data):
        problem = "truncated"
        raise CborError(problem, at)
    argument = int.from_bytes(data[at + 1 : end], "big")
    if argument <= _INLINE_MAX if size == 1 else argument < 1 << (4 * size):
        problem = "not the shortest form"
        raise CborError(problem, at)
    return major, argument, end


def _read(data: bytes, at: int, depth: int) -> tuple[Value, int]:
    if depth > MAX_DEPTH:
        problem = "nested too deep"
        raise CborError(problem, at)
    major, argument, body = _read_head(data, at)
    if major == _UINT:
        return argument, body
    if major == _NEGATIVE:
        return -1 - argument, body
    if major in (_BYTES, _TEXT):
        return _read_string(data, at, body, argument, text=major == _TEXT)
    if major == _ARRAY:
        _check_count(data, at, body, argument)
        items: list[Value] = []
        for _ in range(argument):
            item, body = _read(data, body, depth + 1)
            items.append(item)
        return items, body
    if major == _MAP:
        return _read_map(data, at, body, argument, depth)
    if major == _SIMPLE and argument in (_FALSE, _TRUE):
        return argument == _TRUE, body
    problem = "a tag, null or another simple value"
    raise CborError(problem, at)


def _read_string(data: bytes, at: int, body: int, length: int, *, text: bool) -> tuple[bytes | str, int]:
    if length > len(data) - body:
        problem = "truncated"
        raise CborError(problem, at)
    raw = data[body : body + length]
    if not text:
        return raw, body + length
    try:
        return raw.decode("utf-8", "strict"), body + length
    except UnicodeDecodeError:
        problem = "text that is not UTF-8"
        raise CborError(problem, at) from None


def _read_map(data: bytes, at: int, body: int, count: int, depth: int) -> tuple[dict[int, Value], int]:
    _check_count(data, at, body, count)
    entries: dict[int, Value] = {}
    last = b""
    for _ in range(count):
        major, argument, after = _read_head(data, body)
        if major not in (_UINT, _NEGATIVE):
            problem = "a map key that is not an integer"
            raise CborError(problem, body)
        encoded = data[body:after]
        if encoded <= last:
            problem = "map keys repeated or out of order"
            raise CborError(problem, body)
        last = encoded
        key = argument if major == _UINT else -1 - argument
        entries[key], body = _read(data, after, depth + 1)
    return entries, body


def _check_count(data: bytes, at: int, body: int, count: int) -> None:
    """Every item takes a byte at least, so a count beyond the remaining bytes is refused before any work."""
    if count > MAX_ITEMS or count > len(data) - body:
        problem = "more items than the document can hold"
        raise CborError(problem, at)
