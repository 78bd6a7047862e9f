"""What to publish about ourselves, and when. No I/O: time and randomness are arguments.

A record is published when it is new, renewed long before it expires, and published again when what it says has changed
for those who read it, but not at every job that begins or ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from aci_p2p.protocol.messages import CapabilityRecord, NodeRecord

REANNOUNCE_S: Final = 600.0
"""Seconds between announcements, on average; records live six times as long, so that four may be lost."""
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
    due: float


class Announcer:
    """What was published, and what should be."""

    def __init__(self, random: Random) -> None:
        """`random` spreads announcements over time."""
        self._random = random
        self._published: dict[bytes, _Published] = {}
        self._wanted: dict[bytes, Record] = {}
        self._reach = 0

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
        elif peers >= SPREAD_FACTOR * self._reach and self._published:
            # When we published, few peers were there to hear it: many of those who look for it do not know them.
            renew = renew or now >= max(published.at for published in self._published.values()) + SPREAD_GAP_S
        if renew or not self._published:
            self._reach = peers
        chosen: list[Record] = [
            replace(published.body, slots=0, free_slots=0, addresses=(), price_curve=())
            for key, published in self._published.items()
            if key not in self._wanted and isinstance(published.body, CapabilityRecord)
        ]
        self._published = {key: one for key, one in self._published.items() if key in self._wanted}
        for key, body in self._wanted.items():
            published = self._published.get(key)
            if published is None or renew or now >= published.due or self._has_changed(published, body, now):
                chosen.append(body)
                due = now + REANNOUNCE_S * self._random.uniform(1 - JITTER, 1 + JITTER)
                self._published[key] = _Published(body, now, due)
        return chosen

    def withdraw(self) -> list[Record]:
        """What to publish before we leave."""
        self._wanted = {}
        return self.due(0, 0.0)

    def failed(self, body: Record, now: float) -> None:
        """A record could not be published."""
        key = body.model_root if isinstance(body, CapabilityRecord) else b""
        if (published := self._published.get(key)) is not None:
            published.due = min(published.due, now + RETRY_S)

    def _has_changed(self, published: _Published, body: Record, now: float) -> bool:
        return now >= published.at + CHANGE_GAP_S and is_material(published.body, body)


def is_material(old: Record, new: Record) -> bool:
    """Whether others should hear of a change of our record."""
    if not isinstance(old, CapabilityRecord) or not isinstance(new, CapabilityRecord):
        return old != new
    if replace(old, free_slots=new.free_slots) != new:
        return True
    changed = abs(old.free_slots - new.free_slots)
    return changed * MATERIAL_SHARE >= new.slots > 0 < changed or bool(old.free_slots) != bool(new.free_slots)
