"""The wall clock, as an argument to everything that needs one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import trio

Clock = Callable[[], int]
"""Unix milliseconds."""

NS_PER_MS: Final = 1_000_000
"""Nanoseconds in a millisecond."""
MS_PER_S: Final = 1_000
"""Milliseconds in a second."""


def system_clock() -> int:
    """The machine's wall clock, Unix milliseconds."""
    return time.time_ns() // NS_PER_MS


def virtual_clock() -> int:
    """trio's clock as Unix milliseconds: under `trio.testing.MockClock`, time is virtual everywhere."""
    return int(trio.current_time() * MS_PER_S)


def trio_deadline(at: int, now: int) -> float:
    """The moment `at` (Unix milliseconds) on trio's clock, when it is `now`."""
    return trio.current_time() + (at - now) / MS_PER_S
