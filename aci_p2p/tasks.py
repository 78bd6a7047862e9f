"""Background tasks that serve a block and end with it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import cast

import trio


@asynccontextmanager
async def open_background() -> AsyncGenerator[trio.Nursery]:
    """A nursery that is cancelled at the end of the block.

    A lone error, of the block or of a task, comes out as itself and not in a group of one, so that callers can catch
    it by type; several come out in a group.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        error = _lone(group)
        raise error from error.__cause__


def _lone(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The only error in a group of groups, or the innermost group that holds several."""
    parts: tuple[BaseException, ...] = group.exceptions
    if len(parts) != 1:
        return group
    if isinstance(parts[0], BaseExceptionGroup):
        return _lone(cast("BaseExceptionGroup[BaseException]", parts[0]))
    return parts[0]
