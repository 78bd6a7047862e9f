"""Against transformers itself, where it is installed: the vectors are what it says now."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from aci_p2p.executor.parallel import Team
from aci_p2p.executor.reference import PREFILL_CHUNK, LlamaModel
from aci_p2p.executor.store import ModelStore
from aci_p2p.protocol.catalogue import DEFAULT_MODEL
from tests.executor.tiny import VARIANTS, write_tiny_model

pytestmark = pytest.mark.torch

VECTORS = Path(__file__).with_name("vectors")
COMPARED = 6
"""Conversations answered once more by transformers, which takes some seconds for each."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(tmp_path: Path, variant: str, seed: int) -> None:
    from tests.executor.make_tiny_vectors import TOKENS, logits_of  # noqa: PLC0415 - torch is an extra

    expected = logits_of(write_tiny_model(tmp_path, seed=seed, changes=VARIANTS[variant]), TOKENS)
    model = LlamaModel.load(tmp_path, Team(1))
    cache = model.new_cache()
    for start in range(0, len(TOKENS), PREFILL_CHUNK):
        chunk = TOKENS[start : start + PREFILL_CHUNK]
        logits = model.prefill(chunk, cache, lambda: False, outputs=len(chunk))
        assert logits is not None
        assert np.abs(logits - expected[start : start + len(chunk)]).max() < 1e-4


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_greedy_answers(aci_home: Path) -> None:
    from tests.executor.make_greedy_vectors import greedy_answers  # noqa: PLC0415 - torch is an extra

    def tokens(cases: list[dict[str, object]]) -> list[object]:
        return [(case["messages"], case["prompt"], case["answer"]) for case in cases]

    committed = json.loads((VECTORS / "greedy_smollm2.json").read_text())["cases"]
    found = greedy_answers(ModelStore(aci_home / "models").open(DEFAULT_MODEL).directory, COMPARED)
    assert tokens(found) == tokens(committed[:COMPARED])
