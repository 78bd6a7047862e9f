"""The reference forward pass: equal to transformers, and independent of chunks, batches, threads and cancellations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aci_p2p.executor.api import ModelUnavailable
from aci_p2p.executor.architecture import Architecture
from aci_p2p.executor.parallel import Array, Team
from aci_p2p.executor.reference import CACHE_BLOCK, PREFILL_CHUNK, KeyValueCache, LlamaModel
from aci_p2p.executor.safetensors import read_tensors
from tests.executor.tiny import CONTEXT, LAYERS, VARIANTS, write_tiny_model

VECTORS = json.loads((Path(__file__).with_name("vectors") / "tiny_logits.json").read_text())
TOKENS: list[int] = VECTORS["tokens"]
ALONE = Team(1)
ROUNDING = 1e-4
"""Logits; the tiny models' reach 5."""


def never() -> bool:
    """A `stop` that does not."""
    return False


class StopAt:
    """A `stop` that ends the computation when it is asked for the `layer`-th time, from 0."""

    def __init__(self, layer: int) -> None:
        self.asked = -1
        self.layer = layer

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked >= self.layer


def fill(model: LlamaModel, tokens: Sequence[int], chunk: int = PREFILL_CHUNK) -> tuple[KeyValueCache, Array]:
    """A cache with the tokens, and the logits after the last."""
    cache = model.new_cache()
    logits = None
    for start in range(0, len(tokens), chunk):
        logits = model.prefill(tokens[start : start + chunk], cache, never)
    assert logits is not None
    return cache, logits[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    return LlamaModel.load(write_tiny_model(tmp_path_factory.mktemp("tiny")), ALONE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_transformers(tmp_path: Path, variant: str) -> None:
    model = LlamaModel.load(write_tiny_model(tmp_path, changes=VARIANTS[variant]), ALONE)
    _, logits = fill(model, TOKENS)
    assert np.abs(logits - np.array(VECTORS["last_logits"][variant])).max() < ROUNDING


def test_chunks_do_not_matter(model: LlamaModel) -> None:
    _, whole = fill(model, TOKENS)
    for chunk in (1, 7, PREFILL_CHUNK - 1):
        _, logits = fill(model, TOKENS, chunk)
        assert np.abs(logits - whole).max() < ROUNDING


def test_all_rows_of_a_chunk(model: LlamaModel) -> None:
    rows = model.prefill(TOKENS[:9], model.new_cache(), never, outputs=9)
    assert rows is not None
    assert rows.shape == (9, model.architecture.vocabulary)
    for end in range(1, 10):
        assert np.abs(fill(model, TOKENS[:end])[1] - rows[end - 1]).max() < ROUNDING


def test_without_outputs_only_the_cache_grows(model: LlamaModel) -> None:
    cache = model.new_cache()
    logits = model.prefill(TOKENS[:9], cache, never, outputs=0)
    assert logits is not None
    assert logits.shape == (0, model.architecture.vocabulary)
    assert cache.length == 9


def test_a_batch_changes_no_bit(model: LlamaModel) -> None:
    prompts = [TOKENS[:3], TOKENS[2:70], TOKENS[5:18], TOKENS[:64]]
    alone = [[row.copy() for row in greedy(model, prompt, 12)] for prompt in prompts]
    caches = [fill(model, prompt)[0] for prompt in prompts]
    for step in range(12):
        tokens = [int(rows[step].argmax()) for rows in alone]
        results = model.decode(tokens, caches, [never] * 4)
        for rows, result in zip(alone, results, strict=True):
            assert result is not None
            assert np.array_equal(result, rows[step + 1])


def greedy(model: LlamaModel, prompt: Sequence[int], count: int) -> list[Array]:
    """Logits after the prompt and after each of `count` greedy tokens."""
    cache, logits = fill(model, prompt)
    rows = [logits]
    for _ in range(count):
        (result,) = model.decode([int(rows[-1].argmax())], [cache], [never])
        assert result is not None
        rows.append(result)
    return rows


def test_the_cache_grows_by_blocks_without_a_trace(model: LlamaModel) -> None:
    prompt = [token % 250 for token in range(CACHE_BLOCK - 2)]
    cache, _ = fill(model, prompt)
    assert cache.layers[0][0].shape[1] == CACHE_BLOCK
    for token in (5, 6, 7, 8):
        (logits,) = model.decode([token], [cache], [never])
    assert cache.layers[0][0].shape[1] == 2 * CACHE_BLOCK
    assert cache.length == CACHE_BLOCK + 2
    assert logits is not None
    assert np.abs(logits - fill(model, [*prompt, 5, 6, 7, 8])[1]).max() < ROUNDING


def test_the_context_ends(model: LlamaModel) -> None:
    cache, _ = fill(model, [7] * (CONTEXT - 1))
    model.decode([7], [cache], [never])
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens"):
        model.decode([7], [cache], [never])
    assert cache.length == CONTEXT


def test_prefill_asks_before_every_layer(model: LlamaModel) -> None:
    stop = StopAt(LAYERS)
    assert model.prefill(TOKENS[:5], model.new_cache(), stop) is not None
    assert stop.asked == LAYERS - 1


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_stopped_prefill_can_be_repeated(model: LlamaModel, layer: int) -> None:
    cache, _ = fill(model, TOKENS[:20])
    assert model.prefill(TOKENS[20:40], cache, StopAt(layer)) is None
    assert cache.length == 20
    again = model.prefill(TOKENS[20:40], cache, never)
    assert again is not None
    other, _ = fill(model, TOKENS[:20])
    undisturbed = model.prefill(TOKENS[20:40], other, never)
    assert undisturbed is not None
    assert np.array_equal(again, undisturbed)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("stopped", range(3))
def test_a_stopped_sequence_leaves_the_batch(model: LlamaModel, layer: int, stopped: int) -> None:
    prompts = [TOKENS[:3], TOKENS[2:30], TOKENS[5:18]]
    expected = model.decode([9, 8, 7], [fill(model, prompt)[0] for prompt in prompts], [never] * 3)
    caches = [fill(model, prompt)[0] for prompt in prompts]
    stops = [StopAt(layer) if place == stopped else never for place in range(3)]
    results = model.decode([9, 8, 7], caches, stops)
    for place, prompt in enumerate(prompts):
        result, wanted = results[place], expected[place]
        if place == stopped:
            assert result is None
            assert caches[place].length == len(prompt)
        else:
            assert result is not None
            assert wanted is not None
            assert np.array_equal(result, wanted)


def test_all_stopped(model: LlamaModel) -> None:
    caches = [fill(model, TOKENS[:4])[0] for _ in range(2)]
    assert model.decode([1, 1], caches, [StopAt(1), StopAt(0)]) == [None, None]


def test_results_are_not_working_memory(model: LlamaModel) -> None:
    cache, first = fill(model, TOKENS[:9])
    before = first.copy()
    model.decode([3], [cache], [never])
    assert np.array_equal(first, before)


def test_memory_is_taken_as_needed(model: LlamaModel) -> None:
    cache = model.new_cache()
    assert all(keys.nbytes == values.nbytes == 0 for keys, values in cache.layers)
    cache.reserve(1)
    assert {keys.shape[1] for keys, _ in cache.layers} == {CACHE_BLOCK}
    keys, _ = cache.layers[0]
    cache.reserve(CACHE_BLOCK)
    assert cache.layers[0][0] is keys


def test_rotations_reach_as_far_as_the_longest_sequence(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [TOKENS[:3], TOKENS[:30]]
    expected = model.decode([9, 8], [fill(model, prompt)[0] for prompt in prompts], [never] * 2)
    monkeypatch.setattr("aci_p2p.executor.reference._ROTATION_BLOCK", 10)
    caches = [fill(model, prompt)[0] for prompt in prompts]
    monkeypatch.setattr(model, "_rotations", model._rotations[:0])
    for wanted, found in zip(expected, model.decode([9, 8], caches, [never] * 2), strict=True):
        assert wanted is not None
        assert found is not None
        assert np.array_equal(wanted, found)


def test_large_scores_do_not_overflow(tmp_path: Path) -> None:
    tensors: dict[str, Any] = read_tensors(write_tiny_model(tmp_path) / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] *= 1000
    _, logits = fill(LlamaModel(tmp_path, Architecture.read(tmp_path), tensors, ALONE), TOKENS)
    assert np.isfinite(logits).all()


def test_a_missing_tensor(tmp_path: Path) -> None:
    tensors: dict[str, Any] = read_tensors(write_tiny_model(tmp_path) / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelUnavailable, match=r"lack the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        LlamaModel(tmp_path, Architecture.read(tmp_path), tensors, ALONE)


def test_a_tensor_of_another_shape(tmp_path: Path) -> None:
    tensors: dict[str, Any] = read_tensors(write_tiny_model(tmp_path) / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    with pytest.raises(ModelUnavailable, match=r"has the shape \(47,\), not \(48,\)"):
        LlamaModel(tmp_path, Architecture.read(tmp_path), tensors, ALONE)


def test_loading_takes_the_tensors(tmp_path: Path) -> None:
    """Or the peak of memory would be twice the model."""
    tensors: dict[str, Any] = read_tensors(write_tiny_model(tmp_path) / "model.safetensors")
    LlamaModel(tmp_path, Architecture.read(tmp_path), tensors, ALONE)
    assert tensors == {}
