"""Loading the modules of a command."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def loading() -> Generator[None]:
    """Look for no garbage while modules load within the block, nor ever again among what they made.

    None of it is garbage: looking for some is a seventh of the time in which a node starts, and then most of the work
    of every full collection.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
