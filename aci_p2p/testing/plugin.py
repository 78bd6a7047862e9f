"""pytest fixtures for projects that use ACI: `swarm`, and `open_swarm` for other swarms. They need pytest-trio.

pytest loads this module in every project where the package is installed, so that it imports nothing before a fixture
is used.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from trio.testing import MockClock

    from aci_p2p.testing.swarm import Swarm


@pytest.fixture
def open_swarm(
    autojump_clock: MockClock,  # noqa: ARG001 - the test's clock
) -> Callable[..., AbstractAsyncContextManager[Swarm]]:
    """`aci_p2p.testing.open_swarm`, in a test that runs under virtual time."""
    from aci_p2p.testing.swarm import open_swarm as opener  # noqa: PLC0415

    return opener


@pytest.fixture
async def swarm(open_swarm: Callable[..., AbstractAsyncContextManager[Swarm]]) -> AsyncGenerator[Swarm]:
    """Three providers and a consumer that have found each other; what must hold is checked when the test has ended."""
    async with open_swarm() as swarm:
        yield swarm
        swarm.assert_invariants()
