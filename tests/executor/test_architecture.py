"""config.json: what is understood, what is refused, and the rotary frequencies."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from aci_p2p.executor.api import ModelUnavailable
from aci_p2p.executor.architecture import Architecture, rotary_frequencies
from tests.executor.tiny import HEAD_SIZE, write_tiny_model


def read(directory: Path, changes: Mapping[str, object] = {}, *, without: tuple[str, ...] = ()) -> Architecture:
    write_tiny_model(directory, changes=changes)
    path = directory / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name not in without}
    path.write_text(json.dumps(config))
    return Architecture.read(directory)


def frequencies(directory: Path, changes: Mapping[str, object]) -> list[float]:
    return [float(frequency) for frequency in rotary_frequencies(directory, read(directory, changes))]


def test_sizes(tmp_path: Path) -> None:
    assert read(tmp_path) == Architecture(
        hidden=48,
        intermediate=80,
        layers=2,
        heads=6,
        kv_heads=2,
        head_size=8,
        epsilon=1e-5,
        context=512,
        vocabulary=267,
        tied=True,
        theta=10000.0,
        scaling={},
    )


def test_defaults(tmp_path: Path) -> None:
    left_out = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    found = read(tmp_path, without=left_out)
    assert (found.kv_heads, found.head_size, found.epsilon, found.theta, found.tied) == (6, 8, 1e-6, 10000.0, False)


def test_frequencies_follow_the_base(tmp_path: Path) -> None:
    expected = [500.0 ** (-2 * pair / HEAD_SIZE) for pair in range(HEAD_SIZE // 2)]
    assert frequencies(tmp_path, {"rope_theta": 500.0}) == pytest.approx(expected, rel=1e-6)


def test_new_style_rope_parameters(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    expected = [500.0 ** (-2 * pair / HEAD_SIZE) / 2 for pair in range(HEAD_SIZE // 2)]
    assert frequencies(tmp_path, {"rope_theta": None, "rope_parameters": rope}) == pytest.approx(expected, rel=1e-6)


def test_llama3_scales_the_low_frequencies_only(tmp_path: Path) -> None:
    plain = np.array([10000.0 ** (-2 * pair / HEAD_SIZE) for pair in range(HEAD_SIZE // 2)])
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    turns = 128 * plain / (2 * math.pi)
    assert turns[0] > 4 > turns[1] > 1 > turns[2]
    weight = (turns[1] - 1) / 3
    expected = [plain[0], plain[1] * (weight + (1 - weight) / 8), plain[2] / 8, plain[3] / 8]
    assert frequencies(tmp_path, {"rope_scaling": rope}) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "positive factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": True}}, "positive factor"),
        ({"rope_scaling": 2.0}, "not an object"),
        ({"hidden_size": 0}, "positive hidden_size"),
        ({"num_attention_heads": "6"}, "positive num_attention_heads"),
        ({"vocab_size": None}, "positive vocab_size"),
        ({"rms_norm_eps": float("1e400")}, "valid JSON"),
        ({"rms_norm_eps": -1.0}, "positive rms_norm_eps"),
        ({"num_key_value_heads": 4}, "heads that do not fit"),
        ({"head_dim": 7}, "heads that do not fit"),
    ],
)
def test_refused(tmp_path: Path, changes: Mapping[str, object], problem: str) -> None:
    with pytest.raises(ModelUnavailable, match=problem):
        read(tmp_path, changes)


def test_llama3_factors_in_the_wrong_order(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 4.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    with pytest.raises(ModelUnavailable, match="low_freq_factor above"):
        read(tmp_path, {"rope_scaling": rope})
