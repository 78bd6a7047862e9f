"""Finding a peer: names, several addresses at once, addresses that failed, whoever answers."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import ifaddr
import pytest
import trio
from trio.testing import MockClock

from aci_p2p.network import DialledOurselves, PeerUnreachable
from aci_p2p.network.libp2p import dialling, host, upgrade
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.libp2p.connections import Connection
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.secure import SecureChannel, Security
from aci_p2p.network.libp2p.yamux import Yamux
from aci_p2p.protocol.identity import NodeId
from aci_p2p.tasks import open_background
from tests.network.driver import PATIENCE_S, STRANGER, Opener, eventually, make_key

NOWHERE = TcpAddress("ip4", "127.0.0.1", 1)
"""Nobody listens there: refused at once."""


@asynccontextmanager
async def hosts(count: int) -> AsyncGenerator[list[Host]]:
    """Hosts that listen on loopback."""
    async with open_background() as nursery:
        opened = [Host(make_key(number), nursery) for number in range(1, count + 1)]
        for one in opened:
            await one.listen(TcpAddress("ip4", "127.0.0.1", 0))
        yield opened


@asynccontextmanager
async def silent() -> AsyncGenerator[TcpAddress]:
    """A listener that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await trio.lowlevel.checkpoint()
        yield TcpAddress("ip4", "127.0.0.1", listener.getsockname()[1])


