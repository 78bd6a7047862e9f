"""Matrix products shared by threads.

A matrix is cut into tiles, each some of its outputs; the threads take tile after tile. Every output is one sum over the
inputs, so the tiles change none of its bits. BLAS itself must run single-threaded: its own threads wait for each other
by spinning, which makes them ten times slower than one thread as soon as another process wants a core.
"""

from __future__ import annotations

import itertools
import queue
import threading
from typing import Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt

TILE_OUTPUTS: Final = 1024
"""Columns that a tile has at least where a vector is multiplied by accumulating into them: with fewer, OpenBLAS falls
below the memory's bandwidth (26 GB/s with 4,096 columns, 24 with 1,024, 14 with 480)."""
TILE_BYTES: Final = 1 << 20
"""Bytes of a tile, about, where each column is a product of its own: 50 us, enough to be worth waking a thread."""
LONE_TILE_BYTES: Final = 8 << 20
"""Bytes of a tile, about, for one thread, which only needs them so that what the first sequence of a batch has read is
still in the last-level cache for the others."""

_GRAIN = 16
"""A tile's width is a multiple of this: whole vector registers and cache lines. OpenBLAS sums what is left over in
another order, so that the same output would have other bits in another tile; the last tile is padded for this."""

Array: TypeAlias = npt.NDArray[np.float32]


class Matrix:
    """A stored weight (outputs, inputs), ready for products with rows of inputs."""

    def __init__(self, weight: Array, *, shared: bool) -> None:
        """Lay `weight` out so that a vector passes over it fastest, which may copy it.

        `shared` makes tiles for several threads, else there are few. BLAS reads a matrix in the order of its memory:
        it accumulates into all outputs, input by input, or computes a product per output. Each does best along the
        longer side.
        """
        outputs, inputs = weight.shape
        by_output = inputs > outputs
        count = round(weight.nbytes / (TILE_BYTES if shared else LONE_TILE_BYTES))
        if not by_output:
            most = outputs // TILE_OUTPUTS
            count = most if shared else min(count, most)
        count = max(1, count)
        self._width = width = -(-outputs // (count * _GRAIN)) * _GRAIN
        self.ranges = [slice(start, min(start + width, outputs)) for start in range(0, outputs, width)]
        """The outputs of each tile."""
        self.tiles: list[Array] = []
        """Shape (inputs, outputs of the tile), each in one piece of memory; the last may end with columns of zeros."""
        if by_output:
            self.tiles = [weight[part].T for part in self.ranges]
        else:
            # One allocation: numpy asks for huge pages from 4 MiB on.
            memory = np.zeros(inputs * -(-outputs // _GRAIN) * _GRAIN, np.float32)
            for part in self.ranges:
                stop = -(-part.stop // _GRAIN) * _GRAIN
                tile = memory[inputs * part.start : inputs * stop].reshape(inputs, -1)
                tile[:, : part.stop - part.start] = weight[part].T
                self.tiles.append(tile)

    def rows(self, outputs: npt.NDArray[np.intp]) -> Array:
        """The stored rows of some outputs, shape (*outputs.shape, inputs): what an embedding is looked up with."""
        found = np.empty((outputs.size, len(self.tiles[0])), np.float32)
        for place, output in enumerate(outputs.flat):
            tile, column = divmod(int(output), self._width)
            found[place] = self.tiles[tile][:, column]
        return found.reshape(*outputs.shape, -1)


class Team:
    """The calling thread and its helpers, which sleep between products. One product at a time."""

    def __init__(self, threads: int) -> None:
        """`threads` in all, at least 1; leaving the context ends the helpers."""
        self.threads = threads
        """The calling one included."""
        self._orders: list[_Orders] = [queue.SimpleQueue() for _ in range(threads - 1)]
        self._helpers = [threading.Thread(target=_help, args=(orders,), daemon=True) for orders in self._orders]
        for helper in self._helpers:
            helper.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for orders in self._orders:
            orders.put(None)
        for helper in self._helpers:
            helper.join()

    def multiply(self, rows: Array, matrix: Matrix, out: Array) -> None:
        """`out[...] = rows @ matrix`, for rows in shape (sequences, tokens, inputs).

        Each sequence is a product of its own, so its result does not depend on the others.
        """
        if not self._helpers or len(matrix.tiles) == 1:
            for tile, part in zip(matrix.tiles, matrix.ranges, strict=True):
                _multiply(rows, tile, out[..., part])
            return
        product = _Product(rows, matrix, out)
        for orders in self._orders:
            # A helper that has not even seen the last product is not waited for.
            if orders.empty():
                orders.put(product)
        product.work()
        product.wait()


def _multiply(rows: Array, tile: Array, out: Array) -> None:
    """`out[...] = rows @ tile`. Other threads run meanwhile: np.matmul allows that for over 500 results only."""
    width = out.shape[-1]
    if width < tile.shape[1]:
        padded = np.empty((*out.shape[:-1], tile.shape[1]), np.float32)
        _multiply(rows, tile, padded)
        out[...] = padded[..., :width]
    elif rows.shape[1] == 1:
        for row, result in zip(rows[:, 0], out[:, 0], strict=True):
            np.dot(row, tile, out=result)
    else:
        np.matmul(rows, tile, out=out)


def _help(orders: _Orders) -> None:
    while (product := orders.get()) is not None:
        product.work()


class _Product:
    """A product being computed. The counters are atomic, as each step of one is a single call into C."""

    def __init__(self, rows: Array, matrix: Matrix, out: Array) -> None:
        self._rows = rows
        self._matrix = matrix
        self._out = out
        self._taken = itertools.count()
        self._done = itertools.count(1)
        self._all_done = threading.Lock()
        self._all_done.acquire()
        self._error: BaseException | None = None

    def work(self) -> None:
        """Compute tiles until all are taken."""
        tiles, ranges = self._matrix.tiles, self._matrix.ranges
        for place in self._taken:
            if place >= len(tiles):
                return
            try:
                _multiply(self._rows, tiles[place], self._out[..., ranges[place]])
            except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
                self._error = error
            if next(self._done) == len(tiles):
                self._all_done.release()

    def wait(self) -> None:
        """Until the tiles that others took are done. Raises what went wrong there."""
        self._all_done.acquire()
        if self._error is not None:
            raise self._error


_Orders: TypeAlias = "queue.SimpleQueue[_Product | None]"
