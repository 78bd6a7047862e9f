"""Nodes that discover, for the tests of this room."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from aci_p2p.network.memory import MemoryHub
from tests.dht.driver import Home, OpenPeers, Peer, open_peer


@pytest.fixture
def hub() -> MemoryHub:
    return MemoryHub(latency=0.01)


@pytest.fixture
def open_peers(hub: MemoryHub) -> OpenPeers:
    """Opens peers of which each has joined through the first."""

    @asynccontextmanager
    async def open_all(count: int) -> AsyncGenerator[list[Peer]]:
        async with AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(open_peer(hub, number)) for number in range(1, count + 1)]
            for peer in peers[1:]:
                await peer.discovery.join([peers[0].address])
            yield peers

    return open_all


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "state" / "addresses.json")
