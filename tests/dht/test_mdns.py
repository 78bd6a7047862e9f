"""mDNS: what is sent, what is believed, and two nodes that find each other."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from random import Random
from types import SimpleNamespace
from typing import Final, cast

import dns.message
import dns.rdatatype
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.dht import mdns
from aci_p2p.dht.mdns import (
    MAX_FOUND,
    SERVICE,
    addresses_in,
    decode,
    encode_answer,
    encode_question,
    is_question,
    open_mdns,
)
from aci_p2p.network import Network
from aci_p2p.network.memory import MemoryHub
from aci_p2p.protocol.identity import NodeId
from tests.network.driver import make_key, open_on

OWN: Final = make_key(1).node_id
OTHER: Final = make_key(2).node_id
GROUP: Final = ("239.255.77.53", 53_535)
"""A group for tests, so that nobody else answers."""
LOOPBACK: Final = "127.0.0.1"


def at(peer: NodeId, number: int = 1) -> str:
    return f"/ip4/192.168.0.1/tcp/{number}/p2p/{peer}"


def read(packet: bytes) -> dns.message.Message:
    message = decode(packet)
    assert message is not None
    return message


def test_a_question() -> None:
    message = read(encode_question())
    assert is_question(message)
    assert (message.id, [(str(one.name), one.rdtype) for one in message.question]) == (
        0, [("_p2p._udp.local.", dns.rdatatype.PTR)],
    )  # fmt: skip
    assert addresses_in(message, OWN) == []
    # One that wants its answer for itself, and one for another service.
    assert is_question(read(encode_question()[:-2] + b"\x80\x01"))
    assert not is_question(dns.message.make_query("_ipp._tcp.local.", dns.rdatatype.PTR))
    assert not is_question(dns.message.make_query(SERVICE, dns.rdatatype.A))


def test_an_answer() -> None:
    packet = encode_answer("random", [at(OTHER, number) for number in range(1, 9)])
    message = read(packet)
    assert not is_question(message)
    assert addresses_in(message, OWN) == [at(OTHER, number) for number in range(1, 9)]
    assert addresses_in(message, OTHER) == []
    assert len(packet) < 1_500
    (pointer,) = message.answer
    assert pointer.to_text() == f"{SERVICE} 120 IN PTR random.{SERVICE}"


def test_an_answer_with_the_bit_that_flushes_caches() -> None:
    """As others set it (RFC 6762 section 10.2)."""
    packet = encode_answer("random", [at(OTHER)])
    flushing = packet.replace(b"\x00\x10\x00\x01\x00\x00\x00\x78", b"\x00\x10\x80\x01\x00\x00\x00\x78")
    assert flushing != packet
    assert addresses_in(read(flushing), OWN) == [at(OTHER)]


def test_what_is_not_believed() -> None:
    texts = ["nonsense", "/ip4/192.168.0.1/tcp/1", at(OTHER)[:-1] + "!", at(OWN), at(OTHER), at(OTHER), "x" * 240]
    assert addresses_in(read(encode_answer("random", texts)), OWN) == [at(OTHER)]
    many = [at(OTHER, number) for number in range(1, 2 * MAX_FOUND)]
    assert addresses_in(read(encode_answer("random", many)), OWN) == many[:MAX_FOUND]
    # Too long for a TXT string.
    assert encode_answer("random", [at(OTHER), "x" * 250]) == encode_answer("random", [at(OTHER)])


@given(st.binary(max_size=300) | st.binary(max_size=60).map(lambda tail: encode_answer("r", [at(OTHER)])[:40] + tail))
def test_no_packet_does_harm(packet: bytes) -> None:
    message = decode(packet)
    if message is not None:
        is_question(message)
        assert len(addresses_in(message, OWN)) <= MAX_FOUND


async def test_all_addresses_of_a_node_are_learnt_together() -> None:
    """What is learnt of a node replaces what was known."""
    third = make_key(3).node_id
    packets = [encode_answer("random", [at(OTHER, 1), at(third, 2), at(OTHER, 3)])]
    learnt: dict[NodeId, Sequence[str]] = {}

    async def recvfrom(_limit: int) -> tuple[bytes, None]:
        await trio.lowlevel.checkpoint()
        return packets.pop(), None

    sock = cast("trio.socket.SocketType", SimpleNamespace(recvfrom=recvfrom))
    network = cast("Network", SimpleNamespace(node_id=OWN, learn_addresses=learnt.__setitem__))
    with pytest.raises(IndexError):
        await mdns._Mdns(network, lambda _addresses: None, Random(1)).listen(sock, GROUP)  # noqa: S311
    assert learnt == {OTHER: [at(OTHER, 1), at(OTHER, 3)], third: [at(third, 2)]}


def multicast_works() -> bool:
    """Whether this machine hears itself by multicast on loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            own = socket.inet_aton(LOOPBACK)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP[0]) + own)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, own)
            sock.bind(("", GROUP[1]))
            sock.settimeout(1)
            sock.sendto(b"x", GROUP)
            return sock.recv(1) == b"x"
        except OSError:
            return False


@pytest.mark.skipif(not multicast_works(), reason="no multicast on loopback")
async def test_two_nodes_find_each_other(hub: MemoryHub) -> None:
    found: dict[NodeId, set[str]] = {OWN: set(), OTHER: set()}
    async with (
        open_on(hub, 1) as a,
        open_on(hub, 2) as b,
        open_mdns(a, found[OWN].update, Random(1), group=GROUP, interface=LOOPBACK),  # noqa: S311
        open_mdns(b, found[OTHER].update, Random(2), group=GROUP, interface=LOOPBACK),  # noqa: S311
    ):
        with trio.fail_after(5):
            while not (found[OWN] and found[OTHER]):  # noqa: ASYNC110 - no event comes
                await trio.sleep(0.01)
        assert found == {OWN: set(b.addresses), OTHER: set(a.addresses)}
        # Each is known where it says it is.
        assert await a.connect(f"/p2p/{OTHER}") == OTHER


@pytest.mark.skipif(not multicast_works(), reason="no multicast on loopback")
async def test_a_flood_is_mostly_not_read(hub: MemoryHub, monkeypatch: pytest.MonkeyPatch) -> None:
    read, answers = 0, 0

    def count(packet: bytes) -> dns.message.Message | None:
        nonlocal read
        read += 1
        return decode(packet)

    monkeypatch.setattr(mdns, "decode", count)
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(LOOPBACK))
        async with (
            open_on(hub, 1) as a,
            open_mdns(a, lambda _addresses: None, Random(1), group=GROUP, interface=LOOPBACK),  # noqa: S311
        ):
            for _ in range(300):
                await sock.sendto(encode_question(), GROUP)
                answers += 1
            await trio.sleep(0.3)
    assert 0 < read <= mdns.BURST + 5


async def test_a_machine_without_multicast(
    hub: MemoryHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_arguments: object) -> None:
        raise OSError(errno.ENODEV, "no such device")

    monkeypatch.setattr(mdns, "_join_group", fail)
    async with (
        open_on(hub, 1) as a,
        open_mdns(a, lambda _addresses: None, Random(1), group=GROUP),  # noqa: S311
    ):
        pass
    assert "no mDNS on this machine" in caplog.text
