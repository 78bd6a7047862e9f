"""Which of the addresses that peers tell us are dialled."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio

from aci_p2p.network import PeerUnreachable
from aci_p2p.network.libp2p import identify, kademlia
from aci_p2p.network.libp2p.addresses import Scope, TcpAddress, believable, homes_of, scope_of
from aci_p2p.network.libp2p.connections import Connection
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.network import Libp2pNetwork
from aci_p2p.network.libp2p.upstream import Identify as Identity
from aci_p2p.network.libp2p.upstream import KademliaMessage as KadMessage
from aci_p2p.network.libp2p.varint import prefixed, read_prefixed
from aci_p2p.network.libp2p.yamux import YamuxStream
from aci_p2p.protocol.identity import NodeId
from aci_p2p.tasks import open_background
from tests.network.driver import STRANGER, Opener, eventually, make_key

ATTACKER = make_key(50)


def at(host: str, port: int = 4001) -> TcpAddress:
    return TcpAddress("ip6" if ":" in host else "ip4", host, port)


def somewhere(_ip: str) -> str:
    """The source of whoever dials us: on the Internet."""
    return "8.8.8.8"


HERE, LAN, NET = at("127.0.0.1"), at("192.168.1.1"), at("8.8.8.8")
HERE6, LAN6, NET6 = at("::1"), at("fe80::1"), at("2606:4700::1")
EVERYTHING = [HERE, LAN, NET, HERE6, LAN6, NET6]


@pytest.mark.parametrize(
    ("ip", "scope"),
    [
        ("127.0.0.1", Scope.LOOPBACK),
        ("127.8.9.1", Scope.LOOPBACK),
        ("::1", Scope.LOOPBACK),
        ("::ffff:127.0.0.1", Scope.LOOPBACK),
        ("10.0.0.1", Scope.PRIVATE),
        ("172.16.0.1", Scope.PRIVATE),
        ("169.254.169.254", Scope.PRIVATE),
        ("100.64.0.1", Scope.PRIVATE),
        ("fe80::1", Scope.PRIVATE),
        ("fd00::1", Scope.PRIVATE),
        ("::ffff:10.0.0.1", Scope.PRIVATE),
        ("8.8.8.8", Scope.PUBLIC),
        ("2606:4700::1", Scope.PUBLIC),
        ("0.0.0.0", None),  # noqa: S104 - not listened at
        ("::", None),
        ("224.0.0.1", None),
        ("ff02::1", None),
        ("255.255.255.255", None),
        ("::ffff:0.0.0.0", None),
    ],
)
def test_scopes(ip: str, scope: Scope | None) -> None:
    assert scope_of(ip) is scope
    assert at(ip).scope is scope


def test_a_node_on_the_internet_believes_public_addresses_of_those_who_are_there() -> None:
    homes = homes_of([HERE, LAN, NET, NET6])
    assert homes == {"ip4": Scope.PUBLIC, "ip6": Scope.PUBLIC}
    assert believable(EVERYTHING, Scope.PUBLIC, homes) == [NET, NET6]
    # One in the same local network knows who else is there.
    assert believable(EVERYTHING, Scope.PRIVATE, homes) == [LAN, NET, LAN6, NET6]
    assert believable(EVERYTHING, Scope.LOOPBACK, homes) == EVERYTHING


def test_a_node_in_a_local_network_believes_that_others_are_there() -> None:
    # Behind a NAT, with addresses of the Internet in IPv6 alone.
    homes = homes_of([HERE, LAN, LAN6, NET6])
    assert believable(EVERYTHING, Scope.PUBLIC, homes) == [LAN, NET, NET6]


def test_a_node_on_loopback_does_not_knock_on_itself_for_those_elsewhere() -> None:
    for own in ([], [HERE, HERE6]):
        assert believable(EVERYTHING, Scope.PUBLIC, homes_of(own)) == [NET, NET6]
        assert believable(EVERYTHING, Scope.LOOPBACK, homes_of(own)) == EVERYTHING


def test_nobody_is_believed_to_be_everywhere() -> None:
    nowhere = [at("0.0.0.0"), at("224.0.0.1"), at("::")]  # noqa: S104 - not listened at
    assert believable(nowhere, Scope.LOOPBACK, homes_of(EVERYTHING)) == []


def test_the_relay_of_a_circuit_and_names_are_judged_too() -> None:
    circuits = [one.through(STRANGER) for one in EVERYTHING]
    names = [TcpAddress("dns4", "example.org", 1)]
    assert believable([*circuits, *names], Scope.PUBLIC, {}) == [circuits[2], circuits[5], *names]


@pytest.mark.parametrize(
    ("source", "relay", "scope"),
    [
        ("loopback", None, Scope.LOOPBACK),
        ("192.168.1.7", None, Scope.PRIVATE),
        ("8.8.8.8", None, Scope.PUBLIC),
        ("fe80::/64", None, Scope.PRIVATE),
        ("2606:4700::/64", None, Scope.PUBLIC),
        ("loopback", STRANGER, Scope.PUBLIC),
        (f"relay {STRANGER}", STRANGER, Scope.PUBLIC),
    ],
)
def test_where_a_peer_is(source: str, relay: NodeId | None, scope: Scope) -> None:
    connection = Connection(STRANGER, None, True, HERE, source, 0.0, relay)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType] # noqa: FBT003
    assert connection.scope is scope


async def test_without_a_teller_it_was_the_farthest_of_all_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_background() as nursery:
        host, near, far = (Host(make_key(number), nursery) for number in (1, 2, 3))
        await host.listen(at("127.0.0.1", 0))
        assert host.believed(EVERYTHING) == EVERYTHING
        await near.dial(host.node_id, host.addresses)
        assert host.believed(EVERYTHING) == EVERYTHING
        monkeypatch.setattr("aci_p2p.network.libp2p.host.source_of", somewhere)
        await far.dial(host.node_id, host.addresses)
        assert host.believed(EVERYTHING) == host.believed(EVERYTHING, far.node_id) == [NET, NET6]
        assert host.believed(EVERYTHING, near.node_id) == EVERYTHING
        assert host.believed(EVERYTHING, STRANGER) == [NET, NET6]


async def test_a_peer_elsewhere_cannot_make_us_dial_our_neighbours(
    monkeypatch: pytest.MonkeyPatch, open_libp2p: Opener
) -> None:
    """Neither by what it says of itself nor by what it says of others."""
    raw = [address.to_bytes() for address in EVERYTHING]
    third, fourth = (make_key(number).node_id for number in (51, 52))

    async def introduce(_peer: NodeId, stream: YamuxStream) -> None:
        said = Identity(protocols=[kademlia.PROTOCOL], listen_addrs=raw)
        await stream.write(prefixed(said.SerializeToString()))

    async def answer(_peer: NodeId, stream: YamuxStream) -> None:
        request = KadMessage.FromString(await read_prefixed(stream, 4096))
        closer = [KadMessage.Peer(id=peer.peer_id, addrs=raw) for peer in (STRANGER, third)]
        said = KadMessage(type=request.type, key=request.key, closerPeers=closer[:1], providerPeers=closer[1:])
        await stream.write(prefixed(said.SerializeToString()))

    dialled: set[TcpAddress] = set()

    async def dial_nobody(_peer: NodeId, addresses: Sequence[TcpAddress]) -> Connection:
        await trio.lowlevel.checkpoint()
        dialled.update(addresses)
        msg = "not dialled in earnest"
        raise PeerUnreachable(msg)

    monkeypatch.setattr("aci_p2p.network.libp2p.host.source_of", somewhere)
    async with open_libp2p(1) as victim, open_background() as nursery:
        assert isinstance(victim, Libp2pNetwork)
        monkeypatch.setattr(victim._host.dialler, "_dial_each", dial_nobody)
        attacker = Host(ATTACKER, nursery)
        with attacker.serve(identify.PROTOCOL, introduce), attacker.serve(kademlia.PROTOCOL, answer):
            await attacker.dial(victim.node_id, [TcpAddress.parse(victim.addresses[0])])
            await eventually(lambda: victim._host.known(ATTACKER.node_id))
            assert list(await victim.find_providers(bytes(32), 10)) == [third]
            stream = await attacker.open_stream(victim.node_id, kademlia.PROTOCOL)
            ourselves = KadMessage.Peer(id=ATTACKER.node_id.peer_id, addrs=raw)
            claim = KadMessage(type=KadMessage.ADD_PROVIDER, key=b"\x12\x20" + bytes(32), providerPeers=[ourselves])
            ping = prefixed(KadMessage(type=KadMessage.PING).SerializeToString())
            await stream.write(prefixed(claim.SerializeToString()) + ping)
            await stream.read(100)
        victim.learn_addresses(fourth, [str(address) for address in EVERYTHING])
        for peer in (ATTACKER.node_id, STRANGER, third, fourth):
            assert set(victim._host.known(peer)) == {NET, NET6}
        assert dialled == {NET, NET6}
