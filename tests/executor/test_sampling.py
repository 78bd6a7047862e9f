"""Choosing tokens: greedy ties, and the seeded draw against Philox written out from its paper."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.executor.api import Sampling
from aci_p2p.executor.sampling import SEED_BYTES, check_sampling, choose, gumbel_noise
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.messages import MAX_TEMPERATURE_MILLI

MASK = (1 << 64) - 1
SEED = bytes(range(32))


def philox4x64(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x64-10 (Salmon et al. 2011, table 2 and figure 3)."""
    for turn in range(10):
        if turn:
            key = (key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK
        low, high = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = high >> 64 ^ counter[1] ^ key[0], high & MASK, low >> 64 ^ counter[3] ^ key[1], low & MASK
    return counter


def noise(seed: bytes, index: int, size: int) -> list[float]:
    """The draws as the module's documentation says."""
    first, second, third, fourth = (int.from_bytes(seed[at : at + 8], "little") for at in range(0, 32, 8))
    words = [
        word
        for block in range(-(-size // 4))
        for word in philox4x64((first, second), (block + 1, index, third, fourth))
    ]
    return [-math.log(-math.log((word >> 12) * 2.0**-52 + 2.0**-53)) for word in words[:size]]


def test_philox_known_answer() -> None:
    """From the Random123 distribution, kat_vectors: philox4x64 10, all ones."""
    ones = philox4x64((MASK, MASK), (MASK, MASK, MASK, MASK))
    assert ones == (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0)


@given(st.binary(min_size=32, max_size=32), st.integers(0, 1 << 40), st.integers(1, 30))
def test_noise_is_as_documented(seed: bytes, index: int, size: int) -> None:
    assert gumbel_noise(seed, index, size).tolist() == pytest.approx(noise(seed, index, size), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("word", [0, MASK])
def test_the_most_extreme_draws_are_finite(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    class Extreme:
        def __init__(self, **_: object) -> None:
            pass

        def random_raw(self, size: int) -> npt.NDArray[np.uint64]:
            return np.full(size, word, np.uint64)

    monkeypatch.setattr(np.random, "Philox", Extreme)
    assert np.isfinite(gumbel_noise(SEED, 0, 3)).all()


def test_greedy_takes_the_lowest_id_on_a_tie() -> None:
    assert choose(np.array([1, 3, 3, 2], np.float32), Sampling(), 0) == 1


def test_greedy_needs_no_seed_and_ignores_the_index() -> None:
    logits = np.array([0, 5, 1], np.float32)
    assert {choose(logits, Sampling(seed=b""), index) for index in range(20)} == {1}


def test_the_draw_is_the_largest_of_scaled_logits_and_noise() -> None:
    logits = np.linspace(-3, 3, 50).astype(np.float32)
    for index in range(40):
        scores = [float(logit) * 1000 / 700 + draw for logit, draw in zip(logits, noise(SEED, index, 50), strict=True)]
        assert choose(logits, Sampling(700, SEED), index) == scores.index(max(scores))


def test_draws_follow_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    count = 20_000
    drawn = np.bincount([choose(logits, Sampling(1000, SEED), index) for index in range(count)], minlength=4)
    expected = count * np.array([0.5, 0.3, 0.15, 0.05])
    chi_square = float(((drawn - expected) ** 2 / expected).sum())
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


def test_temperature_flattens() -> None:
    logits = np.array([2, 0], np.float32)
    cold, hot = (sum(choose(logits, Sampling(milli, SEED), index) for index in range(500)) for milli in (300, 5000))
    assert cold < 10
    assert 150 < hot < 250


@pytest.mark.parametrize("byte", [0, 9, 17, 31])
def test_every_part_of_the_seed_counts(byte: int) -> None:
    other = bytearray(SEED)
    other[byte] ^= 1
    assert not np.array_equal(gumbel_noise(SEED, 3, 8), gumbel_noise(bytes(other), 3, 8))


def test_positions_draw_apart() -> None:
    """Also from the blocks of their neighbours."""
    draws = [value for index in range(50) for value in gumbel_noise(SEED, index, 40).tolist()]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1, SEED), Sampling(MAX_TEMPERATURE_MILLI, SEED)])
def test_usable(sampling: Sampling) -> None:
    check_sampling(sampling)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(-1, SEED),
        Sampling(MAX_TEMPERATURE_MILLI + 1, SEED),
        Sampling(500),
        Sampling(500, SEED[1:]),
        Sampling(500, SEED + b"\0"),
    ],
)
def test_unusable(sampling: Sampling) -> None:
    with pytest.raises(LocalError, match="temperature" if len(sampling.seed) == SEED_BYTES else "seed of 32 bytes"):
        check_sampling(sampling)
