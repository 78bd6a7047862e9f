"""Weights files: a strict reader and a deterministic writer of the safetensors format.

A file is an unsigned 64-bit little-endian header length, a JSON header that gives each tensor its type, shape and byte
range, and the data. Source: the safetensors format description (huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, Final, cast

import numpy as np
import numpy.typing as npt

from aci_p2p.executor.api import ModelUnavailable
from aci_p2p.executor.files import malformed, parse_json, read_json, unreadable
from aci_p2p.executor.store import INDEX_FILE, SINGLE_FILE

HEADER_BYTES_MAX: Final = 16 << 20
"""Bytes of JSON; a model of 100,000 tensors needs about 12 MiB."""
RANK_MAX: Final = 8
"""Dimensions of one tensor; language models use 1 to 4."""
SHARDS_MAX: Final = 1024
"""Files of one model; the largest public ones have about 200."""

_LENGTH_BYTES = 8
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors")
_CHUNK_ITEMS = 1 << 18
"""Values converted at once: keeps the temporary memory near 1 MiB however large a tensor is."""


class TensorType(StrEnum):
    """Element types that weights may have."""

    BF16 = "BF16"
    """Upper half of an IEEE 754 binary32."""
    F16 = "F16"
    """IEEE 754 binary16."""
    F32 = "F32"
    """IEEE 754 binary32."""

    @property
    def storage(self) -> np.dtype[np.uint16] | np.dtype[np.float16] | np.dtype[np.float32]:
        """Little-endian numpy type of one element in the file."""
        match self:
            case TensorType.BF16:
                return np.dtype("<u2")
            case TensorType.F16:
                return np.dtype("<f2")
            case TensorType.F32:
                return np.dtype("<f4")


_TYPES: Final[Mapping[str, TensorType]] = {kind.value: kind for kind in TensorType}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a file."""

    name: str
    """Unique in the file."""
    shape: tuple[int, ...]
    """Row-major dimensions, each at least 1; empty for a scalar."""
    type: TensorType
    """Type of the elements."""

    @property
    def items(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.items * self.type.storage.itemsize


def read_tensors(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """All tensors of one file as fp32, C-contiguous, in the order of their data.

    BF16 and F16 convert exactly. Beyond the result, memory use is about 1 MiB: the data is read, not mapped, so that a
    file that shrinks meanwhile is an error and not a bus error. Raises ModelUnavailable when the file is missing,
    unreadable, malformed in any way, or holds another element type.
    """
    try:
        with path.open("rb") as file:
            specs = _read_header(path, file, os.fstat(file.fileno()).st_size)
            return {spec.name: _read_values(path, file, spec) for spec in specs}
    except OSError as error:
        raise unreadable(path, error) from None


def read_model_tensors(directory: Path) -> dict[str, npt.NDArray[np.float32]]:
    """All tensors of a model as fp32: of `model.safetensors` if there is one, else of the shards in its index.

    Raises ModelUnavailable as `read_tensors` does, and when the index and the shards disagree.
    """
    single = directory / SINGLE_FILE
    if single.exists():
        return read_tensors(single)
    index = directory / INDEX_FILE
    if not index.exists():
        msg = f"there is neither {SINGLE_FILE} nor {INDEX_FILE} in {directory}"
        raise ModelUnavailable(msg)
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for shard, names in _read_index(index).items():
        values = read_tensors(directory / shard)
        if values.keys() != names:
            msg = f"{directory / shard} does not hold the tensors that {INDEX_FILE} says it holds"
            raise ModelUnavailable(msg)
        tensors.update(values)
    return tensors


def write_tensors(path: Path, specs: Sequence[TensorSpec], values: Iterable[npt.NDArray[np.float32]]) -> None:
    """Write tensors in the given order; `values` yields one fp32 array per spec and is read one at a time.

    The same input gives the same bytes everywhere. BF16 rounds to nearest, ties to even (IEEE 754 section 4.3.1); the
    values must be finite. Raises OSError; ValueError when an array does not have the shape of its spec.
    """
    with path.open("wb") as file:
        file.write(_header(specs))
        for spec, array in zip(specs, values, strict=True):
            if array.shape != spec.shape:
                msg = f"{spec.name} has shape {array.shape}, not {spec.shape}"
                raise ValueError(msg)
            flat = array.reshape(-1)
            for start in range(0, flat.size, _CHUNK_ITEMS):
                file.write(_encode(flat[start : start + _CHUNK_ITEMS], spec.type))


def _header(specs: Sequence[TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.type.value,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.size],
        }
        offset += spec.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _encode(values: npt.NDArray[np.float32], kind: TensorType) -> bytes:
    if kind is not TensorType.BF16:
        return values.astype(kind.storage).tobytes()
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) >> np.uint32(16)).astype(kind.storage).tobytes()


