"""Messages that wait for their consumer: the oldest make room, and are counted."""

from __future__ import annotations

from collections import deque
from typing import Final, Generic, TypeVar

import trio

from aci_p2p.tasks import Notice

QUEUE: Final = 256
"""Messages waiting for their consumer, unless a topic says otherwise."""
ROOM_S: Final = 5.0
"""How long `wait_for_room` waits for a consumer to take one message, seconds; one that takes none is waited for no
more."""

T = TypeVar("T")


class Inbox(Generic[T]):
    """A bounded queue, which one or several topics fill."""

    def __init__(self, capacity: int = QUEUE) -> None:
        """`capacity`: messages that wait; beyond it the oldest are lost."""
        self.capacity = capacity
        """Messages that can wait."""
        self.dropped = 0
        """Messages lost because the consumer lagged."""
        self._queue: deque[T] = deque()
        self._changed = Notice()
        self._is_consumed = False

    def __len__(self) -> int:
        """Messages that wait."""
        return len(self._queue)

    def put(self, message: T) -> None:
        """Add a message; the oldest makes room for it."""
        if len(self._queue) >= self.capacity:
            self._queue.popleft()
            self.dropped += 1
        self._queue.append(message)
        self._changed.notify()

    async def receive(self) -> T:
        """Wait for the next message."""
        await trio.lowlevel.checkpoint()
        while not self._queue:
            await self._changed.wait()
        message = self._queue.popleft()
        self._is_consumed = True
        self._changed.notify()
        return message

    async def wait_for_room(self) -> None:
        """Wait until there is room, if there is a consumer."""
        await trio.lowlevel.checkpoint()
        while len(self._queue) >= self.capacity and self._is_consumed:
            with trio.move_on_after(ROOM_S) as scope:
                await self._changed.wait()
            if scope.cancelled_caught:
                self._is_consumed = False
