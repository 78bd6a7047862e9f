"""pytest fixtures for projects that use ACI: `swarm`, and `open_swarm` for other swarms. They need pytest-trio.

pytest loads this module in every project where the package is installed, so that it imports nothing before a fixture
is used.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from aci_p2p.testing.swarm import Swarm

FIXTURE = "open_swarm"
"""Tests that use it, directly or not, run under virtual time."""


@pytest.fixture
def open_swarm() -> Callable[..., AbstractAsyncContextManager[Swarm]]:
    """`aci_p2p.testing.open_swarm`; the test runs under virtual time and in a repeatable order."""
    from aci_p2p.testing.swarm import open_swarm as opener  # noqa: PLC0415

    return opener


@pytest.fixture
async def swarm(open_swarm: Callable[..., AbstractAsyncContextManager[Swarm]]) -> AsyncGenerator[Swarm]:
    """Three providers and a consumer that have found each other; what must hold is checked when the test has ended."""
    async with open_swarm() as swarm:
        yield swarm
        swarm.assert_invariants()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell pytest-trio how to run the tests that use our fixtures."""
    for item in items:
        if FIXTURE in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.trio(run=_run), append=False)


def _run(function: Callable[[], Any], *, clock: Any = None, instruments: Sequence[Any] = ()) -> Any:  # noqa: ANN401 - trio.run
    import trio  # noqa: PLC0415
    from trio.testing import MockClock  # noqa: PLC0415

    from aci_p2p.testing.running import repeatable_scheduling  # noqa: PLC0415

    with repeatable_scheduling(1):
        return trio.run(function, clock=clock or MockClock(autojump_threshold=0), instruments=instruments)
