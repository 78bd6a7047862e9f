"""Which inbound connections may begin a handshake, and how many at once.

A handshake costs us two signatures and holds a socket, before we know who it is for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import trio

from aci_p2p.network.libp2p.connections import LOOPBACK
from aci_p2p.network.libp2p.upgrade import HANDSHAKE_SECONDS

MAX_HANDSHAKES = 256
"""Inbound handshakes under way; one more ends the oldest, so that silent connections cannot lock honest ones out."""
MAX_HANDSHAKES_PER_SOURCE = 16
"""Inbound handshakes under way from one source, loopback excepted; one more ends its oldest."""
HANDSHAKES_PER_SECOND = 4.0
"""Handshakes that one source may begin in the long run, per second, loopback excepted: a tenth of our time."""
HANDSHAKE_BURST = 32.0
"""Handshakes that one source may begin at once: a whole site behind one NAT comes back after a power cut."""
MAX_SOURCES = 4096
"""Sources whose rate is watched; those that were quiet longest are forgotten first."""


class _Allowance(NamedTuple):
    left: float
    at: float


class Admission:
    """Bounds on inbound handshakes: in time, in number, and in number per source and second."""

    def __init__(self) -> None:
        self._under_way: OrderedDict[trio.CancelScope, str] = OrderedDict()
        self._allowances: OrderedDict[str, _Allowance] = OrderedDict()
        self.refused = 0

    @property
    def under_way(self) -> int:
        """Handshakes under way."""
        return len(self._under_way)

    def admits(self, source: str) -> bool:
        """Whether a source may begin another handshake now; counts it."""
        if source == LOOPBACK:
            return True
        now = trio.current_time()
        left, at = self._allowances.get(source, _Allowance(HANDSHAKE_BURST, now))
        left = min(HANDSHAKE_BURST, left + (now - at) * HANDSHAKES_PER_SECOND)
        admitted = left >= 1
        self._allowances[source] = _Allowance(left - admitted, now)
        self._allowances.move_to_end(source)
        if len(self._allowances) > MAX_SOURCES:
            self._allowances.popitem(last=False)
        self.refused += not admitted
        return admitted

    @contextmanager
    def handshaking(self, source: str) -> Generator[None]:
        """The block is a handshake: it is ended after HANDSHAKE_SECONDS, or when too many begin after it."""
        of_source = sum(other == source for other in self._under_way.values())
        if of_source >= MAX_HANDSHAKES_PER_SOURCE and source != LOOPBACK:
            self.end_oldest(source)
        elif len(self._under_way) >= MAX_HANDSHAKES:
            self.end_oldest()
        with trio.move_on_after(HANDSHAKE_SECONDS) as scope:
            self._under_way[scope] = source
            try:
                yield
            finally:
                self._under_way.pop(scope, None)

    def end_oldest(self, source: str | None = None) -> None:
        """Give up the handshake, of a source or of all, that has taken longest."""
        for scope, other in self._under_way.items():
            if source is None or other == source:
                scope.cancel()
                del self._under_way[scope]
                return
