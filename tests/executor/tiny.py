"""Tiny random Llama models as Hugging Face directories, the same bytes for the same arguments everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from aci_p2p.executor.safetensors import TensorSpec, TensorType, write_tensors

HIDDEN: Final = 48
INTERMEDIATE: Final = 80
LAYERS: Final = 2
HEADS: Final = 6
KV_HEADS: Final = 2
HEAD_SIZE: Final = 8
CONTEXT: Final = 512

SPECIAL: Final = ("<|end|>", "<|start|>", "<|pad|>")
"""Special tokens, ids 0 to 2."""
END: Final = 0
MERGES: Final = (("a", "b"), ("ab", "c"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("l", "l"), ("<", "|"), ("|", ">"))
"""Byte-level merges in order of rank."""
TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}{{ raise_exception('a late system message') }}{% endif %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

VARIANTS: Final[Mapping[str, Mapping[str, object]]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "bias": {"attention_bias": True},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
}
"""Changes of config.json, by name."""


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def vocabulary() -> dict[str, int]:
    """Token ids by token."""
    merged = [left + right for left, right in MERGES]
    return {token: index for index, token in enumerate([*SPECIAL, *byte_characters(), *merged])}


def tokenizer() -> dict[str, object]:
    """tokenizer.json: GPT-2's splitting, byte-level BPE, special tokens."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for index, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary(),
            "merges": [f"{left} {right}" for left, right in MERGES],
        },
    }


def write_tiny_model(directory: Path, *, seed: int = 0, changes: Mapping[str, object] | None = None) -> Path:
    """Write a model with about 50,000 random weights; `changes` go into config.json. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT,
        "vocab_size": len(vocabulary()),
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "eos_token_id": END,
        **(changes or {}),
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [END]}))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer()))
    tokens = {"bos_token": SPECIAL[1], "eos_token": {"content": SPECIAL[0]}, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokens))
    shapes = tensor_shapes(config)
    specs = [TensorSpec(name, shape, TensorType.F32) for name, shape in shapes.items()]
    write_tensors(directory / "model.safetensors", specs, random_tensors(shapes, seed).values())
    return directory


def tensor_shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Names as transformers has them, shapes (outputs, inputs)."""
    queries, keys = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
    qwen2 = config["model_type"] == "qwen2"
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (len(vocabulary()), HIDDEN)}
    for index in range(LAYERS):
        layer = f"model.layers.{index}."
        shapes[layer + "input_layernorm.weight"] = (HIDDEN,)
        shapes[layer + "post_attention_layernorm.weight"] = (HIDDEN,)
        for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (outputs, HIDDEN)
            if config.get("attention_bias") or qwen2:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (outputs,)
        shapes[layer + "self_attn.o_proj.weight"] = (HIDDEN, queries)
        if config.get("attention_bias"):
            shapes[layer + "self_attn.o_proj.bias"] = (HIDDEN,)
        shapes[layer + "mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[layer + "mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[layer + "mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    shapes["model.norm.weight"] = (HIDDEN,)
    if config["tie_word_embeddings"] is False:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return shapes


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Uniform weights; raw Philox words, whose values numpy promises never to change."""
    bits = np.random.Philox(key=seed)
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for name, shape in shapes.items():
        words = bits.random_raw(int(np.prod(shape))) >> np.uint64(40)
        uniform = words.astype(np.float32).reshape(shape) / np.float32(1 << 24) - np.float32(0.5)
        tensors[name] = uniform + np.float32(1) if name.endswith("norm.weight") else uniform
    return tensors
