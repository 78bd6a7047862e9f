"""What peers tell of themselves, at first and when it changes; and the ping that others ask for."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from aci_p2p.network import NetworkConfig
from aci_p2p.network.libp2p import identify, open_libp2p_network, ping
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.identify import MAX_AGENT_TEXT, MAX_PROTOCOLS, PROTOCOL, PUSH_PROTOCOL, Identify, Identity
from aci_p2p.network.libp2p.upstream import Identify as Message
from aci_p2p.network.libp2p.varint import prefixed
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset
from aci_p2p.protocol.identity import NodeId
from aci_p2p.tasks import open_background
from aci_p2p.version import SOFTWARE
from tests.network.attack import Victim
from tests.network.driver import ECHO, PATIENCE_S, Opener, echo, eventually, make_key, select_record, validate_record

LOOPBACK = TcpAddress("ip4", "127.0.0.1", 0)
ELSEWHERE = TcpAddress("ip4", "198.51.100.7", 4001)


class Node:
    """A host that identifies itself and notes what others say."""

    def __init__(self, host: Host, told: Identify) -> None:
        self.host = host
        self.identify = told
        self.heard: list[tuple[NodeId, Identity]] = []
        self.silent: list[NodeId] = []
        told.on_identified.append(lambda peer, identity: self.heard.append((peer, identity)))
        told.on_silent.append(self.silent.append)


@asynccontextmanager
async def nodes(count: int) -> AsyncGenerator[list[Node]]:
    """Nodes that listen on loopback and are connected to the first."""
    async with open_background() as nursery, AsyncExitStack() as stack:
        opened: list[Node] = []
        for number in range(1, count + 1):
            host = Host(make_key(number), nursery)
            node = Node(host, Identify(host, nursery))
            stack.enter_context(host.serve(PROTOCOL, node.identify.serve))
            stack.enter_context(host.serve(PUSH_PROTOCOL, node.identify.serve_push))
            stack.enter_context(host.serve(ping.PROTOCOL, ping.serve_ping))
            await host.listen(LOOPBACK)
            nursery.start_soon(node.identify.run)
            opened.append(node)
        for node in opened[1:]:
            await node.host.dial(opened[0].host.node_id, opened[0].host.addresses)
        await eventually(lambda: all(node.heard for node in opened))
        yield opened


async def test_both_sides_say_who_they_are() -> None:
    async with nodes(2) as (a, b):
        await eventually(lambda: a.heard and b.heard)
        ((who, identity),) = b.heard
        assert who == a.host.node_id
        assert identity.protocols == {PROTOCOL, PUSH_PROTOCOL, ping.PROTOCOL}
        assert identity.addresses == tuple(a.host.addresses)
        assert identity.agent == SOFTWARE
        (connection,) = a.host.connections.all
        assert connection.agent == SOFTWARE
        # The port is the one that the dialler's kernel chose.
        assert identity.observed == connection.place
        assert a.heard[0][1].observed == a.host.addresses[0]
        assert b.identify.identity(who) == identity


async def test_what_changes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identify, "SETTLE_SECONDS", 0.05)
    async with nodes(3) as (a, b, c):
        with a.host.serve("/test/one/1", ping.serve_ping), a.host.serve("/test/two/1", ping.serve_ping):
            a.host.announce("test", [ELSEWHERE])
            await eventually(lambda: len(b.heard) == len(c.heard) == 2)
            for node in (b, c):
                _, identity = node.heard[-1]
                assert {"/test/one/1", "/test/two/1", PROTOCOL} <= identity.protocols
                assert ELSEWHERE in identity.addresses
                assert ELSEWHERE in node.host.known(a.host.node_id)
        await eventually(lambda: len(b.heard) == len(c.heard) == 3)
        assert "/test/one/1" not in b.heard[-1][1].protocols
        # What has come and gone in the meantime is no news.
        with a.host.serve("/test/three/1", ping.serve_ping):
            pass
        await trio.sleep(0.2)
        assert len(b.heard) == 3
        assert not b.silent


async def test_push_that_leaves_out_what_has_not_changed() -> None:
    async with nodes(2) as (a, b):
        stream = await a.host.open_stream(b.host.node_id, PUSH_PROTOCOL)
        await stream.write(prefixed(Message(protocols=["/test/new/1"]).SerializeToString()))
        await eventually(lambda: len(b.heard) == 2)
        before, after = (identity for _, identity in b.heard)
        assert after.protocols == {"/test/new/1"}
        assert (after.addresses, after.agent, after.observed) == (before.addresses, SOFTWARE, before.observed)


async def test_what_a_peer_says_is_bounded() -> None:
    async with nodes(2) as (a, b):
        stream = await a.host.open_stream(b.host.node_id, PUSH_PROTOCOL)
        message = Message(
            protocols=[f"/test/{number}" for number in range(3 * MAX_PROTOCOLS)],
            agent_version="\x1b[2J" + "x" * 3 * MAX_AGENT_TEXT,
            listen_addrs=[b"nonsense", *(TcpAddress("ip4", "192.0.2.1", n).to_bytes() for n in range(1, 50))],
            observed_addr=b"nonsense",
        )
        await stream.write(prefixed(message.SerializeToString()))
        await eventually(lambda: len(b.heard) == 2)
        identity = b.heard[-1][1]
        assert len(identity.protocols) == MAX_PROTOCOLS
        assert identity.agent == "[2J" + "x" * (MAX_AGENT_TEXT - 4)
        assert len(identity.addresses) == 8


async def test_bad_push_harms_nobody(victim: Victim) -> None:
    async with victim.attacked_by_host() as attacker:
        for garbage in (b"\xff" * 20, prefixed(b"\xff" * 100), prefixed(bytes(identify.MAX_IDENTIFY_BYTES + 1))):
            stream = await attacker.open_stream(victim.network.node_id, PUSH_PROTOCOL)
            await stream.write(garbage)
            with pytest.raises((StreamReset, EndOfStream)), trio.fail_after(5):
                await stream.read(1)


async def test_what_is_known_of_a_peer_goes_with_it() -> None:
    async with nodes(2) as (a, b):
        assert b.identify.identity(a.host.node_id) is not None
        await a.host.throw_out(b.host.node_id)
        await eventually(lambda: b.identify.identity(a.host.node_id) is None)
        assert not b.identify._identities


async def test_announced_addresses_come_first(open_libp2p: Opener) -> None:
    config = NetworkConfig(announce=("/dns4/node.example/tcp/4001", "/ip4/198.51.100.7/tcp/4001"))
    rules = {"record_validator": validate_record, "record_selector": select_record}
    async with open_libp2p(2) as b, open_libp2p_network(make_key(1), config, **rules) as a:  # type: ignore[arg-type]
        assert [address.split("/p2p/")[0] for address in a.addresses[:2]] == list(config.announce)
        await a.connect(b.addresses[0])
        await eventually(lambda: b.known_peers() and len(b.known_peers()[0].addresses) == 3)
        assert set(b.known_peers()[0].addresses) == set(a.addresses)


async def test_pings_are_answered_until_they_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ping, "IDLE_SECONDS", 1.0)
    async with nodes(2) as (a, b):
        stream = await a.host.open_stream(b.host.node_id, ping.PROTOCOL)
        for number in range(4):
            payload = bytes([number]) * ping.PING_BYTES
            await stream.write(payload)
            assert await stream.read_exactly(ping.PING_BYTES) == payload
            await trio.sleep(0.4)
        with pytest.raises(EndOfStream), trio.fail_after(PATIENCE_S):
            await stream.read(1)


async def test_a_node_serves_ping(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as a, open_background() as nursery:
        asker = Host(make_key(2), nursery)
        await asker.dial(a.node_id, [TcpAddress.parse(a.addresses[0])])
        stream = await asker.open_stream(a.node_id, ping.PROTOCOL)
        await stream.write(bytes(ping.PING_BYTES))
        assert await stream.read_exactly(ping.PING_BYTES) == bytes(ping.PING_BYTES)


async def test_protocols_served_later_are_known_to_peers(open_libp2p: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identify, "SETTLE_SECONDS", 0.05)
    async with open_libp2p(1) as a, open_background() as nursery:
        host = Host(make_key(2), nursery)
        node = Node(host, Identify(host, nursery))
        with host.serve(PUSH_PROTOCOL, node.identify.serve_push), host.serve(PROTOCOL, node.identify.serve):
            await host.dial(a.node_id, [TcpAddress.parse(a.addresses[0])])
            await eventually(lambda: node.heard)
            assert ECHO not in node.heard[-1][1].protocols
            with a.serve(ECHO, echo):
                await eventually(lambda: ECHO in node.heard[-1][1].protocols)
