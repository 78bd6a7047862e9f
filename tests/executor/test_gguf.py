"""GGUF files: dequantisation against values worked out by hand, and ModelUnavailable for whatever is malformed."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aci_p2p.executor import gguf as gguf_module
from aci_p2p.executor.api import ModelUnavailable
from aci_p2p.executor.gguf import GgmlType, Metadata, open_gguf

Write = Callable[..., bytes]

NIBBLES = bytes(low | (15 - low) << 4 for low in range(16))
"""Low nibbles 0 to 15, high nibbles 15 to 0."""
STORED: dict[GgmlType, tuple[bytes, list[float]]] = {
    GgmlType.F32: (struct.pack("<2f", 1.25, -3e38), [1.25, float(np.float32(-3e38))]),
    GgmlType.F16: (struct.pack("<2e", 0.5, -65504), [0.5, -65504.0]),
    GgmlType.BF16: (struct.pack("<2H", 0x3FC0, 0xC000), [1.5, -2.0]),
    GgmlType.Q4_0: (
        struct.pack("<e", 0.5) + NIBBLES,
        [(q - 8) * 0.5 for q in range(16)] + [(q - 8) * 0.5 for q in range(15, -1, -1)],
    ),
    GgmlType.Q4_1: (
        struct.pack("<2e", 0.25, -2.0) + NIBBLES,
        [q * 0.25 - 2 for q in range(16)] + [q * 0.25 - 2 for q in range(15, -1, -1)],
    ),
    GgmlType.Q8_0: (
        struct.pack("<e32b", 0.125, *range(-128, 128, 8)),
        [q * 0.125 for q in range(-128, 128, 8)],
    ),
}
"""Stored bytes and the values they mean, one block or two plain values of each type."""


def read_only_tensor(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The values of the file's one tensor."""
    with open_gguf(path) as file:
        (only,) = file.tensors.values()
        return file.read(only)


@pytest.mark.parametrize("kind", GgmlType)
def test_dequantises(tmp_path: Path, write_gguf: Write, kind: GgmlType) -> None:
    stored, values = STORED[kind]
    (tmp_path / "f").write_bytes(write_gguf({}, {"t": ((len(values),), int(kind), stored)}))
    result = read_only_tensor(tmp_path / "f")
    assert result.dtype == np.float32
    assert result.tolist() == values


@pytest.mark.parametrize("kind", [GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q8_0])
def test_every_block_has_its_own_scale(
    tmp_path: Path, write_gguf: Write, monkeypatch: pytest.MonkeyPatch, kind: GgmlType
) -> None:
    monkeypatch.setattr(gguf_module, "_CHUNK_BLOCKS", 2)
    stored, values = STORED[kind]
    blocks = b"".join(struct.pack("<e", scale) + stored[2:] for scale in (1, 2, 4, 8, 16, 32))
    (tmp_path / "f").write_bytes(write_gguf({}, {"t": ((3, 64), int(kind), blocks)}))
    result = read_only_tensor(tmp_path / "f")
    assert result.shape == (3, 64)
    scale = struct.unpack_from("<e", stored)[0]
    minimum = struct.unpack_from("<e", stored, 2)[0] if kind is GgmlType.Q4_1 else 0.0
    unit = (np.array(values) - minimum) / scale
    expected = [unit * factor + minimum for factor in (1, 2, 4, 8, 16, 32)]
    assert result.reshape(6, 32).tolist() == [block.tolist() for block in expected]


def test_shapes_are_row_major_and_tensors_in_order(tmp_path: Path, write_gguf: Write) -> None:
    values = np.arange(6, dtype=np.float32)
    tensors = {"b": ((2, 3), 0, values.tobytes()), "a": ((1,), 0, struct.pack("<f", 9))}
    (tmp_path / "f").write_bytes(write_gguf({}, tensors))
    with open_gguf(tmp_path / "f") as file:
        assert list(file.tensors) == ["b", "a"]
        assert file.read(file.tensors["a"]).tolist() == [9]
        assert file.read(file.tensors["b"]).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_metadata_of_every_type(tmp_path: Path) -> None:
    numbers = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
    encoded = [(struct.pack("<I" + code, kind, 3)) for kind, code in numbers.items()]
    encoded.append(struct.pack("<IB", 7, 1))
    encoded.append(struct.pack("<IQ", 8, 2) + "é".encode())
    encoded.append(struct.pack("<IIQ2h", 9, 3, 2, -1, 5))
    encoded.append(struct.pack("<IIQ2B", 9, 7, 2, 0, 1))
    encoded.append(struct.pack("<IIQQ", 9, 8, 1, 1) + b"x")
    body = b"".join(struct.pack("<Q", 2) + b"%02d" % n + value for n, value in enumerate(encoded))
    (tmp_path / "f").write_bytes(b"GGUF" + struct.pack("<IQQ", 2, 0, len(encoded)) + body)
    with open_gguf(tmp_path / "f") as file:
        values: list[Metadata] = list(file.metadata.values())
    assert values == [3] * 10 + [True, "é", [-1, 5], [False, True], ["x"]]
    assert [type(values[index]) for index in (5, 6, 10)] == [int, float, bool]
    assert str(values[13]) == "[False, True]"


