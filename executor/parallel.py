"""Matrix products shared by threads, bit for bit the same for any number of them.

A matrix is cut into tiles of columns, fixed when it is loaded; the threads take tile after tile. BLAS itself must run
single-threaded: its own threads wait for each other by spinning, which makes them ten times slower than one thread as
soon as another process wants a core.
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

_GRAIN = 16
"""A tile's width is a multiple of this: whole vector registers and cache lines."""

Array: TypeAlias = npt.NDArray[np.float32]


class Matrix:
    """A stored weight (outputs, inputs), ready for products with rows of inputs."""

    def __init__(self, weight: Array) -> None:
        """Lay `weight` out so that a vector passes over it fastest, which may copy it.

        BLAS reads a matrix in the order of its memory: it accumulates into all outputs, input by input, or computes a
        product per output. Each does best along the longer side.
        """
        outputs, inputs = weight.shape
        if inputs > outputs:
            values = weight.T
            count = round(weight.nbytes / TILE_BYTES)
        else:
            values = np.ascontiguousarray(weight.T)
            count = outputs // TILE_OUTPUTS
        self.values = values
        """Shape (inputs, outputs)."""
        width = -(-outputs // (max(1, count) * _GRAIN)) * _GRAIN
        self.tiles = [slice(start, min(start + width, outputs)) for start in range(0, outputs, width)]
        """Ranges of columns that cover the outputs."""


class Team:
    """The calling thread and its helpers, which sleep between products. One product at a time."""

    def __init__(self, threads: int) -> None:
        """`threads` in all, at least 1; leaving the context ends the helpers."""
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
            for tile in matrix.tiles:
                np.matmul(rows, matrix.values[:, tile], out=out[..., tile])
            return
        product = _Product(rows, matrix, out)
        for orders in self._orders:
            # A helper that has not even seen the last product is not waited for.
            if orders.empty():
                orders.put(product)
        product.work()
        product.wait()


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
        tiles = self._matrix.tiles
        for place in self._taken:
            if place >= len(tiles):
                return
            tile = tiles[place]
            try:
                np.matmul(self._rows, self._matrix.values[:, tile], out=self._out[..., tile])
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
