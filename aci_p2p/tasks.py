"""Background tasks that serve a block and end with it, and how they hear of changes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import cast

import trio


class Notice:
    """Wakes those who wait for a change. Who looks first, and then waits without a checkpoint between, misses none."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def notify(self) -> None:
        """Something has changed."""
        if self._event.statistics().tasks_waiting:
            self._event.set()
            self._event = trio.Event()

    async def wait(self) -> None:
        """Wait for the next `notify`."""
        await self._event.wait()


@asynccontextmanager
async def open_background() -> AsyncGenerator[trio.Nursery]:
    """A nursery that is cancelled at the end of the block.

    A lone error, of the block or of a task, comes out as itself and not in a group of one, so that callers can catch
    it by type, even if the block was cancelled meanwhile; several come out in a group.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        _, errors = group.split(trio.Cancelled)
        error = _lone(errors or group)
        raise error from error.__cause__


def _lone(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The only error in a group of groups, or the innermost group that holds several."""
    parts: tuple[BaseException, ...] = group.exceptions
    if len(parts) != 1:
        return group
    if isinstance(parts[0], BaseExceptionGroup):
        return _lone(cast("BaseExceptionGroup[BaseException]", parts[0]))
    return parts[0]
