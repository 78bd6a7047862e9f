"""Running async functions so that they repeat: virtual time, and trio's choices from a seed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from random import Random
from typing import Any, Final, TypeVar, TypeVarTuple

import trio
from trio.testing import MockClock

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# trio keeps the order in which ready tasks run in these two names, for Hypothesis and pytest-trio to fix as we do.
_SCHEDULER: Final[Any] = import_module("trio._core._run")
_SWITCH: Final = "_ALLOW_DETERMINISTIC_SCHEDULING"


@contextmanager
def repeatable_scheduling(seed: int) -> Generator[None]:
    """Within the block trio runs ready tasks in an order that `seed` fixes, and not the chance of the machine."""
    random: Random = _SCHEDULER._r  # noqa: SLF001
    before, state = getattr(_SCHEDULER, _SWITCH), random.getstate()
    setattr(_SCHEDULER, _SWITCH, True)
    random.seed(seed)
    try:
        yield
    finally:
        setattr(_SCHEDULER, _SWITCH, before)
        random.setstate(state)


def run(function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts, seed: int = 1) -> T:
    """Run an async function under virtual time, and return what it returns; equal seeds give equal runs.

    Sleeping costs no time: the clock jumps to the next deadline as soon as every task waits.
    """
    with repeatable_scheduling(seed):
        return trio.run(partial(function, *arguments), clock=MockClock(autojump_threshold=0))
