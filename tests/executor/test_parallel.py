"""Products shared by threads: right, the same for any number of threads, and safe against errors."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from aci_p2p.executor import parallel
from aci_p2p.executor.parallel import Array, Matrix, Team

SHAPES = [(40, 24), (24, 40), (1, 8), (16, 8), (17, 8), (1000, 3)]
"""Outputs and inputs."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 columns, the least."""
    monkeypatch.setattr(parallel, "TILE_OUTPUTS", 16)
    monkeypatch.setattr(parallel, "TILE_BYTES", 64)


def random(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def shared(weight: Array) -> Matrix:
    return Matrix(weight, shared=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("tokens", [1, 5])
def test_product(shape: tuple[int, int], sequences: int, tokens: int) -> None:
    weight, rows = random(*shape), random(sequences, tokens, shape[1])
    expected = rows.astype(np.float64) @ weight.astype(np.float64).T
    results: list[bytes] = []
    for threads, matrix in (
        (1, Matrix(weight, shared=False)),
        (1, shared(weight)),
        (2, shared(weight)),
        (5, shared(weight)),
    ):
        out = np.full((sequences, tokens, shape[0]), np.nan, np.float32)
        with Team(threads) as team:
            team.multiply(rows, matrix, out)
        assert np.abs(out - expected).max() < 1e-4
        results.append(out.tobytes())
    assert len(set(results)) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_cover_every_column_once(shape: tuple[int, int]) -> None:
    matrix = shared(random(*shape))
    assert [column for part in matrix.ranges for column in range(part.start, part.stop)] == list(range(shape[0]))
    is_padded = shape[0] >= shape[1]
    for tile, part in zip(matrix.tiles, matrix.ranges, strict=True):
        width = part.stop - part.start
        assert tile.shape == (shape[1], -(-width // 16) * 16 if is_padded else width)
        assert np.array_equal(tile[:, :width], random(*shape)[part].T)
        assert not tile[:, width:].any()


def test_tiles_are_about_as_large_as_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "TILE_OUTPUTS", 100)
    assert [tile.shape[1] for tile in shared(random(1000, 24)).tiles] == [112] * 9
    assert [tile.shape[1] for tile in shared(random(199, 24)).tiles] == [208]
    assert [tile.shape[1] for tile in shared(random(200, 24)).tiles] == [112, 96]
    monkeypatch.setattr(parallel, "TILE_BYTES", 300 * 4 * 64)
    assert [tile.shape[1] for tile in shared(random(200, 300)).tiles] == [80, 80, 40]


def test_tiles_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(Matrix(random(*shape), shared=False).tiles) for shape in SHAPES] == [1] * len(SHAPES)
    monkeypatch.setattr(parallel, "LONE_TILE_BYTES", 100 * 4 * 8)
    assert [tile.shape[1] for tile in Matrix(random(200, 8), shared=False).tiles] == [112, 96]
    assert [tile.shape[1] for tile in Matrix(random(20, 320), shared=False).tiles] == [16, 4]
    monkeypatch.setattr(parallel, "TILE_OUTPUTS", 201)
    assert [tile.shape[1] for tile in Matrix(random(200, 8), shared=False).tiles] == [208]


def test_layout_follows_the_shape() -> None:
    assert all(tile.flags.c_contiguous for tile in shared(random(40, 24)).tiles)
    assert all(tile.flags.f_contiguous for tile in shared(random(24, 40)).tiles)


@pytest.mark.parametrize("shape", SHAPES)
def test_stored_rows(shape: tuple[int, int]) -> None:
    wanted = np.random.default_rng(0).integers(shape[0], size=(2, 7))
    assert np.array_equal(shared(random(*shape)).rows(wanted), random(*shape)[wanted])


def test_many_products_in_a_row() -> None:
    """Helpers that come late find another product, or none."""
    weights = [random(size, 8) for size in (16, 300, 32, 100)]
    matrices = [shared(weight) for weight in weights]
    with Team(4) as team:
        for turn in range(400):
            matrix, weight = matrices[turn % 4], weights[turn % 4]
            rows = np.full((2, 1, 8), turn, np.float32)
            out = np.empty((2, 1, len(weight)), np.float32)
            team.multiply(rows, matrix, out)
            assert np.array_equal(out[0, 0], out[1, 0])
            assert np.allclose(out[0, 0], turn * weight.sum(1), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_comes_out_and_the_team_works_on(threads: int) -> None:
    matrix = shared(random(200, 8))
    with Team(threads) as team:
        with pytest.raises(ValueError, match="not aligned"):
            team.multiply(random(1, 1, 9), matrix, np.empty((1, 1, 200), np.float32))
        out = np.empty((1, 1, 200), np.float32)
        team.multiply(random(1, 1, 8), matrix, out)
        assert np.allclose(out, random(1, 1, 8) @ random(200, 8).T, atol=1e-5)


def test_helpers_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles at once: each waits for the other to have begun."""
    barrier = threading.Barrier(2, timeout=30)
    multiply = parallel._multiply

    def met(rows: Array, tile: Array, out: Array) -> None:
        barrier.wait()
        multiply(rows, tile, out)

    matrix = shared(random(32, 8))
    assert len(matrix.tiles) == 2
    monkeypatch.setattr(parallel, "_multiply", met)
    with Team(2) as team:
        team.multiply(random(1, 1, 8), matrix, np.empty((1, 1, 32), np.float32))


def test_slow_helpers_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two tiles the helper takes one, as the calling thread takes none before that."""
    taken = threading.Event()
    multiply = parallel._multiply

    def slow(rows: Array, tile: Array, out: Array) -> None:
        if threading.current_thread() is threading.main_thread():
            assert taken.wait(30)
        else:
            taken.set()
            time.sleep(0.05)
        multiply(rows, tile, out)

    matrix, rows = shared(random(32, 8)), random(1, 1, 8)
    out = np.full((1, 1, 32), np.nan, np.float32)
    monkeypatch.setattr(parallel, "_multiply", slow)
    with Team(2) as team:
        team.multiply(rows, matrix, out)
        assert np.allclose(out, rows @ random(32, 8).T, atol=1e-5)


def test_leaving_ends_the_helpers() -> None:
    before = threading.active_count()
    with Team(4):
        assert threading.active_count() == before + 3
    assert threading.active_count() == before
