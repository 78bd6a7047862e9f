"""GGUF to Hugging Face: every value where it belongs, the same bytes always, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer

from aci_p2p.executor.api import ModelUnavailable
from aci_p2p.executor.convert import LAYER_TENSORS, convert_gguf
from aci_p2p.executor.progress import Progress, Stage
from aci_p2p.executor.safetensors import read_tensors
from aci_p2p.protocol.errors import LocalError

Tensor = tuple[tuple[int, ...], int, bytes]
Llama = tuple[dict[str, object], dict[str, Tensor]]
Write = Callable[..., bytes]


def test_config(gguf: Path, tmp_path: Path) -> None:
    convert_gguf(gguf, tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((tmp_path / "hf/config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "max_position_embeddings": 64,
        "vocab_size": 6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    assert json.loads((tmp_path / "hf/generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def test_tokenizer(gguf: Path, llama: Llama, tmp_path: Path) -> None:
    convert_gguf(gguf, tmp_path / "hf")
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    assert tokenizer.encode("<|start|>abba11<|end|>").ids == [1, 4, 3, 2, 5, 5, 0]
    assert tokenizer.decode([4, 2, 0, 5]) == "aba1"
    config = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert config["chat_template"] == llama[0]["tokenizer.chat_template"]
    assert (config["bos_token"], config["eos_token"], config["pad_token"], config["unk_token"]) == (
        "<|start|>",
        "<|end|>",
        "<|end|>",
        "<|end|>",
    )
    assert config["model_max_length"] == 64


def test_pre_tokenizers_differ_in_digits(write_gguf: Write, llama: Llama, tmp_path: Path) -> None:
    metadata, tensors = llama
    metadata["tokenizer.ggml.tokens"] = ["<|end|>", "<|start|>", "a", "b", "ab", "1", "11"]
    metadata["tokenizer.ggml.merges"] = ["a b", "1 1"]
    metadata["tokenizer.ggml.token_type"] = [3, 4, 1, 1, 0, 1, 1]
    tensors["token_embd.weight"] = ((7, 32), 0, bytes(7 * 32 * 4))
    for variant, ids in (("smollm", [5, 5]), ("gpt-2", [6])):
        metadata["tokenizer.ggml.pre"] = variant
        (tmp_path / "g").write_bytes(write_gguf(metadata, tensors))
        convert_gguf(tmp_path / "g", tmp_path / variant)
        tokenizer = Tokenizer.from_file(str(tmp_path / variant / "tokenizer.json"))
        assert tokenizer.encode("11").ids == ids
        # A user-defined token is matched in text like a control token, but is text when decoded.
        assert tokenizer.encode("<|start|>").ids == [1]
        assert tokenizer.decode([0, 1]) == "<|start|>"


def permuted(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """As llama.cpp's convert_hf_to_gguf.py stores query and key rows."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def test_every_tensor_has_its_place(write_gguf: Write, llama: Llama, tmp_path: Path) -> None:
    metadata, tensors = llama
    expected: dict[str, npt.NDArray[np.float32]] = {}
    # Values that bf16 holds exactly and that differ within and between tensors.
    for number, (name, (shape, kind, _)) in enumerate(tensors.items()):
        count = int(np.prod(shape))
        values = (np.arange(count, dtype=np.uint32) * 7 + number * 1013 & 0x3FFF | 0x3000).astype(np.uint32)
        array = (values << 16).view(np.float32).reshape(shape)
        stored = permuted(array, 4 if ".attn_q." in name else 2) if ".attn_q." in name or ".attn_k." in name else array
        tensors[name] = (shape, kind, stored.tobytes())
        expected[name] = array
    (tmp_path / "g").write_bytes(write_gguf(metadata, tensors))
    convert_gguf(tmp_path / "g", tmp_path / "hf")
    result = read_tensors(tmp_path / "hf/model.safetensors")
    assert len(result) == len(expected)
    assert np.array_equal(result["model.embed_tokens.weight"], expected["token_embd.weight"])
    assert np.array_equal(result["model.norm.weight"], expected["output_norm.weight"])
    for layer in range(2):
        for name, target in LAYER_TENSORS.items():
            converted = result[f"model.layers.{layer}.{target}.weight"]
            assert np.array_equal(converted, expected[f"blk.{layer}.{name}.weight"]), name


