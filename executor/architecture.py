"""What config.json says of a Llama-family model: its sizes and its rotary position embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, cast

import numpy as np
import numpy.typing as npt

from aci_p2p.executor.api import ModelUnavailable
from aci_p2p.executor.files import malformed, read_json
from aci_p2p.executor.store import CONFIG_BYTES_MAX, CONFIG_FILE

FAMILY: Final = ("llama", "qwen2")
"""Values of `model_type` with this architecture: RMSNorm, rotary positions, grouped queries, SwiGLU."""

_DEFAULT_EPSILON = 1e-6
_DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes and constants of a model; defaults are those of transformers' `LlamaConfig`."""

    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width of the feed-forward network."""
    layers: int
    """Number of blocks."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads; each serves heads / kv_heads query heads."""
    head_size: int
    """Width of one head, even."""
    epsilon: float
    """Added to the mean square in RMSNorm."""
    context: int
    """Longest sequence, tokens."""
    vocabulary: int
    """Number of token ids."""
    tied: bool
    """Whether the output projection is the embedding."""
    theta: float
    """Base of the rotary frequencies."""
    scaling: Mapping[str, object]
    """`rope_scaling` of config.json; empty for unscaled frequencies."""

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read `config.json`. Raises ModelUnavailable when it is malformed or asks for what is not built in."""
        path = directory / CONFIG_FILE
        fields = _Fields(path, read_json(path, CONFIG_BYTES_MAX))
        fields.require("model_type", *FAMILY)
        fields.require("hidden_act", "silu")
        fields.refuse("mlp_bias")
        fields.refuse("use_sliding_window")
        rope = fields.table("rope_parameters") or fields.table("rope_scaling")
        heads = fields.positive("num_attention_heads")
        hidden = fields.positive("hidden_size")
        architecture = cls(
            hidden=hidden,
            intermediate=fields.positive("intermediate_size"),
            layers=fields.positive("num_hidden_layers"),
            heads=heads,
            kv_heads=fields.positive("num_key_value_heads", heads),
            head_size=fields.positive("head_dim", hidden // heads),
            epsilon=fields.real("rms_norm_eps", _DEFAULT_EPSILON),
            context=fields.positive("max_position_embeddings"),
            vocabulary=fields.positive("vocab_size"),
            tied=fields.get("tie_word_embeddings") is True,
            theta=_Fields(path, rope).real("rope_theta", fields.real("rope_theta", _DEFAULT_THETA)),
            scaling=rope,
        )
        if architecture.heads % architecture.kv_heads or architecture.head_size % 2:
            raise malformed(path, "has heads that do not fit together")
        rotary_frequencies(path, architecture)
        return architecture


def rotary_frequencies(path: Path, architecture: Architecture) -> npt.NDArray[np.float32]:
    """Radians per position of each pair of a head's dimensions, shape (head_size / 2,), highest first.

    Su et al. 2021 (RoFormer), equation 15; `linear` divides all by a factor, `llama3` only the low ones with a smooth
    transition (Llama 3.1; transformers, modeling_rope_utils). Raises ModelUnavailable on another scaling; `path` is
    where it was read.
    """
    exponents = np.arange(0, architecture.head_size, 2, dtype=np.float32) / np.float32(architecture.head_size)
    frequencies: npt.NDArray[np.float32] = np.float32(1) / np.float32(architecture.theta) ** exponents
    fields = _Fields(path, architecture.scaling)
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _unsupported(path, "partial_rotary_factor", fields.get("partial_rotary_factor"))
    if kind == "linear":
        frequencies /= np.float32(fields.real("factor"))
    elif kind == "llama3":
        factor, low, high = (fields.real(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        turns = fields.real("original_max_position_embeddings") * frequencies / (2 * math.pi)
        if low >= high:
            raise malformed(path, "has low_freq_factor above high_freq_factor")
        unscaled = np.clip((turns - low) / (high - low), 0, 1)
        frequencies *= unscaled + (1 - unscaled) / factor
    elif kind != "default":
        raise _unsupported(path, "rope_type", kind)
    return frequencies


class _Fields:
    """Typed access to one JSON object."""

    def __init__(self, path: Path, values: Mapping[str, object]) -> None:
        self._path = path
        self._values = values

    def get(self, name: str) -> object:
        return self._values.get(name)

    def require(self, name: str, *allowed: str) -> None:
        """Raise ModelUnavailable unless the value is one of `allowed`."""
        if self.get(name) not in allowed:
            raise _unsupported(self._path, name, self.get(name))

    def refuse(self, name: str) -> None:
        """Raise ModelUnavailable if the option is switched on."""
        if self.get(name):
            raise _unsupported(self._path, name, self.get(name))

    def positive(self, name: str, default: int | None = None) -> int:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            raise malformed(self._path, f"does not give a positive {name}")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise malformed(self._path, f"does not give a positive {name}")
        return float(value)

    def table(self, name: str) -> Mapping[str, object]:
        value = self.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise malformed(self._path, f"has a {name} that is not an object")
        return cast("dict[str, object]", value)


def _unsupported(path: Path, name: str, value: object) -> ModelUnavailable:
    msg = f"{path} asks for {name} {str(value)[:40]!r}, which the built-in executor does not have"
    return ModelUnavailable(msg, hint=f"it runs models of the types {', '.join(FAMILY)}")
