"""Who gets a provider's slots: reservations, running jobs, fairness between consumers, and a rate limit. Sans-I/O.

A consumer may use all slots while nobody else wants them. While somebody else was turned away of late, nobody goes
beyond its share, and whoever was served later steps back behind those who said that they would come again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Final, TypeVar

from aci_p2p.protocol.identity import NodeId

LEASE_MS: Final = 5_000
"""A reserved slot is kept so long, milliseconds: an award takes a round trip, and a consumer that compares quotes a
second or two."""
RETRY_MS: Final = 1_000
"""When to ask again while all slots run jobs, milliseconds: nobody knows when they end."""
PATIENCE_MS: Final = 1_000
"""How long after the time that it was told a consumer may come, milliseconds: a round trip, and clocks that differ."""
MAX_WAIT_MS: Final = 5_000
"""Nobody is told to stay away for longer, milliseconds."""
LEASES_PER_SECOND: Final = 250
"""Reservations that one consumer may ask for in a second, and at once: a tenth of a core to check and sign."""
MAX_CONSUMERS: Final = 4_096
"""Consumers remembered; of those beyond, the ones unheard longest are forgotten."""

_SECOND: Final = 1_000
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """A slot that is reserved or taken."""

    consumer: NodeId
    """For whom."""
    expires_at: int
    """When the reservation ends, Unix milliseconds; a job that has begun keeps its slot until it is released."""


@dataclass(frozen=True, slots=True)
class Busy:
    """No slot now."""

    until: int
    """When to ask again, Unix milliseconds."""
    detail: str
    """Why, in words."""


@dataclass(frozen=True, slots=True)
class AdmissionStatistics:
    """A snapshot."""

    slots: int
    """Jobs at once."""
    running: int
    """Slots that jobs have."""
    reserved: int
    """Slots that are kept for awards."""
    turned_away: int
    """Requests refused since the beginning."""


@dataclass(frozen=True, slots=True)
class _Claim:
    """The wish of a consumer that was turned away."""

    lapses_at: int
    """Unix milliseconds."""
    returns: bool
    """Whether it was told when to come again."""


class Admission:
    """The slots of one provider. Time is an argument: Unix milliseconds."""

    def __init__(self, slots: int) -> None:
        """`slots` jobs at once; it may be changed, and what is taken stays."""
        self.slots = slots
        """Jobs at once."""
        self._reserved: OrderedDict[Lease, None] = OrderedDict()
        self._running: set[Lease] = set()
        self._held: Counter[NodeId] = Counter()
        self._claims: OrderedDict[NodeId, _Claim] = OrderedDict()
        self._served: OrderedDict[NodeId, int] = OrderedDict()
        self._debts: OrderedDict[NodeId, int] = OrderedDict()
        self._turned_away = 0

    def lease(self, consumer: NodeId, now: int, *, returns: bool = True) -> Lease | Busy:
        """Reserve a slot for LEASE_MS; `returns`: the consumer is told when to come again, if there is none."""
        refusal = self._rate(consumer, now) or self.check(consumer, now, returns=returns)
        if refusal is not None:
            return refusal
        lease = Lease(consumer, now + LEASE_MS)
        self._reserved[lease] = None
        self._held[consumer] += 1
        self._claims.pop(consumer, None)
        _note(self._served, consumer, now)
        return lease

    def check(self, consumer: NodeId, now: int, *, returns: bool = False) -> Busy | None:
        """Why a consumer cannot have a slot now; None: it can. Who is turned away is remembered for a while."""
        self._expire(now)
        others = [(other, claim) for other, claim in self._claims.items() if other != consumer]
        is_full = len(self._reserved) + len(self._running) >= self.slots
        until, detail = now, ""
        if is_full:
            until = next(iter(self._reserved)).expires_at if self._reserved else now + RETRY_MS
            detail = "all slots are taken"
        elif others and self._held[consumer] >= self._share(consumer):
            until = min(claim.lapses_at for _, claim in others)
            detail = "others wait for a slot, and you have your share"
        else:
            served = self._served.get(consumer, -1)
            before = [claim for other, claim in others if claim.returns and self._served.get(other, -1) < served]
            if not before or len(before) < self.slots - len(self._reserved) - len(self._running):
                return None
            until = max(claim.lapses_at for claim in before)
            detail = "others have waited for longer"
        self._turned_away += 1
        until = min(until, now + MAX_WAIT_MS)
        if self._held[consumer] < self._share(consumer):
            _note(self._claims, consumer, _Claim(until + PATIENCE_MS, returns))
        return Busy(until, detail)

    def begin(self, lease: Lease, now: int) -> bool:
        """The job of a reservation begins, and keeps the slot until `release`; False: the reservation is over."""
        self._expire(now)
        if lease not in self._reserved:
            return False
        del self._reserved[lease]
        self._running.add(lease)
        return True

    def release(self, lease: Lease) -> None:
        """Free a slot; without effect when it is free already."""
        if lease in self._running:
            self._running.remove(lease)
        elif lease in self._reserved:
            del self._reserved[lease]
        else:
            return
        self._held[lease.consumer] -= 1
        if not self._held[lease.consumer]:
            del self._held[lease.consumer]

    def statistics(self) -> AdmissionStatistics:
        """A snapshot of the counters; reservations count until somebody looks after they have ended."""
        return AdmissionStatistics(self.slots, len(self._running), len(self._reserved), self._turned_away)

    def _share(self, consumer: NodeId) -> int:
        """Slots that a consumer may have while others want some."""
        return max(1, self.slots // len({consumer, *self._held, *self._claims}))

    def _rate(self, consumer: NodeId, now: int) -> Busy | None:
        """One request of a consumer: what it asks for runs into debt, which time pays off."""
        cost = _SECOND // LEASES_PER_SECOND
        # No more than a second, however the clock was set meanwhile.
        debt = min(max(self._debts.get(consumer, 0), now), now + _SECOND)
        is_over = debt + cost > now + _SECOND
        _note(self._debts, consumer, debt if is_over else debt + cost)
        if not is_over:
            return None
        self._turned_away += 1
        return Busy(debt + cost - _SECOND, f"more than {LEASES_PER_SECOND} requests a second")

    def _expire(self, now: int) -> None:
        """Forget reservations and claims that are over, or lie in a future from which the clock was set back."""
        for lease in tuple(self._reserved):
            if not now < lease.expires_at <= now + LEASE_MS:
                self.release(lease)
        for consumer, claim in tuple(self._claims.items()):
            if not now < claim.lapses_at <= now + MAX_WAIT_MS + PATIENCE_MS:
                del self._claims[consumer]


def _note(notes: OrderedDict[NodeId, T], consumer: NodeId, value: T) -> None:
    """Remember something of a consumer."""
    notes[consumer] = value
    notes.move_to_end(consumer)
    if len(notes) > MAX_CONSUMERS:
        notes.popitem(last=False)
