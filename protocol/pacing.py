"""How often a provider publishes its ask, so that a topic carries no more than it should. Sans-I/O.

Nobody counts the providers of a model, and nobody has to: each hears all that comes, and speaks more rarely or more
often by the same measure as all others. A weak pull towards what is fair for those that it knows of makes the shares
equal in time, whatever they were at first. What changes for buyers is told at once, out of a small credit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from aci_p2p.protocol.chance import Chance
from aci_p2p.protocol.messages import KINDS, SECOND, Kind
from aci_p2p.protocol.pricing import asked_prices
from aci_p2p.protocol.publications import Ask

ASKS_PER_SECOND: Final = 4
"""Asks on the topic of one model: 2 KB a second, and a book of 240 while they live."""
RENEW_MS: Final = 20 * SECOND
"""Mean time between asks of a provider where there is room for all: a third of their life, so that one may be lost."""
WINDOW_MS: Final = 10 * SECOND
"""Time over which asks are counted: forty at the rate that they should have."""
BURST: Final = 2 * ASKS_PER_SECOND * WINDOW_MS // SECOND
"""Asks that end the window early: twice as many as should come."""
CHANGE_GAP_MS: Final = 2 * SECOND
"""Shortest time between two asks of a provider; others refuse those that come within half a second."""
MAX_INTERVAL_MS: Final = 3_600 * SECOND
"""Longest mean time between asks: 14,400 providers. Whoever floods a topic can silence nobody for ever."""
CREDITS: Final = 2
"""Changes that may be told in a row, such as busy and free again."""
LISTEN_MS: Final = 1 * SECOND
"""Longest time before the first ask, in which asks of others are fetched; half of it is the shortest, which is the gap
that others want after what was said before a restart."""
CROWD: Final = 40
"""Providers that are known before we speak first, from which on nobody waits for one more."""
GAIN: Final = 0.5
"""The interval follows the square root of how much too often asks come: quickly enough, without swinging."""
PULL: Final = 0.01
"""Part of the way to the fair interval, in proportions, made in each window. Shares are equal in half an hour; with ten
thousand providers, of which the book shows 240, the rate settles 8% too high for it."""
MAX_SLOWER: Final = 8.0
"""Largest factor of the interval in one window."""
MAX_FASTER: Final = 0.5
"""Smallest: a topic that falls silent has gone through in a minute."""

LIFETIME_MS: Final = KINDS[Kind.ASK].lifetime_ms
"""How long our asks live, milliseconds."""


class AskPacer:
    """Says when to publish our ask for one model. Times are Unix milliseconds."""

    def __init__(self, random: Chance, now: int) -> None:
        """Begins to listen at `now`."""
        self._random = random
        self._interval = float(CHANGE_GAP_MS)
        self._began = self._window_began = now
        self._heard = 0
        self._due = now + round(LISTEN_MS * (0.5 + 0.5 * random.random()))
        self._has_begun = False
        self._credits = float(CREDITS)
        self._credited_at = now
        self._said: Ask | None = None
        self._said_at = 0

    @property
    def interval_ms(self) -> float:
        """Mean time between our asks, as far as others leave us to it, milliseconds."""
        return max(self._interval, RENEW_MS)

    def observe(self, heard: int, others: int, now: int) -> None:
        """So many asks came since last time, and so many other providers have a live one."""
        self._heard += heard
        fair = _within_bounds((others + 1) * SECOND / ASKS_PER_SECOND)
        if not self._has_begun:
            self._interval = fair
            if others >= CROWD:
                # There is enough to choose from; were all to come at once, they would come evenly.
                self._due = now + round(self.interval_ms * self._random.random())
                self._has_begun = True
        if now - self._began < LIFETIME_MS:
            # Those who come with us, or were not heard of yet, count too.
            self._change(max(self._interval, fair), now)
        elapsed = max(now - self._window_began, 1)
        if elapsed >= WINDOW_MS or self._heard >= BURST:
            self._adapt(fair, elapsed, now)

    def next_look(self, ask: Ask, now: int) -> int:
        """When to `observe` again at the latest, and then to see whether `ask` is due."""
        return min(self._next_due(ask, now), self._window_began + WINDOW_MS)

    def is_due(self, ask: Ask, now: int) -> bool:
        """Whether to publish `ask`, which is what we ask now."""
        return now >= self._next_due(ask, now)

    def is_out(self, now: int) -> bool:
        """Whether our last ask lives, and offers something."""
        return self._said is not None and bool(self._said.slots) and now < self._said_at + LIFETIME_MS

    def published(self, ask: Ask, now: int) -> None:
        """`ask` was published."""
        if now < self._due:
            self._credits = self._credit(now) - 1
            self._credited_at = now
        self._has_begun = True
        self._heard += 1
        self._said, self._said_at = ask, now
        self._due = now + round(self.interval_ms * (0.5 + self._random.random()))

    def _next_due(self, ask: Ask, now: int) -> int:
        if not self.is_out(now) or self._said is None or not is_urgent(self._said, ask):
            # Who does not see us in its book misses no change.
            return self._due
        credit = self._credit(now)
        affordable = now if credit >= 1 else now + round((1 - credit) * self._interval)
        return min(self._due, max(affordable, self._said_at + CHANGE_GAP_MS))

    def _credit(self, now: int) -> float:
        return min(self._credits + (now - self._credited_at) / self._interval, CREDITS)

    def _adapt(self, fair: float, elapsed: int, now: int) -> None:
        excess = self._heard * SECOND / elapsed / ASKS_PER_SECOND
        factor = min(max(excess**GAIN, MAX_FASTER), MAX_SLOWER)
        pull = (fair / self._interval) ** (PULL * min(elapsed / WINDOW_MS, 1.0))
        self._change(_within_bounds(self._interval * factor * pull), now)
        self._window_began, self._heard = now, 0

    def _change(self, interval: float, now: int) -> None:
        """Another interval from now on; what is left to wait changes with it."""
        self._credits, self._credited_at = self._credit(now), now
        before = self.interval_ms
        self._interval = interval
        self._due = now + round(max(self._due - now, 0) * self.interval_ms / before)


def is_urgent(old: Ask, new: Ask) -> bool:
    """Whether buyers should hear of a change at once: other terms or prices, the first free slot, or the last."""
    if old == new:
        return False
    if bool(old.free_slots) != bool(new.free_slots) or asked_prices(old) != asked_prices(new):
        return True
    return replace(old, free_slots=new.free_slots, latency_ms=new.latency_ms) != new


def _within_bounds(interval: float) -> float:
    return min(max(interval, CHANGE_GAP_MS), MAX_INTERVAL_MS)
