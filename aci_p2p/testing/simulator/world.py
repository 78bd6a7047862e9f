"""The simulated world: one queue of events, one clock, one source of randomness, one trace.

Everything that happens is an event of the queue. Events of the same millisecond happen in the order in which they were
scheduled, and every random choice comes from a stream named after what it is for, so that a seed fixes the whole run
and adding one kind of choice does not shift the others.
"""

from __future__ import annotations

import hashlib
import heapq
import struct
from collections.abc import Callable
from random import Random
from typing import Any, Final

START_MS: Final = 1_750_000_000_000
"""Unix milliseconds at which every run begins; real envelopes hold real dates."""


class Dice:
    """Random streams of one run, each named after its purpose."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._streams: dict[str, Random] = {}

    def __getitem__(self, purpose: str) -> Random:
        """The stream for a purpose; it goes on where it was left."""
        stream = self._streams.get(purpose)
        if stream is None:
            stream = self._streams[purpose] = Random(self.secret(purpose))  # noqa: S311 - must be reproducible
        return stream

    def secret(self, purpose: str) -> bytes:
        """32 bytes that depend on the seed and the purpose alone: keys, nonces."""
        return hashlib.sha256(f"{self._seed}/{purpose}".encode()).digest()


class Timer:
    """An event to come, which can be called off."""

    __slots__ = ("_action", "_arguments")

    def __init__(self, action: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._action: Callable[..., None] | None = action
        self._arguments = arguments

    def cancel(self) -> None:
        """It will not happen."""
        self._action = None

    def fire(self) -> bool:
        """Let it happen; False when it was called off."""
        if self._action is None:
            return False
        action, self._action = self._action, None
        action(*self._arguments)
        return True


class World:
    """Clock, queue and trace of one run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        """What fixes the run."""
        self.dice = Dice(seed)
        """Randomness."""
        self.now = START_MS
        """True time, Unix milliseconds; the clocks of nodes may be off."""
        self.events = 0
        """How many have happened."""
        self.after_event: list[Callable[[], None]] = []
        """Called after every event: invariants, faults that strike between two events."""
        self._queue: list[tuple[int, int, Timer]] = []
        self._scheduled = 0
        self._trace = hashlib.sha256()

    def at(self, when: int, action: Callable[..., None], *arguments: Any) -> Timer:  # noqa: ANN401 - any event
        """Let something happen at a time, Unix milliseconds; now at the earliest."""
        timer = Timer(action, arguments)
        self._scheduled += 1
        heapq.heappush(self._queue, (max(when, self.now), self._scheduled, timer))
        return timer

    def after(self, delay_ms: int, action: Callable[..., None], *arguments: Any) -> Timer:  # noqa: ANN401 - any event
        """Let something happen in a while."""
        return self.at(self.now + delay_ms, action, *arguments)

    def note(self, kind: str, node: int, data: bytes = b"") -> None:
        """Put something that happened into the trace."""
        self._trace.update(struct.pack(">QI", self.now, node & 0xFFFFFFFF) + kind.encode() + b"\0" + data)

    @property
    def trace(self) -> str:
        """Hash of everything noted so far, in hex: equal runs have equal ones."""
        return self._trace.hexdigest()

    def run_until(self, when: int) -> None:
        """Let events happen up to a time."""
        queue = self._queue
        while queue and queue[0][0] <= when:
            self.now, _, timer = heapq.heappop(queue)
            if timer.fire():
                self.events += 1
                for look in self.after_event:
                    look()
        self.now = max(self.now, when)
