"""Loading the modules of a command."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def loading() -> Generator[None]:
    """Look for no garbage while modules load within the block, nor ever again among what there is at its end.

    In a process that has done nothing else yet, none of it is garbage: looking for some is a seventh of the time in
    which a node starts, and then most of the work of every full collection.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
