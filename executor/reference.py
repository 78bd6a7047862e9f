"""The reference forward pass: Llama-family models in numpy fp32, profile `fp32-ref`.

Everything is computed in fp32 from the stored weights, row by row: a sequence's results do not depend on which other
sequences share a step. Touvron et al. 2023 (Llama), section 2.2: RMSNorm (Zhang and Sennrich 2019), rotary positions
(Su et al. 2021), grouped queries (Ainslie et al. 2023), SwiGLU (Shazeer 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from aci_p2p.executor.api import ModelUnavailable
from aci_p2p.executor.architecture import Architecture, rotary_frequencies
from aci_p2p.executor.parallel import Array, Matrix, Team
from aci_p2p.executor.safetensors import read_model_tensors
from aci_p2p.executor.store import CONFIG_FILE

PREFILL_CHUNK: Final = 64
"""Most tokens of a prompt in one step. Longer steps are not faster on CPUs; shorter ones make the sequences that are
being decoded wait less."""
CACHE_BLOCK: Final = 256
"""Tokens by which a sequence's key and value cache grows: 11 MiB in SmolLM2-135M."""

_ROTATION_BLOCK = 1024
"""Positions by which the table of rotations grows."""

Rotations: TypeAlias = npt.NDArray[np.complex64]
Stop: TypeAlias = Callable[[], bool]
"""Asked before every layer; True ends the computation for its sequence."""