def _read_values(path: Path, file: BinaryIO, spec: TensorSpec) -> npt.NDArray[np.float32]:
    """The next `spec.items` elements of `file`."""
    result = np.empty(spec.items, np.float32)
    storage = spec.type.storage
    for start in range(0, spec.items, _CHUNK_ITEMS):
        part = result[start : start + _CHUNK_ITEMS]
        data = file.read(part.size * storage.itemsize)
        if len(data) != part.size * storage.itemsize:
            raise malformed(path, "is shorter than it was")
        raw = np.frombuffer(data, storage)
        if spec.type is TensorType.BF16:
            bits = part.view(np.uint32)
            bits[:] = raw
            bits <<= np.uint32(16)
        else:
            part[:] = raw
    return result.reshape(spec.shape)


def _read_header(path: Path, file: BinaryIO, file_size: int) -> list[TensorSpec]:
    """Specs of all tensors in the order of their data, which must fill the file without holes or overlaps."""
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    data_size = file_size - _LENGTH_BYTES - length
    if length > HEADER_BYTES_MAX or data_size < 0:
        raise malformed(path, "has a header longer than allowed or than the file")
    header = parse_json(path, file.read(length))
    header.pop("__metadata__", None)
    ranges: list[tuple[int, int, TensorSpec]] = [_read_entry(path, name, entry) for name, entry in header.items()]
    ranges.sort(key=lambda item: item[0])
    position = 0
    for begin, end, spec in ranges:
        if begin != position:
            raise malformed(path, f"leaves a hole or an overlap before tensor {spec.name!r}")
        position = end
    if position != data_size:
        raise malformed(path, "does not end where its tensors end")
    return [spec for _, _, spec in ranges]


def _read_entry(path: Path, name: str, entry: object) -> tuple[int, int, TensorSpec]:
    """Byte range within the data, and the spec, of one header entry."""
    problem = f"describes tensor {name[:64]!r} wrongly"
    if not isinstance(entry, dict):
        raise malformed(path, problem)
    fields = cast("dict[str, object]", entry)
    if fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise malformed(path, problem)
    kind = _TYPES.get(str(fields["dtype"]))
    if kind is None:
        msg = f"{path} stores tensor {name[:64]!r} as {str(fields['dtype'])[:16]!r}; BF16, F16 and F32 can be read"
        raise ModelUnavailable(msg)
    shape, offsets = _naturals(fields["shape"]), _naturals(fields["data_offsets"])
    if shape is None or offsets is None or len(shape) > RANK_MAX or 0 in shape or len(offsets) != 2:  # noqa: PLR2004 - begin and end
        raise malformed(path, problem)
    spec = TensorSpec(name, shape, kind)
    begin, end = offsets
    if end - begin != spec.size:
        raise malformed(path, problem)
    return begin, end, spec


def _naturals(value: object) -> tuple[int, ...] | None:
    """`value` as integers from 0, or None when it is anything else (JSON booleans are not integers)."""
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    if not all(type(item) is int and item >= 0 for item in items):
        return None
    return tuple(cast("list[int]", items))


def _read_index(path: Path) -> dict[str, set[str]]:
    """Tensor names by shard file name."""
    weight_map = read_json(path, HEADER_BYTES_MAX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise malformed(path, "has no weight_map")
    shards: dict[str, set[str]] = {}
    for name, shard in cast("dict[str, object]", weight_map).items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise malformed(path, f"names a shard {str(shard)[:64]!r}")
        shards.setdefault(shard, set()).add(name)
    if len(shards) > SHARDS_MAX:
        raise malformed(path, f"names more than {SHARDS_MAX} shards")
    return shards