def test_alignment(tmp_path: Path) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 1) + key(b"general.alignment") + struct.pack("<II", 4, 64)
    header += tensor(b"a") + tensor(b"b", offset=64)
    assert 64 < len(header) < 128
    content = header + bytes(128 - len(header)) + struct.pack("<f", 5) + bytes(60) + struct.pack("<f", 6)
    (tmp_path / "f").write_bytes(content)
    with open_gguf(tmp_path / "f") as file:
        assert [file.read(item).tolist() for item in file.tensors.values()] == [[5], [6]]


ONE = {"t": ((1,), 0, bytes(4))}


def of(count: int, *parts: bytes) -> bytes:
    """A file without tensors, with `count` metadata entries in `parts`."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, count) + b"".join(parts)


def key(text: bytes) -> bytes:
    """A string."""
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes = b"t", dims: tuple[int, ...] = (1,), kind: int = 0, offset: int = 0) -> bytes:
    """A tensor description, innermost dimension first."""
    return key(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def with_tensors(*tensors: bytes, size: int = 4) -> bytes:
    """A file with these descriptions and `size` bytes of data."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(size)


MALFORMED: dict[str, tuple[str, bytes]] = {
    "nothing": ("header", b""),
    "magic": ("begin with GGUF", b"GGML" + of(0)[4:]),
    "version 1": ("version 1;", b"GGUF" + struct.pack("<IQQ", 1, 0, 0)),
    "version 4": ("version 4;", b"GGUF" + struct.pack("<IQQ", 4, 0, 0)),
    "big-endian": ("version 50331648;", b"GGUF" + struct.pack(">IQQ", 3, 0, 0)),
    "cut in the header": ("header", of(0)[:-1]),
    "too many tensors": ("tensors, more", b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0)),
    "too many entries": ("entries, more", b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40)),
    "entries missing": ("header", of(1)),
    "key past the end": ("header", of(1, struct.pack("<Q", 9), b"k")),
    "key past any limit": ("bytes in a string", of(1, struct.pack("<Q", 1 << 63), b"k")),
    "key not UTF-8": ("UTF-8", of(1, key(b"\xff"), struct.pack("<IB", 0, 1))),
    "key twice": ("twice", of(2, key(b"k"), struct.pack("<IB", 0, 1), key(b"k"), struct.pack("<IB", 0, 1))),
    "type unknown": ("type 13", of(1, key(b"k"), struct.pack("<IB", 13, 1))),
    "truth value 2": ("truth value", of(1, key(b"k"), struct.pack("<IB", 7, 2))),
    "array past the end": ("header", of(1, key(b"k"), struct.pack("<IIQB", 9, 0, 2, 1))),
    "array past any limit": ("elements in an array", of(1, key(b"k"), struct.pack("<IIQ", 9, 0, 1 << 62))),
    "array of arrays": ("type 9", of(1, key(b"k"), struct.pack("<IIQIQ", 9, 9, 1, 0, 0))),
    "alignment zero": ("bad alignment", of(1, key(b"general.alignment"), struct.pack("<II", 4, 0))),
    "alignment 24": ("bad alignment", of(1, key(b"general.alignment"), struct.pack("<II", 4, 24))),
    "alignment huge": ("bad alignment", of(1, key(b"general.alignment"), struct.pack("<II", 4, 1 << 31))),
    "alignment true": ("bad alignment", of(1, key(b"general.alignment"), struct.pack("<IB", 7, 1))),
    "alignment float": ("bad alignment", of(1, key(b"general.alignment"), struct.pack("<If", 6, 32))),
    "no dimensions": ("0 dimensions", with_tensors(tensor(dims=()))),
    "five dimensions": ("5 dimensions", with_tensors(tensor(dims=(1,) * 5))),
    "zero dimension": ("the shape", with_tensors(tensor(dims=(0, 1 << 62)), size=0)),
    "element type unknown": ("ggml type 12", with_tensors(tensor(kind=12, dims=(256,)), size=144)),
    "rows of half a block": ("the shape", with_tensors(tensor(kind=8, dims=(16, 2)), size=34)),
    "name twice": ("two tensors", with_tensors(tensor(), tensor(offset=32), size=36)),
    "overlap": ("overlap", with_tensors(tensor(b"a"), tensor(b"b"))),
    "partial overlap": ("overlap", with_tensors(tensor(b"a", (16,)), tensor(b"b", offset=32), size=64)),
    "hole": ("hole", with_tensors(tensor(b"a"), tensor(b"b", offset=64), size=68)),
    "unaligned": ("hole", with_tensors(tensor(b"a"), tensor(b"b", offset=4), size=8)),
    "offset past the end": ("hole", with_tensors(tensor(offset=1 << 63))),
    "size past the end": ("end where", with_tensors(tensor(dims=(1 << 62,)))),
    "size overflows": ("end where", with_tensors(tensor(dims=(1 << 62, 1 << 62)))),
    "data too short": ("end where", with_tensors(tensor(), size=3)),
    "data too long": ("end where", with_tensors(tensor(), size=33)),
}


