"""What all connections of a host together hold in their buffers.

Each connection is bounded (`yamux`), but whoever has many of them could have hundreds of times that.
"""

from __future__ import annotations

from typing import Protocol

MAX_HELD_BYTES = 32 << 20
"""In the buffers of all connections, bytes: eight that are full. Honest peers' are empty but for moments."""


class Holder(Protocol):
    """A connection."""

    def give_up(self) -> None:
        """End at once: it holds more than any other, and all together too much."""
        ...


class Holdings:
    """Counts what each connection holds. No I/O."""

    def __init__(self, limit: int = MAX_HELD_BYTES) -> None:
        """`limit`: bytes of all together."""
        self._limit = limit
        self._held: dict[Holder, int] = {}
        self.total = 0

    def enter(self, holder: Holder, count: int) -> None:
        """A connection begins, with `count` bytes in its buffers."""
        self._held[holder] = 0
        self.change(holder, count)

    def change(self, holder: Holder, count: int) -> None:
        """A connection holds `count` bytes more, or fewer; of one that has left it does not count."""
        if holder not in self._held:
            return
        self._held[holder] += count
        self.total += count
        if self.total > self._limit:
            greatest = max(self._held, key=self._held.__getitem__)
            self.leave(greatest)
            greatest.give_up()

    def leave(self, holder: Holder) -> None:
        """A connection has ended."""
        self.total -= self._held.pop(holder, 0)