def open_descriptors() -> int:
    """File descriptors of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def fake_names(monkeypatch: pytest.MonkeyPatch, **names: list[str]) -> list[socket.AddressFamily]:
    """Have the resolver know these names only; returns the families that it is asked for."""
    asked: list[socket.AddressFamily] = []

    async def getaddrinfo(host: str, port: int, *, family: socket.AddressFamily, type: int) -> list[object]:  # noqa: A002
        await trio.lowlevel.checkpoint()
        asked.append(family)
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(family, type, 6, "", (ip, port)) for ip in names[host]]

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    return asked


async def test_whoever_answers_is_found(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as a, open_libp2p(2) as b:
        bare = b.addresses[0].split("/p2p/")[0]
        assert await a.connect(bare) == b.node_id
        assert await a.connect(bare) == b.node_id
        assert [(one.peer, one.outbound) for one in a.connections()] == [(b.node_id, True)]
        await eventually(lambda: len(b.connections()) == 1)
        assert a.known_peers()[0].addresses == b.addresses


async def test_nobody_answers(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as a:
        with pytest.raises(PeerUnreachable, match="refused"):
            await a.connect(str(NOWHERE))
        assert (a.statistics().dials, a.statistics().dial_failures) == (1, 1)


async def test_we_are_not_a_peer(open_libp2p: Opener) -> None:
    async with open_libp2p(1) as a:
        for address in (a.addresses[0], a.addresses[0].split("/p2p/")[0]):
            with pytest.raises(DialledOurselves):
                await a.connect(address)
        await trio.sleep(0.05)
        assert not a.peers


async def test_peer_that_was_thrown_out_is_not_let_in_by_its_address() -> None:
    async with hosts(2) as (a, b):
        await a.throw_out(b.node_id)
        with pytest.raises(PeerUnreachable, match="thrown out"):
            await a.dialler.dial_anybody(b.addresses[0])
        assert not a.peers


async def test_two_ways_to_one_peer_make_one_connection() -> None:
    async with hosts(2) as (a, b):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(a.dialler.dial_anybody, b.addresses[0])
                nursery.start_soon(a.dial, b.node_id, b.addresses)
        await eventually(lambda: len(b.connections.all) == len(a.connections.all) == 1)


async def test_silent_address_holds_nothing_up() -> None:
    async with hosts(2) as (a, b), silent() as mute:
        with trio.fail_after(upgrade.HANDSHAKE_SECONDS / 2):
            connection = await a.dial(b.node_id, [mute, NOWHERE, *b.addresses])
        assert connection.place == b.addresses[0]
        assert a.known(b.node_id)[0] == b.addresses[0]
        assert len(b.connections.all) == 1


async def test_attempts_begin_one_after_the_other(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, float]] = []

    async def open_tcp(_host: str, port: int, _place: str) -> trio.SocketStream:
        begun.append((port, trio.current_time()))
        if port == 2:
            msg = "refused"
            raise PeerUnreachable(msg)
        return await trio.sleep_forever()

    monkeypatch.setattr(dialling, "_open_tcp", open_tcp)
    addresses = [TcpAddress("ip4", "192.0.2.1", port) for port in (1, 2, 3, 4)]
    async with hosts(1) as (a,):
        started = trio.current_time()
        with trio.move_on_after(0.6):
            await a.dial(STRANGER, addresses)
    # The second failed at once, so the third need not wait.
    assert [(port, at - started) for port, at in begun] == [
        (1, 0), (2, dialling.STAGGER_SECONDS), (3, dialling.STAGGER_SECONDS), (4, 2 * dialling.STAGGER_SECONDS)
    ]  # fmt: skip


async def test_all_addresses_of_a_name_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosts(2) as (a, b):
        port = b.addresses[0].port
        fake_names(monkeypatch, many=["::1", "127.0.0.9", "127.0.0.1"])
        connection = await a.dial(b.node_id, [TcpAddress("dns", "many", port)])
        assert str(connection.place) == f"/dns/many/tcp/{port}"
        assert connection.is_local


@pytest.mark.parametrize(
    ("protocol", "family"), [("dns", socket.AF_UNSPEC), ("dns4", socket.AF_INET), ("dns6", socket.AF_INET6)]
)
async def test_names_are_of_a_family(
    monkeypatch: pytest.MonkeyPatch, protocol: str, family: socket.AddressFamily
) -> None:
    async with hosts(1) as (a,):
        asked = fake_names(monkeypatch)
        with pytest.raises(PeerUnreachable, match="cannot be resolved: Name or service not known"):
            await a.dial(STRANGER, [TcpAddress(protocol, "nowhere", 1)])
    assert asked == [family]


async def test_families_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    async def open_tcp(host: str, _port: int, place: str) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        tried.append(host)
        raise PeerUnreachable(place)

    monkeypatch.setattr(dialling, "_open_tcp", open_tcp)
    async with hosts(1) as (a,):
        fake_names(monkeypatch, many=["::1", "::2", "::2", "10.0.0.1", "::3", *(f"10.0.1.{n}" for n in range(9))])
        with pytest.raises(PeerUnreachable, match=r"/dns/many/tcp/1 \(::1\); /dns/many/tcp/1 \(10\.0\.0\.1\)"):
            await a.dial(STRANGER, [TcpAddress("dns", "many", 1)])
    assert tried == ["::1", "10.0.0.1", "::2", "10.0.1.0", "::3", "10.0.1.1", "10.0.1.2", "10.0.1.3"]
    assert len(tried) == dialling.MAX_RESOLVED


async def test_resolver_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_: object, **__: object) -> list[object]:
        return await trio.sleep_forever()

    monkeypatch.setattr(dialling, "RESOLVE_SECONDS", 0.05)
    async with hosts(1) as (a,):
        monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
        with trio.fail_after(PATIENCE_S), pytest.raises(PeerUnreachable, match="in time"):
            await a.dial(STRANGER, [TcpAddress("dns", "slow", 1)])


async def test_address_that_failed_is_left_alone_and_the_peer_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[TcpAddress] = []
    try_address = dialling.Race._try_address

    async def watch(race: dialling.Race, address: TcpAddress) -> dialling.Reached | None:
        tried.append(address)
        return await try_address(race, address)

    monkeypatch.setattr(dialling.Race, "_try_address", watch)
    async with hosts(2) as (a, b):
        a.learn(b.node_id, [NOWHERE])
        with pytest.raises(PeerUnreachable, match="refused"):
            await a.dial(b.node_id)
        with pytest.raises(PeerUnreachable, match="all its addresses have failed lately"):
            await a.dial(b.node_id)
        assert tried == [NOWHERE]
        # Asked for by name, it is tried in any case.
        with pytest.raises(PeerUnreachable, match="refused"):
            await a.dial(b.node_id, [NOWHERE])
        assert tried == [NOWHERE, NOWHERE]
        a.learn(b.node_id, b.addresses, hearsay=True)
        assert (await a.dial(b.node_id)).place == b.addresses[0]
        assert tried == [NOWHERE, NOWHERE, b.addresses[0]]
        assert a.known(b.node_id) == (b.addresses[0], NOWHERE)


async def test_circuits_come_after_direct_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialling, "HEAD_START_SECONDS", 0.2)
    circuit = NOWHERE.through(make_key(7).node_id)
    async with hosts(2) as (a, b), silent() as mute:
        taken: list[tuple[NodeId, TcpAddress]] = []

        async def dial_circuit(peer: NodeId, address: TcpAddress) -> Connection:
            taken.append((peer, address))
            return await a.dialler.dial_direct(peer, b.addresses)

        with pytest.raises(PeerUnreachable, match="we use none"):
            await a.dial(b.node_id, [circuit])
        a.dialler.circuit = dial_circuit
        # A direct address that does not answer in time is not waited for.
        with trio.fail_after(upgrade.HANDSHAKE_SECONDS / 2):
            await a.dial(b.node_id, [circuit, mute])
        assert taken == [(b.node_id, circuit)]
    async with hosts(2) as (a, b):
        a.dialler.circuit = dial_circuit
        connection = await a.dial(b.node_id, [circuit, *b.addresses])
        assert connection.place == b.addresses[0]
        assert len(taken) == 1


@pytest.mark.parametrize(
    ("direct", "circuit_first"),
    [
        (["198.18.0.1"], True),
        (["198.18.0.1", "10.1.2.3"], True),
        (["fd00:5::9"], True),
        ([], True),
        (["198.18.0.1", "192.168.7.4"], False),
        (["10.8.200.1"], False),
        (["fd00:7::9"], False),
        (["127.0.0.1"], False),
        (["198.18.0.1", "8.8.8.8"], False),
        (["198.18.0.1", "boot.example"], False),
    ],
)
async def test_addresses_of_others_networks_hold_no_circuit_up(
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
    direct: list[str],
    circuit_first: bool,  # noqa: FBT001
) -> None:
    prefixes = {"127.0.0.1": 8, "192.168.7.1": 24, "10.8.0.1": 16, "fd00:7::1": 64}
    ips = [ifaddr.IP((ip, 0, 0) if ":" in ip else ip, prefix, "eth0") for ip, prefix in prefixes.items()]
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: [ifaddr.Adapter("eth0", "eth0", ips)])
    began: list[tuple[str, float]] = []

    async def refuse(host: str, _port: int, _place: str) -> trio.SocketStream:
        began.append((host, trio.current_time()))
        await trio.sleep(dialling.DIAL_SECONDS)
        raise PeerUnreachable(host)

    async def fake_resolve(address: TcpAddress) -> list[str]:
        await trio.lowlevel.checkpoint()
        return [address.host]

    async def dial_circuit(_peer: NodeId, _address: TcpAddress) -> Connection:
        began.append(("circuit", trio.current_time()))
        await trio.lowlevel.checkpoint()
        msg = "the relay is gone"
        raise PeerUnreachable(msg)

    monkeypatch.setattr(dialling, "_open_tcp", refuse)
    monkeypatch.setattr(dialling, "_resolve", fake_resolve)
    protocols = {host: "ip6" if ":" in host else "ip4" if host[-1].isdigit() else "dns" for host in direct}
    addresses = [TcpAddress(protocol, host, 1) for host, protocol in protocols.items()]
    start = trio.current_time()
    async with open_background() as nursery:
        one = Host(make_key(1), nursery)
        one.dialler.circuit = dial_circuit
        with pytest.raises(PeerUnreachable, match="the relay is gone"):
            await one.dial(STRANGER, [*addresses, NOWHERE.through(make_key(7).node_id)])
    # Tried they are in any case.
    assert {host for host, _ in began} == {"circuit", *direct}
    waited = dict(began)["circuit"] - start
    assert waited == pytest.approx(0.0 if circuit_first else dialling.HEAD_START_SECONDS)


async def test_connection_that_breaks_at_once_leads_to_the_next_address(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosts(2) as (a, b):
        await b.listen(TcpAddress("ip4", "127.0.0.1", 0))
        first, second = b.addresses

        async def break_first(secure: SecureChannel, place: str) -> Yamux:
            if place == first.transport:
                await secure.close()
                raise PeerUnreachable(place)
            return await upgrade.multiplex_outbound(secure, place)

        monkeypatch.setattr(host, "multiplex_outbound", break_first)
        assert (await a.dial(b.node_id, [first, second])).place == second


async def test_attempts_that_lost_leave_no_sockets() -> None:
    async with hosts(2) as (a, b), silent() as mute:
        before = open_descriptors()
        for _ in range(3):
            connection = await a.dial(b.node_id, [mute, NOWHERE, *b.addresses])
            await connection.muxer.close()
            await eventually(lambda: not a.peers)
            with trio.move_on_after(0.05) as scope:
                await a.dial(STRANGER, [mute, mute])
            assert scope.cancelled_caught
        await eventually(lambda: not b.peers and open_descriptors() <= before)


async def test_winner_of_a_race_that_is_cancelled_is_closed() -> None:
    class Recorded(SecureChannel):
        closed = False

        def __init__(self) -> None:
            """Without a connection underneath."""

        async def close(self) -> None:
            Recorded.closed = True
            await trio.lowlevel.checkpoint()

    async def win() -> dialling.Reached:
        await trio.lowlevel.checkpoint()
        scope.cancel()
        return dialling.Reached(Recorded(), NOWHERE, "loopback")

    with trio.CancelScope() as scope:
        await dialling.Race(Security(make_key(1)), None)._first([win])
    assert scope.cancelled_caught
    assert Recorded.closed


async def test_so_many_addresses_are_tried_at_once(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way = most = 0

    async def open_tcp(_host: str, _port: int, _place: str) -> trio.SocketStream:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            return await trio.sleep_forever()
        finally:
            under_way -= 1

    monkeypatch.setattr(dialling, "_open_tcp", open_tcp)
    async with hosts(1) as (a,):
        with trio.move_on_after(100 * dialling.STAGGER_SECONDS):
            await a.dial(STRANGER, [TcpAddress("ip4", "192.0.2.1", port) for port in range(1, 100)])
    assert (most, under_way) == (dialling.MAX_ATTEMPTS, 0)