class KeyValueCache:
    """Keys and values of one sequence so far, per layer in shape (kv_heads, capacity, head_size)."""

    def __init__(self, architecture: Architecture) -> None:
        """An empty cache: memory is taken as the sequence grows."""
        shape = (architecture.kv_heads, 0, architecture.head_size)
        self._limit = architecture.context
        self.length = 0
        self.layers = [(np.empty(shape, np.float32), np.empty(shape, np.float32)) for _ in range(architecture.layers)]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens more. Raises MemoryError, and ValueError beyond the model's context."""
        needed = self.length + tokens
        if needed > self._limit:
            msg = f"{needed} tokens are more than the context of {self._limit}"
            raise ValueError(msg)
        if needed <= self.layers[-1][0].shape[1]:
            return
        capacity = min(-(-needed // CACHE_BLOCK) * CACHE_BLOCK, self._limit)
        for index, (keys, values) in enumerate(self.layers):
            self.layers[index] = self._grown(keys, capacity), self._grown(values, capacity)

    def _grown(self, old: Array, capacity: int) -> Array:
        heads, _, width = old.shape
        new = np.empty((heads, capacity, width), np.float32)
        new[:, : self.length] = old[:, : self.length]
        return new


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one block."""

    attention_norm: Array
    """Shape (hidden,)."""
    query_key_value: Matrix
    """Outputs: all query heads, then all key heads, then all value heads; rotated pairs are neighbours."""
    query_key_value_bias: Array | None
    """As the outputs."""
    attention_output: Matrix
    """Inputs: the query heads."""
    attention_output_bias: Array | None
    """Shape (hidden,)."""
    feed_forward_norm: Array
    """Shape (hidden,)."""
    gate_up: Matrix
    """Outputs: the gate, then what it lets through."""
    down: Matrix
    """Inputs: the gated values."""


class LlamaModel:
    """A loaded model. One thread at a time may use it, as the working memory is shared between calls."""

    def __init__(self, path: Path, architecture: Architecture, tensors: dict[str, Array], team: Team) -> None:
        """Take the weights out of `tensors`, which is empty of them afterwards; `path` is where they were read.

        `team` computes the matrix products. Raises ModelUnavailable when a weight is missing or has another shape.
        """
        self.architecture = architecture
        shared = team.threads > 1
        weights = _Weights(path, architecture, tensors)
        self._layers = [weights.layer(index, shared=shared) for index in range(architecture.layers)]
        self._norm = weights.take("model.norm.weight", architecture.hidden)
        shape = (architecture.vocabulary, architecture.hidden)
        # Laid out for the output projection, which reads all of it; looking a token up gathers one column.
        self._embedding = Matrix(weights.take("model.embed_tokens.weight", *shape), shared=shared)
        self._head = (
            self._embedding if architecture.tied else Matrix(weights.take("lm_head.weight", *shape), shared=shared)
        )
        self._team = team
        self._frequencies = rotary_frequencies(path, architecture)
        self._rotations = np.empty((0, architecture.head_size // 2), np.complex64)
        self._scratch: dict[str, Array] = {}
        triangle = np.full((PREFILL_CHUNK, PREFILL_CHUNK), -np.inf, np.float32)
        self._mask = np.triu(triangle, 1)

    @classmethod
    def load(cls, directory: Path, team: Team) -> Self:
        """Read a Hugging Face directory; `team` computes the matrix products. Raises ModelUnavailable, MemoryError."""
        architecture = Architecture.read(directory)
        return cls(directory / CONFIG_FILE, architecture, read_model_tensors(directory), team)

    def new_cache(self) -> KeyValueCache:
        """The cache of a new sequence."""
        return KeyValueCache(self.architecture)

    def prefill(self, tokens: Sequence[int], cache: KeyValueCache, stop: Stop, *, outputs: int = 1) -> Array | None:
        """Append at most PREFILL_CHUNK tokens to a sequence.

        Returns the logits after each of the last `outputs` tokens, shape (outputs, vocabulary), or None when `stop`
        ended it, which leaves the cache as it was. Raises MemoryError, and ValueError beyond the context.
        """
        return self._forward(np.array([tokens], np.intp), [cache], [stop], outputs)[0]

    def decode(
        self, tokens: Sequence[int], caches: Sequence[KeyValueCache], stops: Sequence[Stop]
    ) -> list[Array | None]:
        """Append one token to each of several sequences.

        Returns for each the logits after its token, shape (vocabulary,), or None when its `stop` ended it, which
        leaves its cache as it was; the others go on. Raises as `prefill`.
        """
        results = self._forward(np.array(tokens, np.intp)[:, None], caches, stops, 1)
        return [None if logits is None else logits[0] for logits in results]

    def _forward(
        self, tokens: npt.NDArray[np.intp], caches: Sequence[KeyValueCache], stops: Sequence[Stop], outputs: int
    ) -> list[Array | None]:
        """Logits (outputs, vocabulary) by sequence, of tokens in shape (sequences, tokens of each)."""
        count, length = tokens.shape
        for cache in caches:
            cache.reserve(length)
        rows = list(range(count))
        with np.errstate(over="ignore", under="ignore"):
            states = self._embedding.rows(tokens)
            rotations = self._rotations_of(caches, length)
            for index in range(self.architecture.layers):
                going = [place for place, row in enumerate(rows) if not stops[row]()]
                if len(going) < len(rows):
                    rows = [rows[place] for place in going]
                    states, rotations = states[going], rotations[going]
                if not rows:
                    break
                self._attention(index, states, [caches[row] for row in rows], rotations)
                self._feed_forward(index, states)
            results: list[Array | None] = [None] * count
            logits = self._logits(states, outputs) if rows else None
        for place, row in enumerate(rows):
            caches[row].length += length
            results[row] = None if logits is None else logits[place]
        return results

    def _attention(self, index: int, states: Array, caches: Sequence[KeyValueCache], rotations: Rotations) -> None:
        """Add a layer's attention to `states`, shape (sequences, tokens of each, hidden)."""
        layer, sizes = self._layers[index], self.architecture
        count, length, _ = states.shape
        heads, kv_heads, width = sizes.heads, sizes.kv_heads, sizes.head_size
        projected = self._work("projected", count, length, (heads + 2 * kv_heads) * width)
        self._team.multiply(self._normalised(states, layer.attention_norm), layer.query_key_value, projected)
        if layer.query_key_value_bias is not None:
            projected += layer.query_key_value_bias
        by_head = projected.reshape(count, length, heads + 2 * kv_heads, width)
        pairs = by_head[:, :, : heads + kv_heads].view(np.complex64)
        np.multiply(pairs, rotations, out=pairs)
        queries = by_head[:, :, :heads]
        queries *= np.float32(width**-0.5)
        attended = self._work("attended", count, length, heads * width)
        for place, cache in enumerate(caches):
            start, end = cache.length, cache.length + length
            keys, values = cache.layers[index]
            keys[:, start:end] = by_head[place, :, heads : heads + kv_heads].transpose(1, 0, 2)
            values[:, start:end] = by_head[place, :, heads + kv_heads :].transpose(1, 0, 2)
            self._attend(queries[place], keys[:, :end], values[:, :end], attended[place])
        output = self._work("output", *states.shape)
        self._team.multiply(attended, layer.attention_output, output)
        if layer.attention_output_bias is not None:
            output += layer.attention_output_bias
        states += output

    def _attend(self, queries: Array, keys: Array, values: Array, out: Array) -> None:
        """Causal attention of one sequence.

        `queries` has the shape (tokens, heads, head_size), `keys` and `values` (kv_heads, tokens so far, head_size),
        `out` (tokens, heads * head_size). All tokens of one key head are one matrix product.
        """
        length, heads, width = queries.shape
        kv_heads, end, _ = keys.shape
        group = heads // kv_heads
        grouped = queries.reshape(length, kv_heads, group, width).transpose(1, 2, 0, 3)
        scores = self._work("scores", kv_heads, group * length, end)
        np.matmul(grouped.reshape(kv_heads, group * length, width), keys.transpose(0, 2, 1), out=scores)
        if length > 1:
            newest = scores.reshape(kv_heads, group, length, end)[..., end - length :]
            newest += self._mask[:length, :length]
        scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        mixed = self._work("mixed", kv_heads, group * length, width)
        np.matmul(scores, values, out=mixed)
        mixed /= np.add.reduce(scores, axis=-1, keepdims=True)
        out.reshape(length, kv_heads, group, width)[:] = mixed.reshape(kv_heads, group, length, width).transpose(
            2, 0, 1, 3
        )

    def _feed_forward(self, index: int, states: Array) -> None:
        """Add a layer's feed-forward network to `states`."""
        layer, width = self._layers[index], self.architecture.intermediate
        count, length, _ = states.shape
        projected = self._work("projected", count, length, 2 * width)
        self._team.multiply(self._normalised(states, layer.feed_forward_norm), layer.gate_up, projected)
        gate, up = projected[..., :width], projected[..., width:]
        gated = self._work("gated", count, length, width)
        # SiLU: gate / (1 + exp(-gate)); an overflow to infinity gives the right limit.
        np.negative(gate, out=gated)
        np.exp(gated, out=gated)
        gated += np.float32(1)
        np.divide(gate, gated, out=gated)
        gated *= up
        output = self._work("output", *states.shape)
        self._team.multiply(gated, layer.down, output)
        states += output

    def _logits(self, states: Array, outputs: int) -> Array:
        """Shape (sequences, outputs, vocabulary), new memory; those after the last `outputs` tokens of each."""
        logits = np.empty((len(states), outputs, self.architecture.vocabulary), np.float32)
        if outputs:
            self._team.multiply(self._normalised(states[:, -outputs:], self._norm), self._head, logits)
        return logits

    def _normalised(self, states: Array, weight: Array) -> Array:
        """RMSNorm into working memory."""
        out = self._work("normalised", *states.shape)
        scale = np.vecdot(states, states)[..., None]
        scale /= np.float32(self.architecture.hidden)
        scale += np.float32(self.architecture.epsilon)
        np.sqrt(scale, out=scale)
        np.divide(states, scale, out=out)
        out *= weight
        return out

    def _rotations_of(self, caches: Sequence[KeyValueCache], length: int) -> Rotations:
        """Factors of the next `length` tokens, shape (sequences, length, 1, head_size / 2)."""
        needed = max(cache.length for cache in caches) + length
        if needed > len(self._rotations):
            positions = np.arange(-(-needed // _ROTATION_BLOCK) * _ROTATION_BLOCK, dtype=np.float32)
            angles = positions[:, None] * self._frequencies
            self._rotations = np.exp(1j * angles.astype(np.float64)).astype(np.complex64)
        rows = [self._rotations[cache.length : cache.length + length] for cache in caches]
        return np.stack(rows)[:, :, None]

    def _work(self, name: str, *shape: int) -> Array:
        """Working memory of a shape; its content lasts until the name is asked for again."""
        size = math.prod(shape)
        buffer = self._scratch.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._scratch[name] = np.empty(1 << (size - 1).bit_length(), np.float32)
        return buffer[:size].reshape(shape)


class _Weights:
    """Takes tensors by their names in transformers and joins them."""

    def __init__(self, path: Path, architecture: Architecture, tensors: dict[str, Array]) -> None:
        self._path = path
        self._sizes = architecture
        self._tensors = tensors

    def take(self, name: str, *shape: int) -> Array:
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            msg = f"the weights beside {self._path} lack the tensor {name}"
            raise ModelUnavailable(msg, hint="fetch or copy the model again")
        if tensor.shape != shape:
            msg = f"the tensor {name} beside {self._path} has the shape {tensor.shape}, not {shape}"
            raise ModelUnavailable(msg, hint="fetch or copy the model again")
        return tensor

    def layer(self, index: int, *, shared: bool) -> _Layer:
        sizes, prefix = self._sizes, f"model.layers.{index}."
        queries = sizes.heads * sizes.head_size
        mlp = (prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight")
        has_bias = prefix + "self_attn.q_proj.bias" in self._tensors
        output_bias = prefix + "self_attn.o_proj.bias"
        return _Layer(
            attention_norm=self.take(prefix + "input_layernorm.weight", sizes.hidden),
            query_key_value=Matrix(self._query_key_value(prefix + "self_attn.", "weight", sizes.hidden), shared=shared),
            query_key_value_bias=self._query_key_value(prefix + "self_attn.", "bias") if has_bias else None,
            attention_output=Matrix(
                self.take(prefix + "self_attn.o_proj.weight", sizes.hidden, queries), shared=shared
            ),
            attention_output_bias=self.take(output_bias, sizes.hidden) if output_bias in self._tensors else None,
            feed_forward_norm=self.take(prefix + "post_attention_layernorm.weight", sizes.hidden),
            gate_up=Matrix(
                np.concatenate([self.take(n, sizes.intermediate, sizes.hidden) for n in mlp]), shared=shared
            ),
            down=Matrix(self.take(prefix + "mlp.down_proj.weight", sizes.hidden, sizes.intermediate), shared=shared),
        )

    def _query_key_value(self, prefix: str, kind: str, *inputs: int) -> Array:
        """Joined weights or biases; the dimensions of queries and keys are reordered so that those rotated together
        are neighbours, which changes no product of a query and a key."""
        sizes = self._sizes
        parts: list[Array] = []
        for name, heads in (("q", sizes.heads), ("k", sizes.kv_heads)):
            tensor = self.take(f"{prefix}{name}_proj.{kind}", heads * sizes.head_size, *inputs)
            halves = tensor.reshape(heads, 2, sizes.head_size // 2, *inputs)
            parts.append(halves.swapaxes(1, 2).reshape(tensor.shape))
        parts.append(self.take(f"{prefix}v_proj.{kind}", sizes.kv_heads * sizes.head_size, *inputs))
        return np.concatenate(parts)
