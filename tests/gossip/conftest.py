"""Endpoints for the tests of topics, over both implementations of the network."""

from __future__ import annotations

from functools import partial

import pytest

from aci_p2p.network.memory import MemoryHub
from tests.network.conftest import open_libp2p
from tests.network.driver import Opener, open_on

__all__ = ["open_libp2p"]


@pytest.fixture
def hub() -> MemoryHub:
    """The medium of the in-memory endpoints of one test."""
    return MemoryHub(latency=0.01)


@pytest.fixture(params=["memory", "libp2p"])
def open_network(request: pytest.FixtureRequest, hub: MemoryHub, open_libp2p: Opener) -> Opener:
    """Opens endpoints of each implementation in turn."""
    return partial(open_on, hub) if request.param == "memory" else open_libp2p
