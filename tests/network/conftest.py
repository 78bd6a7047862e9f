"""Endpoints for tests: the same fixtures over both implementations."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import pairwise

import pytest

from aci_p2p.network import Network
from aci_p2p.network.libp2p import open_libp2p_network
from aci_p2p.network.memory import MemoryHub
from tests.network.attack import Victim, judge
from tests.network.driver import ECHO, TOPIC, Opener, OpenLine, echo, make_key, open_on, select_record, validate_record


@pytest.fixture
def open_libp2p() -> Opener:
    """Opens libp2p endpoints on loopback."""

    def open_one(number: int) -> AbstractAsyncContextManager[Network]:
        key = make_key(number)
        return open_libp2p_network(key, record_validator=validate_record, record_selector=select_record)

    return open_one


@pytest.fixture
def hub() -> MemoryHub:
    """The medium of the in-memory endpoints of one test."""
    return MemoryHub()


@pytest.fixture
def open_memory(hub: MemoryHub) -> Opener:
    """Opens in-memory endpoints on one hub."""
    return partial(open_on, hub)


@pytest.fixture(params=["memory", "libp2p"])
def open_network(request: pytest.FixtureRequest, open_memory: Opener, open_libp2p: Opener) -> Opener:
    """Opens endpoints of each implementation in turn."""
    return open_memory if request.param == "memory" else open_libp2p


@pytest.fixture
def open_line(open_network: Opener) -> OpenLine:
    """Opens endpoints of which each is connected to the one before it."""

    @asynccontextmanager
    async def open_all(count: int) -> AsyncGenerator[list[Network]]:
        async with AsyncExitStack() as stack:
            networks = [await stack.enter_async_context(open_network(number)) for number in range(1, count + 1)]
            for left, right in pairwise(networks):
                await right.connect(left.addresses[0])
            yield networks

    return open_all


@pytest.fixture
async def victim(open_libp2p: Opener) -> AsyncGenerator[Victim]:
    """A node that serves, gossips and keeps records; it must still do so at the end of the test."""
    async with open_libp2p(1) as network, network.subscribe(TOPIC, judge, capacity=8):
        with network.serve(ECHO, echo):
            victim = Victim(network, open_libp2p)
            yield victim
            await victim.serves_honest_peers()
