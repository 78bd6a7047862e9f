"""From a GGUF file of a Llama model to a Hugging Face directory: bf16 safetensors, tokenizer and configuration.

The same file gives the same bytes on every machine, so the result has one weights root. Sources: llama.cpp,
convert_hf_to_gguf.py (names, permutation of the query and key rows, tokenizer types); transformers, modeling_llama.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from aci_p2p.executor.api import ModelUnavailable
from aci_p2p.executor.files import malformed, temporary_directory
from aci_p2p.executor.gguf import GgufFile, Metadata, open_gguf
from aci_p2p.executor.progress import Progress, Report, Stage, silent
from aci_p2p.executor.safetensors import TensorSpec, TensorType, write_tensors
from aci_p2p.executor.store import SINGLE_FILE
from aci_p2p.files import sync
from aci_p2p.protocol.errors import LocalError

LAYER_TENSORS: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of one layer's tensors: GGUF to Hugging Face."""
INDIVIDUAL_DIGITS: Final[Mapping[str, bool]] = {"gpt-2": False, "smollm": True}
"""Pre-tokenizers that can be converted: whether each digit is a token of its own, before GPT-2's pattern."""

_ARCHITECTURE = "llama"
_CONTROL, _USER_DEFINED = 3, 4
"""Token types matched in text before the merges apply (enum llama_token_type)."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """Hyperparameters of a Llama model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int


