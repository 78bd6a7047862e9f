"""Tiny models: GGUF files written by hand, and directories as the model store keeps them."""

from __future__ import annotations

import copy
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import pytest

from aci_p2p.executor import store as store_module
from aci_p2p.executor.convert import convert_gguf
from aci_p2p.executor.store import ModelStore, StoredModel

GGUF_TYPES: Mapping[type, tuple[int, str]] = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}
"""Metadata type and struct code by Python type."""
LLAMA: Mapping[str, object] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": 8,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", "<|start|>", "a", "b", "ab", "1"],
    "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
}
"""Metadata of a tiny Llama: hidden size 32, 4 heads and 2 key heads of 8, 6 tokens."""
LAYER_SHAPES: Mapping[str, tuple[int, ...]] = {
    "attn_norm": (32,),
    "ffn_norm": (32,),
    "attn_q": (32, 32),
    "attn_k": (16, 32),
    "attn_v": (16, 32),
    "attn_output": (32, 32),
    "ffn_gate": (64, 32),
    "ffn_up": (64, 32),
    "ffn_down": (32, 64),
}
"""Row-major shapes of one of its layers."""

Tensor = tuple[tuple[int, ...], int, bytes]
"""Row-major shape, ggml type number, stored bytes."""


class WriteGguf(Protocol):
    """Makes the bytes of a GGUF file."""

    def __call__(self, metadata: Mapping[str, object], tensors: Mapping[str, Tensor], *, version: int = 3) -> bytes:
        """Values are of Python types; int becomes uint32, float float32."""
        ...


@pytest.fixture(scope="session")
def write_gguf() -> WriteGguf:
    """A GGUF writer."""
    return _write_gguf


@pytest.fixture
def llama() -> tuple[dict[str, object], dict[str, Tensor]]:
    """Metadata and tensors of the tiny Llama, to be changed and written; all fp32, q and k in llama.cpp's order."""
    return copy.deepcopy(dict(LLAMA)), _tensors()


@pytest.fixture
def gguf(tmp_path: Path, llama: tuple[dict[str, object], dict[str, Tensor]]) -> Path:
    """The tiny Llama as a GGUF file."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(_write_gguf(*llama))
    return path


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Makes the tiny Llama as a Hugging Face directory at a path, and returns the path."""
    source = tmp_path_factory.mktemp("model")
    (source / "gguf").write_bytes(_write_gguf(LLAMA, _tensors()))
    convert_gguf(source / "gguf", source / "hf")

    def make(path: Path) -> Path:
        shutil.copytree(source / "hf", path)
        return path

    return make


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    """An empty store that remembers checks however fresh the files are."""
    monkeypatch.setattr(store_module, "CLOCK_TICK", -(10**9))
    return ModelStore(tmp_path / "store")


@pytest.fixture
def directory(tmp_path: Path, make_model: Callable[[Path], Path]) -> Path:
    """A tiny model's directory."""
    return make_model(tmp_path / "Tiny Model")


@pytest.fixture
def model(store: ModelStore, directory: Path) -> StoredModel:
    """The tiny model in the store, registered where it is."""
    return store.add_directory(directory, "tiny", licence="Apache-2.0")


def _tensors() -> dict[str, Tensor]:
    random = np.random.default_rng(1)
    shapes = {"token_embd.weight": (6, 32), "output_norm.weight": (32,)}
    shapes |= {f"blk.{layer}.{name}.weight": shape for layer in range(2) for name, shape in LAYER_SHAPES.items()}
    return {name: (shape, 0, random.standard_normal(shape, np.float32).tobytes()) for name, shape in shapes.items()}


def _write_gguf(metadata: Mapping[str, object], tensors: Mapping[str, Tensor], *, version: int = 3) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        header += _string(key) + _value(value)
    data = b""
    for name, (shape, kind, stored) in tensors.items():
        header += _string(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, len(data))
        data += stored + bytes(-len(stored) % 32)
    return header + bytes(-len(header) % 32) + data


def _value(value: object) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, list):
        # Elements come behind one type and their count instead of a type each.
        items = [_value(item) for item in cast("list[object]", value)]
        head = struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items))
        return head + b"".join(item[4:] for item in items)
    kind, code = GGUF_TYPES[type(value)]
    return struct.pack("<I" + code, kind, value)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
