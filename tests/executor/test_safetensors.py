"""Weights files: exact conversion, deterministic bytes, and ModelUnavailable for whatever is malformed."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aci_p2p.executor import safetensors
from aci_p2p.executor.api import ModelUnavailable
from aci_p2p.executor.safetensors import TensorSpec, TensorType, read_model_tensors, read_tensors, write_tensors


def file_of(header: object, data: bytes = b"") -> bytes:
    """A file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    """A header's description of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_each_type_exactly(tmp_path: Path) -> None:
    data = struct.pack("<2H2e2f", 0x3FC0, 0xC000, 0.5, -65504.0, 1e-45, 3.0)
    header = {
        "f32": entry("F32", [2], [8, 16]),
        "bf16": entry("BF16", [1, 2], [0, 4]),
        "__metadata__": {"format": "pt"},
        "f16": entry("F16", [2, 1], [4, 8]),
    }
    (tmp_path / "w").write_bytes(file_of(header, data))
    tensors = read_tensors(tmp_path / "w")
    assert list(tensors) == ["bf16", "f16", "f32"]
    assert all(tensor.dtype == np.float32 and tensor.flags.c_contiguous for tensor in tensors.values())
    assert tensors["bf16"].tolist() == [[1.5, -2.0]]
    assert tensors["f16"].tolist() == [[0.5], [-65504.0]]
    assert tensors["f32"].tolist() == [np.float32(1e-45), 3.0]


def test_reads_a_scalar_and_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "scalar").write_bytes(file_of({"s": entry(shape=[])}, struct.pack("<f", 7)))
    assert read_tensors(tmp_path / "scalar")["s"].shape == ()
    (tmp_path / "empty").write_bytes(file_of({}))
    assert read_tensors(tmp_path / "empty") == {}


def test_writes_known_bytes(tmp_path: Path) -> None:
    specs = [TensorSpec("b", (2,), TensorType.BF16), TensorSpec("a", (), TensorType.F16)]
    write_tensors(tmp_path / "w", specs, [np.array([1.5, -2], np.float32), np.array(0.5, np.float32)])
    header = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F16","shape":[],"data_offsets":[4,6]}}'
    )
    header += b" " * (-len(header) % 8)
    expected = struct.pack("<Q", len(header)) + header + struct.pack("<2He", 0x3FC0, 0xC000, 0.5)
    assert (tmp_path / "w").read_bytes() == expected


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [
        (0x3F808000, 0x3F80),  # a tie goes to the even neighbour below
        (0x3F818000, 0x3F82),  # and above
        (0x3F808001, 0x3F81),
        (0x3F807FFF, 0x3F80),
        (0x80000001, 0x8000),
        (0x3FFFFFFF, 0x4000),
    ],
)
def test_bf16_rounds_to_nearest_even(tmp_path: Path, bits: int, rounded: int) -> None:
    value = np.array([bits], np.uint32).view(np.float32)
    write_tensors(tmp_path / "w", [TensorSpec("x", (1,), TensorType.BF16)], [value])
    assert read_tensors(tmp_path / "w")["x"].view(np.uint32)[0] == rounded << 16


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path: Path, data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(1, 5), max_size=4), max_size=5))
    kinds = data.draw(st.lists(st.sampled_from(TensorType), min_size=len(shapes), max_size=len(shapes)))
    specs = [TensorSpec(f"t{n}", tuple(shape), kind) for n, (shape, kind) in enumerate(zip(shapes, kinds, strict=True))]
    random = np.random.default_rng(0)
    # Small integers are exact in every type.
    values = [random.integers(-128, 128, spec.shape).astype(np.float32) for spec in specs]
    write_tensors(tmp_path / "w", specs, values)
    tensors = read_tensors(tmp_path / "w")
    assert list(tensors) == [spec.name for spec in specs]
    for spec, value in zip(specs, values, strict=True):
        assert np.array_equal(tensors[spec.name], value)


def test_tensors_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "_CHUNK_ITEMS", 7)
    values = np.arange(60, dtype=np.float32).reshape(3, 20)
    for kind in TensorType:
        write_tensors(tmp_path / "w", [TensorSpec("x", (3, 20), kind)], [values])
        assert np.array_equal(read_tensors(tmp_path / "w")["x"], values)


def test_needs_little_memory_beyond_the_result(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{n}", (1 << 20,), TensorType.BF16) for n in range(4)]
    write_tensors(tmp_path / "w", specs, (np.zeros(1 << 20, np.float32) for _ in specs))
    tracemalloc.start()
    try:
        tensors = read_tensors(tmp_path / "w")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < sum(tensor.nbytes for tensor in tensors.values()) + (2 << 20)


@pytest.mark.parametrize("shape", [(2,), (1, 1), ()])
def test_the_writer_checks_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        write_tensors(tmp_path / "w", [TensorSpec("x", (1,), TensorType.F32)], [np.zeros(shape, np.float32)])


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "half a length": b"\x02\0\0\0",
    "header past the end": struct.pack("<Q", 3) + b"{}",
    "header past any limit": struct.pack("<Q", 1 << 63) + b"{}",
    "no JSON": file_of(b"{"),
    "no UTF-8": file_of(b'{"\xff": 1}'),
    "not an object": file_of([]),
    "deep": file_of(b"[" * 100_000),
    "deep in an object": file_of(b'{"a":' * 100_000),
    "huge number": file_of(b'{"a": ' + b"9" * 5000 + b"}"),
    "NaN": file_of(b'{"a": NaN}'),
    "a name twice": file_of(b'{"a": {}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
    "entry is a list": file_of({"a": []}),
    "field missing": file_of({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "field too many": file_of({"a": {**entry(), "x": 1}}, bytes(4)),
    "type unknown": file_of({"a": entry("F64", [1], [0, 8])}, bytes(8)),
    "type not text": file_of({"a": entry(["F32"])}, bytes(4)),
    "shape not a list": file_of({"a": entry(shape="1")}, bytes(4)),
    "shape of truth values": file_of({"a": entry(shape=[True])}, bytes(4)),
    "shape of floats": file_of({"a": entry(shape=[1.0])}, bytes(4)),
    "negative shape": file_of({"a": entry(shape=[-1, -1])}, bytes(4)),
    "zero shape": file_of({"a": entry(shape=[0, 1 << 62], offsets=[0, 0])}),
    "rank too high": file_of({"a": entry(shape=[1] * 9)}, bytes(4)),
    "size beyond the file": file_of({"a": entry(shape=[1 << 40], offsets=[0, 1 << 42])}),
    "size overflows": file_of({"a": entry(shape=[1 << 32, 1 << 32], offsets=[0, 0])}),
    "one offset": file_of({"a": entry(offsets=[0])}, bytes(4)),
    "three offsets": file_of({"a": entry(offsets=[0, 4, 4])}, bytes(4)),
    "offsets backwards": file_of({"a": entry(offsets=[4, 0])}, bytes(4)),
    "offsets of another size": file_of({"a": entry(offsets=[0, 2])}, bytes(2)),
    "overlap": file_of({"a": entry(), "b": entry()}, bytes(4)),
    "partial overlap": file_of({"a": entry(shape=[2], offsets=[0, 8]), "b": entry(offsets=[4, 8])}, bytes(8)),
    "hole": file_of({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)),
    "hole at the start": file_of({"a": entry(offsets=[4, 8])}, bytes(8)),
    "data too short": file_of({"a": entry()}, bytes(3)),
    "data too long": file_of({"a": entry()}, bytes(5)),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ModelUnavailable) as raised:
        read_tensors(tmp_path / "w")
    assert str(tmp_path / "w") in raised.value.message


def test_a_long_header_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = file_of({"a": entry()}, bytes(4))
    (tmp_path / "w").write_bytes(content)
    length = len(content) - 12
    monkeypatch.setattr(safetensors, "HEADER_BYTES_MAX", length)
    assert read_tensors(tmp_path / "w")["a"] == [0]
    monkeypatch.setattr(safetensors, "HEADER_BYTES_MAX", length - 1)
    with pytest.raises(ModelUnavailable, match="header"):
        read_tensors(tmp_path / "w")


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="No such file"):
        read_tensors(tmp_path / "w")
    with pytest.raises(ModelUnavailable, match="directory"):
        read_tensors(tmp_path)


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 65) | st.sampled_from(["F32", "BF16", "x"]) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)
naturals = st.lists(st.integers(0, 9), max_size=3)
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16"]) | json_values, "shape": naturals | json_values},
    optional={"data_offsets": naturals | json_values},
)


@given(header=st.dictionaries(st.text(max_size=3), entries | json_values, max_size=3), data=st.binary(max_size=32))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_reads_or_is_refused(tmp_path: Path, header: dict[str, object], data: bytes) -> None:
    read_or_refuse(tmp_path / "w", file_of(header, data))


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_reads_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    header = {"a": entry(), "b": entry("BF16", [2, 3], [4, 16])}
    content = bytearray(file_of(header, bytes(16)))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(start + 4, len(content))))
        content[start:end] = data.draw(st.binary(max_size=4))
    read_or_refuse(tmp_path / "w", bytes(content))


def read_or_refuse(path: Path, content: bytes) -> None:
    """Whatever is read accounts for every byte of the file."""
    path.write_bytes(content)
    try:
        tensors = read_tensors(path)
    except ModelUnavailable:
        return
    length = struct.unpack_from("<Q", content)[0]
    widths = {"F32": 4, "F16": 2, "BF16": 2}
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    assert tensors.keys() == header.keys()
    assert sum(widths[header[name]["dtype"]] * tensor.size for name, tensor in tensors.items()) == (
        len(content) - 8 - length
    )


@pytest.fixture
def sharded(tmp_path: Path) -> Callable[[dict[str, Sequence[str]], object], Path]:
    """Makes a directory with shards that hold the named tensors, and an index."""

    def make(shards: dict[str, Sequence[str]], weight_map: object) -> Path:
        for shard, names in shards.items():
            specs = [TensorSpec(name, (1,), TensorType.F32) for name in names]
            write_tensors(tmp_path / shard, specs, [np.array([ord(name)], np.float32) for name in names])
        index = {"metadata": {"total_size": 12}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    return make


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_reads_shards(sharded: Callable[..., Path]) -> None:
    directory = sharded({ONE: "ac", TWO: "b"}, {"a": ONE, "b": TWO, "c": ONE})
    assert {name: tensor.tolist() for name, tensor in read_model_tensors(directory).items()} == {
        "a": [97.0],
        "b": [98.0],
        "c": [99.0],
    }


def test_a_single_file_goes_before_an_index(sharded: Callable[..., Path]) -> None:
    directory = sharded({ONE: "a", "model.safetensors": "z"}, {"a": ONE})
    assert list(read_model_tensors(directory)) == ["z"]


@pytest.mark.parametrize(
    ("shards", "weight_map"),
    [
        ({ONE: "a"}, {"a": ONE, "b": TWO}),
        ({ONE: "ab"}, {"a": ONE}),
        ({ONE: "a"}, {"a": ONE, "b": ONE}),
        ({ONE: "ab", TWO: "b"}, {"a": ONE, "b": TWO}),
        ({ONE: "a"}, {"a": "../" + ONE}),
        ({ONE: "a"}, {"a": "/etc/passwd"}),
        ({ONE: "a"}, {"a": 1}),
        ({ONE: "a"}, {"a": ""}),
        ({ONE: "a"}, [ONE]),
        ({ONE: "a"}, None),
    ],
)
def test_an_index_that_is_wrong_is_refused(
    sharded: Callable[..., Path], shards: dict[str, str], weight_map: object
) -> None:
    with pytest.raises(ModelUnavailable):
        read_model_tensors(sharded(shards, weight_map))


def test_the_number_of_shards_is_bounded(sharded: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = sharded({ONE: "a", TWO: "b"}, {"a": ONE, "b": TWO})
    monkeypatch.setattr(safetensors, "SHARDS_MAX", 2)
    assert len(read_model_tensors(directory)) == 2
    monkeypatch.setattr(safetensors, "SHARDS_MAX", 1)
    with pytest.raises(ModelUnavailable, match="shards"):
        read_model_tensors(directory)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="neither"):
        read_model_tensors(tmp_path)


@pytest.mark.model
def test_the_default_model(aci_home: Path) -> None:
    tensors = read_model_tensors(aci_home / "models" / "smollm2-135m-instruct" / "files")
    assert sum(tensor.size for tensor in tensors.values()) == 134_515_008
    assert tensors["model.embed_tokens.weight"].shape == (49152, 576)
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
