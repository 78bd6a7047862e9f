"""A price that follows how busy a provider is, between bounds that its owner sets. Pure."""

from __future__ import annotations

from typing import Final

from aci_p2p.protocol.messages import SECOND
from aci_p2p.protocol.publications import LOAD_MILLI_MAX

ADJUST_MS: Final = 60 * SECOND
"""Time over which the load is averaged, and after which the price moves: longer than most jobs."""
BUSY_MILLI: Final = 800
"""Mean load in thousandths from which on the price rises: buyers would find no slot soon."""
IDLE_MILLI: Final = 400
"""Mean load in thousandths up to which the price falls: others are asked instead."""
STEP_MILLI: Final = 50
"""So many thousandths the price moves at a time: it doubles or halves in a quarter of an hour."""


def next_price(price: int, load: int, *, floor: int, ceiling: int) -> int:
    """The price after a minute of a mean load in thousandths, from `floor` to `ceiling`; any unit of amounts."""
    step = -(-price * STEP_MILLI // 1_000)
    moved = price + step if load >= BUSY_MILLI else price - step if load <= IDLE_MILLI else price
    return max(floor, min(moved, ceiling))


class AutoPrice:
    """Averages the load, and moves the price. Times are Unix milliseconds."""

    def __init__(self, price: int, *, floor: int, ceiling: int, now: int) -> None:
        """Starts at `price`, or at the nearest bound."""
        self._floor, self._ceiling = floor, ceiling
        self._price = max(floor, min(price, ceiling))
        self._load = 0
        self._loaded = 0
        self._noted_at = self._adjusted_at = now

    @property
    def price(self) -> int:
        """What to ask now."""
        return self._price

    def note(self, load: int, now: int) -> bool:
        """The load is so many thousandths from now on; whether the price has moved."""
        self._loaded += self._load * max(now - self._noted_at, 0)
        self._load, self._noted_at = min(load, LOAD_MILLI_MAX), now
        elapsed = now - self._adjusted_at
        if elapsed < ADJUST_MS:
            return False
        before, mean = self._price, self._loaded // elapsed
        self._price = next_price(before, mean, floor=self._floor, ceiling=self._ceiling)
        self._loaded, self._adjusted_at = 0, now
        return self._price != before