def convert_gguf(source: Path, directory: Path, report: Report = silent) -> None:
    """Write the model in `source` as `directory`, which must not exist and then appears whole, synced to disk.

    Writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and model.safetensors. Raises
    ModelUnavailable when the file is malformed or holds another kind of model, LocalError when the directory exists,
    OSError when it cannot be written, and what `report` raises.
    """
    if directory.exists():
        msg = f"{directory} exists already"
        raise LocalError(msg)
    with open_gguf(source) as gguf, temporary_directory(directory.parent, f".{directory.name}-") as temporary:
        metadata = _Metadata(source, gguf.metadata)
        shape = _read_shape(metadata)
        tied = "output.weight" not in gguf.tensors
        specs = _specs(gguf, shape, tied=tied)
        config = _config(metadata, shape, tied=tied)
        documents = {
            "config.json": config,
            "generation_config.json": {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
            "tokenizer.json": _tokenizer(metadata),
            "tokenizer_config.json": _tokenizer_config(metadata, config),
        }
        for name, document in documents.items():
            text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
            (temporary / name).write_bytes(text.encode())
        write_tensors(temporary / SINGLE_FILE, specs, _values(gguf, shape, report))
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        temporary.rename(directory)
    sync(directory.parent)


class _Metadata:
    """Typed access to metadata; every miss is a ModelUnavailable."""

    def __init__(self, path: Path, values: Mapping[str, Metadata]) -> None:
        self.path = path
        self.values = values
        architecture = self.text("general.architecture")
        if architecture != _ARCHITECTURE:
            raise _unsupported(self.path, f"architecture {architecture[:64]!r}")
        if any(key.startswith(f"{_ARCHITECTURE}.rope.scaling") for key in values):
            raise _unsupported(self.path, "scaled rotary embeddings")

    def natural(self, key: str, default: int | None = None) -> int:
        """An integer from 0."""
        value = self.values.get(key, default)
        if type(value) is not int or value < 0:
            raise malformed(self.path, f"does not give {key}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive fp32 number, as the shortest decimal that denotes it."""
        value = self.values.get(key, default)
        if type(value) is not float or not 0 < value < float("inf"):
            raise malformed(self.path, f"does not give {key}")
        return float(str(np.float32(value)))

    def flag(self, key: str) -> bool:
        """A truth value, false when absent."""
        value = self.values.get(key, False)
        if type(value) is not bool:
            raise malformed(self.path, f"gives {key} wrongly")
        return value

    def text(self, key: str) -> str:
        """A string."""
        value = self.values.get(key)
        if type(value) is not str:
            raise malformed(self.path, f"does not give {key}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        value = self.values.get(key)
        if type(value) is not list or not all(type(item) is str for item in value):
            raise malformed(self.path, f"does not give {key}")
        return cast("list[str]", value)

    def naturals(self, key: str) -> list[int]:
        """A list of integers from 0."""
        value = self.values.get(key)
        if type(value) is not list or not all(type(item) is int and item >= 0 for item in value):
            raise malformed(self.path, f"does not give {key}")
        return cast("list[int]", value)


def _read_shape(metadata: _Metadata) -> _Shape:
    heads = metadata.natural("llama.attention.head_count")
    hidden = metadata.natural("llama.embedding_length")
    kv_heads = metadata.natural("llama.attention.head_count_kv", heads)
    head_size = metadata.natural("llama.attention.key_length", hidden // max(heads, 1))
    shape = _Shape(
        layers=metadata.natural("llama.block_count"),
        hidden=hidden,
        intermediate=metadata.natural("llama.feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=len(metadata.texts("tokenizer.ggml.tokens")),
    )
    rotated = metadata.natural("llama.rope.dimension_count", head_size)
    if 0 in (heads, kv_heads, shape.layers) or heads % max(kv_heads, 1) or head_size % 2 or rotated != head_size:
        raise _unsupported(metadata.path, "unusual attention heads")
    return shape


def _specs(gguf: GgufFile, shape: _Shape, *, tied: bool) -> list[TensorSpec]:
    """What to write, in the order of the GGUF file; every tensor must be there, in its shape, and no other."""
    # The count comes first: it bounds the work that a wrong number of layers could cause.
    if len(gguf.tensors) != len(LAYER_TENSORS) * shape.layers + (2 if tied else 3):
        raise malformed(gguf.path, "does not have the tensors of its layers")
    names = _names(shape)
    specs: list[TensorSpec] = []
    for tensor in gguf.tensors.values():
        name, dimensions = names.get(tensor.name, ("", ()))
        if tensor.shape != dimensions:
            raise malformed(gguf.path, f"has an unknown tensor {tensor.name[:64]!r} or a wrong shape of it")
        specs.append(TensorSpec(name, tensor.shape, TensorType.BF16))
    return specs


def _names(shape: _Shape) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Hugging Face's name and the shape of every tensor, by its GGUF name."""
    embedding = (shape.vocabulary, shape.hidden)
    query, key = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    shapes: Mapping[str, tuple[int, ...]] = {
        "attn_norm": (shape.hidden,),
        "ffn_norm": (shape.hidden,),
        "attn_q": (query, shape.hidden),
        "attn_k": (key, shape.hidden),
        "attn_v": (key, shape.hidden),
        "attn_output": (shape.hidden, query),
        "ffn_gate": (shape.intermediate, shape.hidden),
        "ffn_up": (shape.intermediate, shape.hidden),
        "ffn_down": (shape.hidden, shape.intermediate),
    }
    names: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", embedding),
        "output_norm.weight": ("model.norm.weight", (shape.hidden,)),
        "output.weight": ("lm_head.weight", embedding),
    }
    for layer in range(shape.layers):
        for name, target in LAYER_TENSORS.items():
            names[f"blk.{layer}.{name}.weight"] = (f"model.layers.{layer}.{target}.weight", shapes[name])
    return names


def _values(gguf: GgufFile, shape: _Shape, report: Report) -> Iterator[npt.NDArray[np.float32]]:
    """The tensors' values in the order of the file."""
    done, total = 0, sum(tensor.size for tensor in gguf.tensors.values())
    for tensor in gguf.tensors.values():
        report(Progress(Stage.CONVERTING, done, total))
        values = gguf.read(tensor)
        if ".attn_q." in tensor.name:
            values = _unpermute(values, shape.heads)
        elif ".attn_k." in tensor.name:
            values = _unpermute(values, shape.kv_heads)
        yield values
        done += tensor.size
    report(Progress(Stage.CONVERTING, total, total))


def _unpermute(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's order of query and key rows: it rotates neighbouring pairs, Hugging Face the two halves."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(metadata: _Metadata, shape: _Shape, *, tied: bool) -> dict[str, object]:
    """config.json."""
    tokens = {
        f"{name}_token_id": metadata.natural(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    if max(tokens.values()) >= shape.vocabulary:
        raise malformed(metadata.path, "has a special token outside its vocabulary")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "rms_norm_eps": metadata.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("llama.rope.freq_base", 10000.0),
        "max_position_embeddings": metadata.natural("llama.context_length"),
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        **tokens,
    }


def _tokenizer(metadata: _Metadata) -> dict[str, object]:
    """tokenizer.json (huggingface/tokenizers): byte-level BPE."""
    model, variant = metadata.text("tokenizer.ggml.model"), metadata.text("tokenizer.ggml.pre")
    if model != "gpt2" or variant not in INDIVIDUAL_DIGITS:
        raise _unsupported(metadata.path, f"tokenizer {model[:32]!r} {variant[:32]!r}")
    if metadata.flag("tokenizer.ggml.add_bos_token"):
        raise _unsupported(metadata.path, "a tokenizer that adds a first token by itself")
    tokens, types = metadata.texts("tokenizer.ggml.tokens"), metadata.naturals("tokenizer.ggml.token_type")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise malformed(metadata.path, "has a token twice, or not one type for each")
    merges = metadata.texts("tokenizer.ggml.merges")
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not left or not right or not {left, right, left + right} <= vocabulary.keys():
            raise malformed(metadata.path, "has a merge of unknown tokens")
    spaced = metadata.flag("tokenizer.ggml.add_space_prefix")
    byte_level = {"type": "ByteLevel", "add_prefix_space": spaced, "trim_offsets": True, "use_regex": True}
    digits = [{"type": "Digits", "individual_digits": True}] if INDIVIDUAL_DIGITS[variant] else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == _CONTROL,
            }
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*digits, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _tokenizer_config(metadata: _Metadata, config: Mapping[str, object]) -> dict[str, object]:
    """tokenizer_config.json."""
    tokens = metadata.texts("tokenizer.ggml.tokens")
    special = {f"{name}_token": tokens[cast("int", config[f"{name}_token_id"])] for name in ("bos", "eos", "pad")}
    unknown = metadata.natural("tokenizer.ggml.unknown_token_id", 0)
    if unknown >= len(tokens):
        raise malformed(metadata.path, "has a special token outside its vocabulary")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": metadata.text("tokenizer.chat_template"),
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "unk_token": tokens[unknown],
        **special,
    }


def _unsupported(path: Path, what: str) -> ModelUnavailable:
    """The error for a sound file of a kind that is not converted."""
    return ModelUnavailable(f"{path} has {what}, which cannot be converted")
