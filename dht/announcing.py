"""What to publish about ourselves, and when. No I/O: time and randomness are arguments.

A record is published when it is new, renewed long before it expires, and published again when what it says has changed
for those who read it, but not at every job that begins or ends. `next_due` says when to look again; before that only
what was told to the announcer since can make something due.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from random import Random
from typing import Final

from aci_p2p.protocol.publications import CapabilityRecord, NodeRecord

REANNOUNCE_S: Final = 3_600.0
"""Seconds between announcements, on average; records live three times as long, so that one may be lost."""
JITTER: Final = 0.2
"""Part of REANNOUNCE_S by which an announcement may come sooner or later, so that not all come at once."""
CHANGE_GAP_S: Final = 10.0
"""Seconds between two announcements of one record that changes."""
SPREAD_GAP_S: Final = 2.0
"""Seconds between announcements while our connections multiply."""
SPREAD_FACTOR: Final = 4
"""How many times as many connections make it worth announcing everything again."""
RETRY_S: Final = 60.0
"""Seconds until what could not be published is tried again."""
MATERIAL_SHARE: Final = 2
"""A change of free slots by one in so many slots is worth telling; so is the first that is free, and the last."""

Record = NodeRecord | CapabilityRecord


@dataclass(slots=True)
class _Published:
    body: Record
    at: float
    retry_at: float = inf


class Announcer:
    """What was published, and what should be."""

    def __init__(self, random: Random) -> None:
        """`random` spreads announcements over time."""
        self._random = random
        self._published: dict[bytes, _Published] = {}
        self._wanted: dict[bytes, Record] = {}
        self._reach = 0
        self._renew_at = inf

    @property
    def current(self) -> tuple[Record, ...]:
        """What we say of ourselves."""
        return tuple(self._wanted.values())

    def update(self, node: NodeRecord, capabilities: Sequence[CapabilityRecord]) -> None:
        """What is to be known of us from now on."""
        self._wanted = {b"": node, **{capability.model_root: capability for capability in capabilities}}

    def due(self, peers: int, now: float, *, renew: bool = False) -> list[Record]:
        """What to publish now, withdrawals first, with so many peers connected; all of it with `renew`."""
        if not peers:
            self._reach = 0
        renew = renew or now >= min(self._renew_at, self._spread_at(peers))
        if renew or not self._published:
            self._reach = peers
            self._renew_at = now + REANNOUNCE_S * self._random.uniform(1 - JITTER, 1 + JITTER)
        chosen: list[Record] = [
            replace(published.body, slots=0, free_slots=0, addresses=(), price_curve=())
            for key, published in self._published.items()
            if key not in self._wanted and isinstance(published.body, CapabilityRecord)
        ]
        self._published = {key: one for key, one in self._published.items() if key in self._wanted}
        for key, body in self._wanted.items():
            if renew or now >= self._due_at(key, body):
                chosen.append(body)
                self._published[key] = _Published(body, now)
        return chosen

    def next_due(self, peers: int) -> float:
        """When there is something to publish, seconds, unless something changes before; `inf` for never."""
        wanted = (self._due_at(key, body) for key, body in self._wanted.items())
        withdrawals = (-inf for key in self._published if key not in self._wanted)
        return min(self._renew_at, self._spread_at(peers), *wanted, *withdrawals, inf)

    def _spread_at(self, peers: int) -> float:
        """When to publish all of it again: when we did, few peers were there, and those who look know others."""
        if not peers or peers < SPREAD_FACTOR * self._reach or not self._published:
            return inf
        return max(published.at for published in self._published.values()) + SPREAD_GAP_S

    def _due_at(self, key: bytes, body: Record) -> float:
        published = self._published.get(key)
        if published is None:
            return -inf
        return min(published.retry_at, published.at + CHANGE_GAP_S if is_material(published.body, body) else inf)

    def withdraw(self) -> list[Record]:
        """What to publish before we leave."""
        self._wanted = {}
        return self.due(0, 0.0)

    def failed(self, body: Record, now: float) -> None:
        """A record could not be published."""
        key = body.model_root if isinstance(body, CapabilityRecord) else b""
        if (published := self._published.get(key)) is not None:
            published.retry_at = now + RETRY_S


def is_material(old: Record, new: Record) -> bool:
    """Whether others should hear of a change of our record."""
    if old == new:
        return False
    if not isinstance(old, CapabilityRecord) or not isinstance(new, CapabilityRecord):
        return True
    if replace(old, free_slots=new.free_slots) != new:
        return True
    changed = abs(old.free_slots - new.free_slots)
    return changed * MATERIAL_SHARE >= new.slots > 0 < changed or bool(old.free_slots) != bool(new.free_slots)
