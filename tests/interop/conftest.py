"""What the interoperability tests start with: a js-libp2p node, and how to open ours."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from aci_p2p.clock import system_clock
from aci_p2p.dht import RecordRules
from aci_p2p.gossip import open_market
from aci_p2p.network.libp2p import open_libp2p_network
from aci_p2p.protocol.envelope import Sealer
from aci_p2p.protocol.identity import KeyPair
from tests.interop.driver import JS, MODEL, JsNode, Trader, open_js_node
from tests.protocol.driver import NETWORK

OpenTrader = Callable[[int], AbstractAsyncContextManager[Trader]]
"""Opens a node of ours; the number decides its key."""


@pytest.fixture
async def js() -> AsyncGenerator[JsNode]:
    """A running js-libp2p node."""
    if not (JS / "node_modules").is_dir():
        if os.environ.get("ACI_REQUIRE_INTEROP"):
            pytest.fail("js-libp2p is not installed: make test-interop")
        pytest.skip("js-libp2p is not installed: make test-interop")
    async with open_js_node() as node:
        yield node


@pytest.fixture
def open_trader() -> OpenTrader:
    """Opens nodes of ours with a market, over libp2p on loopback."""

    @asynccontextmanager
    async def open_one(number: int) -> AsyncGenerator[Trader]:
        key, rules = KeyPair(number.to_bytes(32)), RecordRules(NETWORK, system_clock)
        async with (
            open_libp2p_network(key, record_validator=rules.validate, record_selector=rules.select) as network,
            open_market(network, NETWORK, system_clock) as market,
            market.take_part(MODEL),
        ):
            yield Trader(network, market, Sealer(key, NETWORK))

    return open_one
