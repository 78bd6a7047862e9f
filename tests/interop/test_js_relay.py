"""Circuits with js-libp2p: as the relay between two of ours, and as who comes through ours."""

from __future__ import annotations

import pytest

from aci_p2p.network.api import Reachability
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.circuit import STOP
from tests.interop.driver import JsNode, eventually, until
from tests.network.traversing import circuits, exchange, open_several, reserve

pytestmark = [pytest.mark.interop, pytest.mark.slow]


async def test_js_comes_through_our_relay(js: JsNode) -> None:
    async with open_several(2) as (relay, private):
        await reserve(private, relay)
        assert (await js("dial", address=circuits(private)[0].owned_by(private.id)))["peer"] == str(private.id)
        await eventually(lambda: js.peer in private.host.peers)
        assert [connection.relay for connection in private.host.connections.of(js.peer)] == [relay.id]

        async def is_identified() -> bool:
            return STOP in (await js("identify", peer=str(private.id)))["protocols"]

        await until(is_identified)
        await eventually(lambda: private.identify.identity(js.peer))


async def test_js_relays_between_ours(js: JsNode) -> None:
    async with open_several(2) as (private, other):
        await private.host.dial(js.peer, [TcpAddress.parse(js.address)])
        await eventually(lambda: private.identify.identity(js.peer))
        private.host.set_reachability(Reachability.PRIVATE)
        await eventually(lambda: circuits(private))
        connection = await other.host.dial(private.id, circuits(private))
        assert connection.relay == js.peer
        await exchange(other.host, private.id, bytes(10_000))
        await exchange(private.host, other.id)
