"""Randomness as an argument: what `random.Random` can do, as far as the protocol needs it."""

from __future__ import annotations

from typing import Protocol


class Chance(Protocol):
    """A source of random numbers, such as `random.Random`."""

    def random(self) -> float:
        """From 0 to below 1."""
        ...

    def randrange(self, stop: int, /) -> int:
        """From 0 to below `stop`."""
        ...