@pytest.mark.parametrize(("reason", "content"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_files_are_refused(tmp_path: Path, reason: str, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ModelUnavailable, match=f"^{tmp_path / 'f'} .*{reason}"), open_gguf(tmp_path / "f"):
        pass


def test_the_sound_neighbours_of_malformed_files_are_read(tmp_path: Path) -> None:
    for content in (
        of(0),
        with_tensors(tensor()),
        with_tensors(tensor(), size=32),
        with_tensors(tensor(kind=8, dims=(32,)), size=34),
    ):
        (tmp_path / "f").write_bytes(content)
        with open_gguf(tmp_path / "f"):
            pass


@pytest.mark.parametrize(
    ("limit", "needed"),
    [
        ("METADATA_MAX", 2),
        ("ARRAY_MAX", 2),
        ("STRING_BYTES_MAX", len("general.alignment")),
        ("TENSORS_MAX", 1),
        ("RANK_MAX", 1),
        ("ALIGNMENT_MAX", 32),
    ],
)
def test_limits_hold(
    tmp_path: Path, write_gguf: Write, monkeypatch: pytest.MonkeyPatch, limit: str, needed: int
) -> None:
    (tmp_path / "f").write_bytes(write_gguf({"general.alignment": 32, "list": [1, 2]}, ONE))
    monkeypatch.setattr(gguf_module, limit, needed)
    with open_gguf(tmp_path / "f"):
        pass
    monkeypatch.setattr(gguf_module, limit, needed - 1)
    with pytest.raises(ModelUnavailable), open_gguf(tmp_path / "f"):
        pass


def test_a_long_header_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor()
    (tmp_path / "f").write_bytes(with_tensors(tensor()))
    monkeypatch.setattr(gguf_module, "HEADER_BYTES_MAX", len(header))
    with open_gguf(tmp_path / "f"):
        pass
    monkeypatch.setattr(gguf_module, "HEADER_BYTES_MAX", len(header) - 1)
    with pytest.raises(ModelUnavailable, match="header"), open_gguf(tmp_path / "f"):
        pass


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        (GgmlType.F32, struct.pack("<f", float("nan"))),
        (GgmlType.F32, struct.pack("<f", float("inf"))),
        (GgmlType.F16, struct.pack("<e", float("-inf"))),
        (GgmlType.BF16, struct.pack("<H", 0x7F80)),
        (GgmlType.Q8_0, struct.pack("<e", float("inf")) + bytes(32)),
        (GgmlType.Q4_1, struct.pack("<2e", 1, float("nan")) + bytes(16)),
    ],
)
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, write_gguf: Write, kind: GgmlType, stored: bytes
) -> None:
    (tmp_path / "f").write_bytes(write_gguf({}, {"t": ((kind.block_items,), int(kind), stored)}))
    with pytest.raises(ModelUnavailable, match="infinite or undefined"):
        read_only_tensor(tmp_path / "f")


def test_a_file_that_shrinks_is_refused(tmp_path: Path, write_gguf: Write) -> None:
    content = write_gguf({}, ONE)
    (tmp_path / "f").write_bytes(content)
    with open_gguf(tmp_path / "f") as file:
        (tmp_path / "f").write_bytes(b"")
        with pytest.raises(ModelUnavailable, match="shorter"):
            file.read(file.tensors["t"])


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="No such file"), open_gguf(tmp_path / "f"):
        pass
    with pytest.raises(ModelUnavailable, match="directory"), open_gguf(tmp_path):
        pass


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_any_damage_reads_or_is_refused(tmp_path: Path, write_gguf: Write, data: st.DataObject) -> None:
    metadata = {"s": "text", "l": [1, 2], "t": ["a", "b"], "f": 1.0, "b": True, "general.alignment": 32}
    tensors = {"x": ((2, 32), 3, bytes(40)), "y": ((2, 2), 0, bytes(16))}
    content = bytearray(write_gguf(metadata, tensors))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(start + 8, len(content))))
        content[start:end] = data.draw(st.binary(max_size=8))
    (tmp_path / "f").write_bytes(content)
    try:
        with open_gguf(tmp_path / "f") as file:
            for item in file.tensors.values():
                assert file.read(item).shape == item.shape
                assert item.offset + item.size <= len(content)
    except ModelUnavailable:
        pass
