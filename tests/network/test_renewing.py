"""Renewing circuits, of which some relays are silent: in virtual time, without a wire."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.clock import virtual_clock
from aci_p2p.network import PeerUnreachable
from aci_p2p.network.libp2p import relay
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.circuit import RelayedStream
from aci_p2p.network.libp2p.connections import Connection
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.relay import RelayClient
from aci_p2p.network.libp2p.yamux import Yamux
from aci_p2p.protocol.identity import NodeId
from tests.network.driver import make_key

CIRCUITS = 40
PEERS = [make_key(number).node_id for number in range(1, CIRCUITS + 1)]
RELAY = make_key(77).node_id
PLACE = TcpAddress("ip4", "192.0.2.1", 4001, None, RELAY)


async def test_a_silent_relay_does_not_hold_up_the_other_circuits(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_muxer = cast("Yamux", SimpleNamespace(is_closed=False))
    circuits = {peer: Connection(peer, open_muxer, True, PLACE, "relay", 0.0, RELAY) for peer in PEERS}  # noqa: FBT003
    host = SimpleNamespace(on_disconnected=[], on_changed=[], connection=circuits.get)
    client = RelayClient(cast("Host", host), virtual_clock, Random(1), lambda _peer: True)  # noqa: S311
    worn = cast("RelayedStream", SimpleNamespace(is_worn=True))
    client._dialled = [relay._Dialled(circuit, worn) for circuit in circuits.values()]
    begun: list[tuple[NodeId, float]] = []
    at_once = most = 0

    async def dial(peer: NodeId, _place: TcpAddress) -> Connection:
        nonlocal at_once, most
        begun.append((peer, trio.current_time()))
        at_once += 1
        most = max(most, at_once)
        await trio.sleep(relay.CIRCUIT_DIAL_SECONDS)
        at_once -= 1
        msg = "no answer"
        raise PeerUnreachable(msg)

    monkeypatch.setattr(client, "dial", dial)
    rounds = -(-CIRCUITS // relay.RENEWALS_AT_ONCE)
    with trio.move_on_after(relay.CHECK_SECONDS + rounds * relay.CIRCUIT_DIAL_SECONDS):
        await client.renew_circuits()
    assert {peer for peer, _ in begun} == set(PEERS)
    assert max(at for _, at in begun) <= relay.CHECK_SECONDS + (rounds - 1) * relay.CIRCUIT_DIAL_SECONDS
    assert most == relay.RENEWALS_AT_ONCE
