"""A strict reader of GGUF files, the format of llama.cpp, with dequantisation to fp32.

A file is a header (metadata, then the name, shape, type and place of every tensor) and aligned tensor data, all
little-endian. Source: the GGUF specification (ggml-org/ggml, docs/gguf.md); block layouts from ggml-common.h there.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from aci_p2p.executor.files import malformed, unreadable

Scalar: TypeAlias = "int | float | bool | str"
Metadata: TypeAlias = "Scalar | list[Scalar]"
"""A metadata value."""

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
"""Version 1 had 32-bit lengths; 3 differs from 2 only in allowing big-endian files, which are refused here."""
HEADER_BYTES_MAX: Final = 64 << 20
"""Bytes before the tensor data; a vocabulary of 256,000 tokens needs about 12 MiB."""
METADATA_MAX: Final = 4096
"""Metadata entries; files have about 40."""
ARRAY_MAX: Final = 1 << 22
"""Elements of one metadata array; the largest hold a tokenizer's merges."""
STRING_BYTES_MAX: Final = 1 << 20
"""Bytes of one string; the longest are chat templates of some KiB."""
TENSORS_MAX: Final = 1 << 16
"""Tensors of one file; the largest models have about 2,000."""
RANK_MAX: Final = 4
"""Dimensions of one tensor (GGML_MAX_DIMS)."""
ALIGNMENT_DEFAULT: Final = 32
"""Bytes, unless `general.alignment` says otherwise."""
ALIGNMENT_MAX: Final = 1 << 16
"""Bytes; a page of the largest kind in use."""

_STRING, _ARRAY, _BOOL = 8, 9, 7
_FORMATS: Final[Mapping[int, str]] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    _BOOL: "B",
    10: "Q",
    11: "q",
    12: "d",
}
"""struct codes of the fixed-size metadata types (enum gguf_metadata_value_type)."""
_BLOCK = 32
"""Values of one quantised block (QK4_0, QK4_1, QK8_0)."""
_CHUNK_BLOCKS = 1 << 14
"""Blocks dequantised at once: keeps the temporary memory near 1 MiB."""


