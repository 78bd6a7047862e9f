"""Unsigned varints (LEB128), the length prefix of everything in libp2p.

Source: https://github.com/multiformats/unsigned-varint
"""

from __future__ import annotations

from typing import Protocol

MAX_VARINT_BYTES = 9
"""Longest varint, bytes (the specification's limit)."""


class VarintError(ValueError):
    """A peer's length prefix is malformed or over the limit."""


class ByteReader(Protocol):
    """What reading a varint needs of a connection or a stream."""

    async def read_exactly(self, count: int) -> bytes:
        """Receive exactly `count` bytes; raises when the peer ends before."""
        ...


def encode_varint(value: int) -> bytes:
    """Encode a number of 0 or more."""
    encoded = bytearray()
    while value >= 0x80:  # noqa: PLR2004 - seven bits a byte
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


async def read_varint(reader: ByteReader, limit: int) -> int:
    """Read a number of at most `limit`; raises VarintError when it is malformed or greater."""
    value = 0
    for index in range(MAX_VARINT_BYTES):
        byte = (await reader.read_exactly(1))[0]
        value |= (byte & 0x7F) << (7 * index)
        if not byte & 0x80:
            break
    else:
        msg = "a varint is longer than nine bytes"
        raise VarintError(msg)
    if value > limit:
        msg = f"a length of {value} is over the limit of {limit}"
        raise VarintError(msg)
    return value


async def read_prefixed(reader: ByteReader, limit: int) -> bytes:
    """Read a length-prefixed message of at most `limit` bytes; nothing is allocated before the length is checked."""
    return await reader.read_exactly(await read_varint(reader, limit))


def prefixed(message: bytes) -> bytes:
    """A message with its length in front."""
    return encode_varint(len(message)) + message


def split_varint(data: bytes) -> tuple[int, bytes]:
    """The number at the start of `data` and what follows it; raises VarintError when it is malformed or cut off."""
    value = 0
    for index, byte in enumerate(data[:MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if not byte & 0x80:
            return value, data[index + 1 :]
    msg = "a varint is cut off or longer than nine bytes"
    raise VarintError(msg)


def split_prefixed(buffer: bytearray, limit: int) -> bytes | None:
    """Take the first length-prefixed message off a buffer; None when it has not arrived in full.

    Raises VarintError when its length is malformed or over `limit`.
    """
    head = bytes(buffer[:MAX_VARINT_BYTES])
    if len(head) < MAX_VARINT_BYTES and all(byte & 0x80 for byte in head):
        return None
    length, rest = split_varint(head)
    if length > limit:
        msg = f"a length of {length} is over the limit of {limit}"
        raise VarintError(msg)
    start = len(head) - len(rest)
    if len(buffer) < start + length:
        return None
    message = bytes(buffer[start : start + length])
    del buffer[: start + length]
    return message
