"""DCUtR: direct connections in the place of relayed ones. Real NATs are in test_nat.py."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import trio

from aci_p2p.network.api import AddressInUse
from aci_p2p.network.config import NetworkConfig
from aci_p2p.network.libp2p import autonat, dcutr
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.circuit import HOP, STOP
from aci_p2p.network.libp2p.dcutr import PROTOCOL, HolePuncher
from aci_p2p.network.libp2p.upstream import HolePunch
from aci_p2p.network.libp2p.varint import prefixed
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset
from tests.network.driver import ECHO, eventually
from tests.network.traversing import Traversing, answered, circuits, exchange, open_several, open_traversing, reserve

ANY = "/ip4/0.0.0.0/tcp/0"
PUBLIC = TcpAddress("ip4", "1.1.1.1", 1)
LOCAL = TcpAddress("ip4", "10.0.0.1", 1)

Three = tuple[Traversing, Traversing, Traversing]


identified = HolePuncher.identified


@pytest.fixture
async def three(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Three]:
    """A relay, and two that listen everywhere: one has a reservation, the other is connected through it.

    Neither tries for better of its own accord.
    """
    monkeypatch.setattr(HolePuncher, "identified", _ignore)
    async with (
        open_traversing(1) as server,
        open_traversing(2, listen=[ANY], config=NetworkConfig()) as private,
        open_traversing(3, listen=[ANY], config=NetworkConfig()) as other,
    ):
        await reserve(private, server)
        await other.host.dial(private.id, circuits(private))
        await eventually(lambda: private.identify.identity(other.id) and other.identify.identity(private.id))
        yield server, private, other


def address_of(node: Traversing) -> TcpAddress:
    """Where a node can be dialled on this machine."""
    return TcpAddress("ip4", "127.0.0.1", node.host.bound_addresses[0].port)


async def test_both_connect_to_each_other_at_once(three: Three) -> None:
    _, private, other = three
    stream = await other.host.open_stream(private.id, ECHO)
    await answered(stream)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_punch_as, private, other, False)  # noqa: FBT003
        nursery.start_soon(_punch_as, other, private, True)  # noqa: FBT003
    for node, peer in ((private, other), (other, private)):
        connection = node.host.connection(peer.id)
        assert connection is not None
        assert connection.relay is None
        assert connection.outbound == (node is other)
    # What began on the relayed connection goes on there, until it ends; new streams take the direct one.
    await answered(stream)
    await exchange(private.host, other.id)
    stream.close()
    await eventually(lambda: other.relayed(private) == private.relayed(other) == [False])


async def _punch_as(node: Traversing, peer: Traversing, is_client: bool) -> None:  # noqa: FBT001
    assert await node.traversal.puncher._punch(peer.id, [address_of(peer)], is_client=is_client)


async def test_ports_are_shared_with_our_own_sockets_only(three: Three) -> None:
    _, private, other = three

    async def is_taken() -> bool:
        port = private.host.bound_addresses[0].port
        try:
            await other.host.listen(TcpAddress("ip4", "0.0.0.0", port))  # noqa: S104 - what is tested
        except AddressInUse:
            return True
        return False

    assert await is_taken()
    with pytest.raises(OSError, match="in use"):
        await dcutr._connect(private.host.bound_addresses[0], address_of(other))
    private.host.share_ports()
    stream = await dcutr._connect(private.host.bound_addresses[0], address_of(other))
    assert stream.socket.getsockname()[1] == private.host.bound_addresses[0].port
    assert await is_taken()
    await stream.aclose()


async def test_nobody_there(three: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcutr, "PUNCH_SECONDS", 0.3)
    _, private, other = three
    nowhere = TcpAddress("ip4", "127.0.0.1", 1)
    assert not await private.traversal.puncher._punch(other.id, [nowhere], is_client=False)
    assert not await private.traversal.puncher._punch(other.id, [], is_client=False)
    assert not private.host.claims
    assert private.relayed(other) == [True]


async def test_somebody_else_is_there(three: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcutr, "HANDSHAKE_SECONDS", 0.5)
    server, private, other = three
    assert not await other.traversal.puncher._punch(private.id, [address_of(server)], is_client=True)
    assert not await private.traversal.puncher._punch(other.id, [address_of(server)], is_client=False)
    assert private.relayed(other) == [True]


async def test_the_protocol_tries_three_times_and_leaves_the_relay(
    three: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[bool, list[TcpAddress]]] = []

    async def fail(_self: HolePuncher, _peer: object, addresses: list[TcpAddress], *, is_client: bool) -> bool:
        tried.append((is_client, addresses))
        await trio.lowlevel.checkpoint()
        return False

    monkeypatch.setattr(HolePuncher, "_punch", fail)
    monkeypatch.setattr(HolePuncher, "_dial_dialler", _never)
    _, private, other = three
    monkeypatch.setattr(private.traversal.puncher, "_presumed_addresses", lambda: [PUBLIC])
    monkeypatch.setattr(other.traversal.puncher, "_presumed_addresses", lambda: [PUBLIC, LOCAL])
    identity = private.identify.identity(other.id)
    assert identity is not None
    identified(private.traversal.puncher, other.id, identity)
    await eventually(lambda: private.traversal.puncher.failed)
    await eventually(lambda: other.traversal.puncher.failed)
    assert sorted(tried, key=str) == [(False, [PUBLIC])] * 3 + [(True, [PUBLIC])] * 3
    # It is not tried again on the same connection.
    identified(private.traversal.puncher, other.id, identity)
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert len(tried) == 6
    await exchange(private.host, other.id)


def _ignore(*_: object) -> None:
    pass


async def _never(*_: object) -> bool:
    await trio.lowlevel.checkpoint()
    return False


async def test_strangers_make_us_dial_only_the_internet_when_we_are_on_it(
    three: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, private, _ = three
    puncher = private.traversal.puncher
    unusable = [TcpAddress("ip4", "127.0.0.1", 1), TcpAddress("dns", "a.example", 1), PUBLIC.through(private.id)]
    monkeypatch.setattr(puncher, "_presumed_addresses", lambda: [PUBLIC])
    assert puncher._acceptable([*unusable, LOCAL, PUBLIC]) == [PUBLIC]
    monkeypatch.setattr(puncher, "_presumed_addresses", lambda: [LOCAL])
    assert puncher._acceptable([*unusable, LOCAL, PUBLIC]) == [LOCAL, PUBLIC]
    many = [TcpAddress("ip4", "1.1.1.1", port) for port in range(1, 20)]
    assert puncher._acceptable(many) == many[: dcutr.MAX_PUNCHED]


@pytest.mark.parametrize("message", [b"\x02\xff\xff", prefixed(HolePunch(type=HolePunch.SYNC).SerializeToString())])
async def test_malformed_messages_end_it(three: Three, message: bytes) -> None:
    _, private, other = three
    stream = await private.host.open_stream(other.id, PROTOCOL)
    await stream.write(message)
    with trio.fail_after(5), pytest.raises((EndOfStream, StreamReset)):
        await stream.read(1)
    assert other.host.handler_failures == 0
    await exchange(private.host, other.id)


async def test_only_who_was_dialled_speaks_first(three: Three) -> None:
    _, private, other = three
    stream = await other.host.open_stream(private.id, PROTOCOL)
    with trio.fail_after(5), pytest.raises((EndOfStream, StreamReset)):
        await stream.read(1)


async def test_no_holes_for_direct_connections() -> None:
    async with (
        open_several(1) as (direct,),
        open_traversing(7, listen=[ANY], config=NetworkConfig()) as node,
    ):
        await direct.host.dial(node.id, [address_of(node)])
        stream = await direct.host.open_stream(node.id, PROTOCOL)
        with trio.fail_after(5), pytest.raises((EndOfStream, StreamReset)):
            await stream.read(1)


async def test_who_dials_only_whom_it_is_told_neither_dials_back_nor_punches() -> None:
    async with open_traversing(7, config=NetworkConfig(named_only=True)) as node:
        assert {PROTOCOL, autonat.PROTOCOL}.isdisjoint(node.host.protocols)
        assert {HOP, STOP} <= set(node.host.protocols)