class GgmlType(IntEnum):
    """Element types that can be read (enum ggml_type)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    """fp16 scale d, 32 4-bit q: d (q - 8)."""
    Q4_1 = 3
    """fp16 scale d, fp16 minimum m, 32 4-bit q: d q + m."""
    Q8_0 = 8
    """fp16 scale d, 32 signed 8-bit q: d q."""
    BF16 = 30

    @property
    def block_items(self) -> int:
        """Values in one block."""
        return 1 if self in (GgmlType.F32, GgmlType.F16, GgmlType.BF16) else _BLOCK

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        match self:
            case GgmlType.F32:
                return 4
            case GgmlType.F16 | GgmlType.BF16:
                return 2
            case GgmlType.Q4_0:
                return 2 + _BLOCK // 2
            case GgmlType.Q4_1:
                return 4 + _BLOCK // 2
            case GgmlType.Q8_0:
                return 2 + _BLOCK


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor is and how it is stored."""

    name: str
    """llama.cpp's name, for example `blk.0.attn_q.weight`."""
    shape: tuple[int, ...]
    """Row-major: outermost dimension first (the file has them the other way round)."""
    type: GgmlType
    """How the elements are stored."""
    offset: int
    """Bytes from the start of the file."""

    @property
    def items(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.items // self.type.block_items * self.type.block_bytes


class GgufFile:
    """An open GGUF file. Made by `open_gguf`."""

    def __init__(
        self, path: Path, file: BinaryIO, metadata: Mapping[str, Metadata], tensors: Mapping[str, GgufTensor]
    ) -> None:
        """`tensors` by name, in the order of their data."""
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._file = file

    def read(self, tensor: GgufTensor) -> npt.NDArray[np.float32]:
        """The values of a tensor in its shape; raises ModelUnavailable when they cannot be read or are not finite."""
        result = np.empty(tensor.items, np.float32)
        step = _CHUNK_BLOCKS * tensor.type.block_items
        try:
            self._file.seek(tensor.offset)
            for start in range(0, tensor.items, step):
                part = result[start : start + step]
                size = part.size // tensor.type.block_items * tensor.type.block_bytes
                data = self._file.read(size)
                if len(data) != size:
                    raise malformed(self.path, "is shorter than it was")
                with np.errstate(all="ignore"):
                    _dequantise(np.frombuffer(data, np.uint8), tensor.type, part)
                if not np.isfinite(part).all():
                    raise malformed(self.path, f"holds infinite or undefined values in {tensor.name!r}")
        except OSError as error:
            raise unreadable(self.path, error) from None
        return result.reshape(tensor.shape)


@contextmanager
def open_gguf(path: Path) -> Generator[GgufFile]:
    """Open a file and read its header. Raises ModelUnavailable when it is unreadable or malformed in any way."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None
    with file:
        try:
            size = os.fstat(file.fileno()).st_size
            header = _Header(path, file.read(HEADER_BYTES_MAX))
        except OSError as error:
            raise unreadable(path, error) from None
        metadata, tensors = _read_header(header, size)
        yield GgufFile(path, file, metadata, tensors)


class _Header:
    """Reads the header's fields one after the other; every length is checked before it is used."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self.position = 0
        self._data = data

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        data = self._data[self.position : self.position + size]
        if len(data) != size:
            raise malformed(self.path, "ends within its header, or has too long a one")
        self.position += size
        return data

    def number(self, code: str) -> int | float:
        """The next number, of a struct code."""
        value: int | float = struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]
        return value

    def count(self, maximum: int, what: str) -> int:
        """The next unsigned 64-bit integer, at most `maximum`."""
        value = int(self.number("Q"))
        if value > maximum:
            raise malformed(self.path, f"has {value} {what}, more than {maximum}")
        return value

    def string(self) -> str:
        """The next string."""
        data = self.take(self.count(STRING_BYTES_MAX, "bytes in a string"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise malformed(self.path, "has a string that is not UTF-8") from None

    def value(self) -> Metadata:
        """The next metadata value behind its type."""
        kind = int(self.number("I"))
        if kind != _ARRAY:
            return self._scalar(kind)
        element = int(self.number("I"))
        count = self.count(ARRAY_MAX, "elements in an array")
        if element in _FORMATS and element != _BOOL:
            code = f"{count}{_FORMATS[element]}"
            return list(struct.unpack("<" + code, self.take(struct.calcsize("<" + code))))
        return [self._scalar(element) for _ in range(count)]

    def _scalar(self, kind: int) -> Scalar:
        if kind == _STRING:
            return self.string()
        if kind not in _FORMATS:
            raise malformed(self.path, f"has metadata of type {kind}")
        value = self.number(_FORMATS[kind])
        if kind == _BOOL:
            if value not in (0, 1):
                raise malformed(self.path, "has a truth value other than 0 and 1")
            return bool(value)
        return value


def _read_header(header: _Header, file_size: int) -> tuple[dict[str, Metadata], dict[str, GgufTensor]]:
    if header.take(len(MAGIC)) != MAGIC:
        raise malformed(header.path, "does not begin with GGUF")
    version = int(header.number("I"))
    if version not in VERSIONS:
        raise malformed(header.path, f"is of version {version}; 2 and 3 can be read, little-endian")
    tensor_count = header.count(TENSORS_MAX, "tensors")
    metadata_count = header.count(METADATA_MAX, "metadata entries")
    metadata: dict[str, Metadata] = {}
    for _ in range(metadata_count):
        key = header.string()
        if key in metadata:
            raise malformed(header.path, f"gives {key[:64]!r} twice")
        metadata[key] = header.value()
    found = [_read_tensor(header) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT_DEFAULT)
    if type(alignment) is not int or not 1 <= alignment <= ALIGNMENT_MAX or alignment & (alignment - 1):
        raise malformed(header.path, "has a bad alignment")
    return metadata, _place(header, found, alignment, file_size)


def _read_tensor(header: _Header) -> GgufTensor:
    """One tensor description, its offset still relative to the data."""
    name = header.string()
    rank = int(header.number("I"))
    if not 1 <= rank <= RANK_MAX:
        raise malformed(header.path, f"gives {name[:64]!r} {rank} dimensions")
    shape = tuple(int(header.number("Q")) for _ in range(rank))[::-1]
    number = int(header.number("I"))
    try:
        kind = GgmlType(number)
    except ValueError:
        readable = ", ".join(kind.name for kind in GgmlType)
        raise malformed(header.path, f"stores {name[:64]!r} as ggml type {number}; readable are {readable}") from None
    if 0 in shape or shape[-1] % kind.block_items:
        raise malformed(header.path, f"gives {name[:64]!r} the shape {shape}")
    return GgufTensor(name, shape, kind, int(header.number("Q")))


def _place(header: _Header, found: list[GgufTensor], alignment: int, file_size: int) -> dict[str, GgufTensor]:
    """Tensors with their offsets in the file; each must begin at the first aligned byte after the one before."""
    start = _align(header.position, alignment)
    position = end = 0
    tensors: dict[str, GgufTensor] = {}
    for tensor in sorted(found, key=lambda tensor: tensor.offset):
        if tensor.offset != position:
            raise malformed(header.path, f"leaves a hole or an overlap before {tensor.name[:64]!r}")
        if tensor.name in tensors:
            raise malformed(header.path, f"has two tensors {tensor.name[:64]!r}")
        tensors[tensor.name] = GgufTensor(tensor.name, tensor.shape, tensor.type, start + tensor.offset)
        end = position + tensor.size
        position = _align(end, alignment)
    if found and not start + end <= file_size <= start + position:
        raise malformed(header.path, "does not end where its tensors end")
    return tensors


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _dequantise(data: npt.NDArray[np.uint8], kind: GgmlType, out: npt.NDArray[np.float32]) -> None:
    """Values of whole blocks, in fp32 arithmetic with one rounding per operation (no fused multiply-add)."""
    match kind:
        case GgmlType.F32:
            out[:] = data.view("<f4")
        case GgmlType.F16:
            out[:] = data.view("<f2")
        case GgmlType.BF16:
            bits = out.view(np.uint32)
            bits[:] = data.view("<u2")
            bits <<= np.uint32(16)
        case GgmlType.Q8_0:
            blocks = data.reshape(-1, kind.block_bytes)
            np.multiply(blocks[:, 2:].view(np.int8), _halves(blocks, 0), out=out.reshape(-1, _BLOCK))
        case GgmlType.Q4_0 | GgmlType.Q4_1:
            blocks = data.reshape(-1, kind.block_bytes)
            nibbles = blocks[:, -_BLOCK // 2 :]
            values = out.reshape(-1, _BLOCK)
            # Low nibbles are the first half of a block, high nibbles the second.
            values[:, : _BLOCK // 2] = nibbles & 15
            values[:, _BLOCK // 2 :] = nibbles >> 4
            if kind is GgmlType.Q4_0:
                values -= np.float32(8)
            values *= _halves(blocks, 0)
            if kind is GgmlType.Q4_1:
                values += _halves(blocks, 2)


def _halves(blocks: npt.NDArray[np.uint8], start: int) -> npt.NDArray[np.float32]:
    """The fp16 numbers at byte `start` of each block; shape (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)
