"""What an order book says about prices: quartiles, and what a provider might ask. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aci_p2p.protocol.autoprice import BUSY_MILLI, IDLE_MILLI
from aci_p2p.protocol.pricing import load_milli


@dataclass(frozen=True, slots=True)
class Quartiles:
    """How prices spread, base units; each is one that somebody asks."""

    lowest: int
    """None is below."""
    lower: int
    """A quarter is not above."""
    median: int
    """Half is not above."""
    upper: int
    """Three quarters are not above."""
    highest: int
    """None is above."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What a provider might ask."""

    price: int
    """For an output token, base units."""
    reason: str
    """Why, for people."""


def quartiles(prices: Sequence[int]) -> Quartiles:
    """Of at least one price, by nearest rank."""
    ordered = sorted(prices)
    ranks = (max(-(-len(ordered) * part // 4) - 1, 0) for part in range(5))
    return Quartiles(*(ordered[rank] for rank in ranks))


def suggest(output_prices: Sequence[int], slots: int, free_slots: int) -> Suggestion:
    """What to ask where others ask these prices, at least one, and have so many slots and free ones together."""
    spread, load = quartiles(output_prices), load_milli(slots, free_slots)
    taken = f"{slots - min(free_slots, slots)} of {slots} slots are taken"
    if load >= BUSY_MILLI:
        return Suggestion(spread.upper, f"{taken}: who has a free one can ask what the dearer quarter asks")
    if load <= IDLE_MILLI:
        return Suggestion(spread.lower, f"{taken}: only who is among the cheaper quarter is asked")
    return Suggestion(spread.median, f"{taken}: the middle of what others ask finds buyers")