def test_an_output_matrix_of_its_own(write_gguf: Write, llama: Llama, tmp_path: Path) -> None:
    metadata, tensors = llama
    output = np.arange(6 * 32, dtype=np.float32).reshape(6, 32)
    tensors["output.weight"] = ((6, 32), 0, output.tobytes())
    (tmp_path / "g").write_bytes(write_gguf(metadata, tensors))
    convert_gguf(tmp_path / "g", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["tie_word_embeddings"] is False
    assert np.array_equal(read_tensors(tmp_path / "hf/model.safetensors")["lm_head.weight"], output)


def test_quantised_tensors(write_gguf: Write, llama: Llama, tmp_path: Path) -> None:
    metadata, tensors = llama
    block = np.array([0.5, -1], "<f2").tobytes() + bytes(range(16))
    tensors["blk.0.ffn_up.weight"] = ((64, 32), 3, block * 64)
    (tmp_path / "g").write_bytes(write_gguf(metadata, tensors))
    convert_gguf(tmp_path / "g", tmp_path / "hf")
    rows = read_tensors(tmp_path / "hf/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert rows.tolist() == [[q * 0.5 - 1 for q in range(16)] + [-1.0] * 16] * 64


def test_same_bytes_every_time(gguf: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert_gguf(gguf, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


CHANGES: dict[str, tuple[str, dict[str, object]]] = {
    "other architecture": ("architecture 'gpt2'", {"general.architecture": "gpt2"}),
    "no architecture": ("general.architecture", {"general.architecture": None}),
    "scaled rope": ("scaled", {"llama.rope.scaling.type": "yarn"}),
    "no layers": ("attention heads", {"llama.block_count": 0}),
    "more layers": ("tensors of its layers", {"llama.block_count": 3}),
    "absurd layers": ("tensors of its layers", {"llama.block_count": 0xFFFFFFFF}),
    "layers as text": ("llama.block_count", {"llama.block_count": "2"}),
    "no heads": ("attention heads", {"llama.attention.head_count": 0}),
    "no key heads": ("attention heads", {"llama.attention.head_count_kv": 0}),
    "heads not shared evenly": ("attention heads", {"llama.attention.head_count_kv": 3}),
    "odd head size": ("attention heads", {"llama.attention.key_length": 7, "llama.rope.dimension_count": 7}),
    "partly rotated": ("attention heads", {"llama.rope.dimension_count": 4}),
    "other hidden size": ("wrong shape", {"llama.embedding_length": 64, "llama.attention.key_length": 8}),
    "other intermediate size": ("wrong shape", {"llama.feed_forward_length": 32}),
    "epsilon zero": ("epsilon", {"llama.attention.layer_norm_rms_epsilon": 0.0}),
    "epsilon NaN": ("epsilon", {"llama.attention.layer_norm_rms_epsilon": float("nan")}),
    "theta infinite": ("freq_base", {"llama.rope.freq_base": float("inf")}),
    "context missing": ("context_length", {"llama.context_length": None}),
    "other tokenizer": ("tokenizer 'llama'", {"tokenizer.ggml.model": "llama"}),
    "other pre-tokenizer": ("tokenizer 'gpt2' 'qwen2'", {"tokenizer.ggml.pre": "qwen2"}),
    "adds a first token": ("first token", {"tokenizer.ggml.add_bos_token": True}),
    "flag as number": ("add_bos_token wrongly", {"tokenizer.ggml.add_bos_token": 0}),
    "special token outside": ("outside", {"tokenizer.ggml.eos_token_id": 6}),
    "unknown token outside": ("outside", {"tokenizer.ggml.unknown_token_id": 6}),
    "no chat template": ("chat_template", {"tokenizer.chat_template": None}),
    "tokens as numbers": ("tokenizer.ggml.tokens", {"tokenizer.ggml.tokens": [1, 2]}),
    "types as text": ("token_type", {"tokenizer.ggml.token_type": ["x"]}),
    "a type short": ("one type for each", {"tokenizer.ggml.token_type": [3, 3, 1, 1, 1]}),
    "a token twice": ("token twice", {"tokenizer.ggml.tokens": ["a", "b", "c", "d", "e", "a"]}),
    "merge of three": ("merge", {"tokenizer.ggml.merges": ["a b 1"]}),
    "merge of one": ("merge", {"tokenizer.ggml.merges": ["ab"]}),
    "merge of strangers": ("merge", {"tokenizer.ggml.merges": ["a x"]}),
    "merge to a stranger": ("merge", {"tokenizer.ggml.merges": ["b a"]}),
}
"""What the message must say, and the metadata that is wrong; None removes an entry."""


@pytest.mark.parametrize(("reason", "changes"), CHANGES.values(), ids=CHANGES.keys())
def test_unfit_models_are_refused(
    write_gguf: Write, llama: Llama, tmp_path: Path, reason: str, changes: dict[str, object]
) -> None:
    metadata, tensors = llama
    metadata |= changes
    present = {key: value for key, value in metadata.items() if value is not None}
    (tmp_path / "g").write_bytes(write_gguf(present, tensors))
    with pytest.raises(ModelUnavailable, match=reason):
        convert_gguf(tmp_path / "g", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


@pytest.mark.parametrize(
    ("removed", "added"),
    [
        ("blk.1.attn_q.weight", None),
        ("blk.1.attn_q.weight", "blk.2.attn_q.weight"),
        ("blk.1.attn_q.weight", "rope_freqs.weight"),
        (None, "blk.1.attn_q.bias"),
    ],
)
def test_other_tensors_are_refused(
    write_gguf: Write, llama: Llama, tmp_path: Path, removed: str | None, added: str | None
) -> None:
    metadata, tensors = llama
    if added is not None:
        tensors[added] = tensors["blk.1.attn_q.weight"]
    if removed is not None:
        del tensors[removed]
    (tmp_path / "g").write_bytes(write_gguf(metadata, tensors))
    with pytest.raises(ModelUnavailable, match="tensor"):
        convert_gguf(tmp_path / "g", tmp_path / "hf")


def test_an_existing_directory_is_left_alone(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(LocalError, match="exists"):
        convert_gguf(gguf, tmp_path / "hf")
    assert not list((tmp_path / "hf").iterdir())


def test_progress(gguf: Path, tmp_path: Path) -> None:
    reports: list[Progress] = []
    convert_gguf(gguf, tmp_path / "hf", reports.append)
    assert {report.stage for report in reports} == {Stage.CONVERTING}
    assert [report.done for report in reports] == sorted(report.done for report in reports)
    assert reports[0].done == 0
    assert reports[-1].done == reports[-1].total == reports[0].total > 0


class Stopped(BaseException):
    """Stands for Ctrl-C or a cancelled thread."""


@pytest.mark.parametrize("moment", [0, 7, 20])
def test_stopped_at_any_moment_nothing_remains(gguf: Path, tmp_path: Path, moment: int) -> None:
    count = 0

    def stop(_progress: Progress) -> None:
        nonlocal count
        if count == moment:
            raise Stopped
        count += 1

    with pytest.raises(Stopped):
        convert_gguf(gguf, tmp_path / "hf", stop)
    assert list(tmp_path.iterdir()) == [gguf]
    convert_gguf(gguf, tmp_path / "hf")


@pytest.mark.model
def test_the_default_model_is_the_pinned_one(aci_home: Path) -> None:
    path = aci_home / "models/smollm2-135m-instruct/files/model.safetensors"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
