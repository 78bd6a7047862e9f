"""Varints, multiaddrs and protocol negotiation."""

from __future__ import annotations

import multiaddr  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.network.libp2p import addresses
from aci_p2p.network.libp2p.addresses import TcpAddress, expand_unspecified, most_useful, parse_all
from aci_p2p.network.libp2p.negotiation import NegotiationError, encode_message, select_inbound, select_outbound
from aci_p2p.network.libp2p.varint import (
    VarintError,
    encode_varint,
    prefixed,
    read_varint,
    split_prefixed,
    split_varint,
)
from aci_p2p.protocol.errors import LocalError
from tests.network.driver import make_key

PEER, RELAY = make_key(1).node_id, make_key(2).node_id


class Bytes:
    """A peer that says what it says."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.written = b""

    async def read_exactly(self, count: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if len(self._data) < count:
            raise EOFError
        data, self._data = self._data[:count], self._data[count:]
        return data

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.written += data


@given(st.integers(0, 2**63 - 1), st.binary(max_size=20))
def test_varint_round_trip(value: int, rest: bytes) -> None:
    assert split_varint(encode_varint(value) + rest) == (value, rest)


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 9, b"\xff" * 20])
def test_bad_varint(data: bytes) -> None:
    with pytest.raises(VarintError):
        split_varint(data)


@given(st.lists(st.binary(max_size=300)), st.integers(1, 50))
def test_prefixed_messages_round_trip_in_any_pieces(messages: list[bytes], size: int) -> None:
    data = b"".join(prefixed(message) for message in messages)
    buffer = bytearray()
    received: list[bytes] = []
    for start in range(0, len(data), size):
        buffer += data[start : start + size]
        while (message := split_prefixed(buffer, 300)) is not None:
            received.append(message)
    assert received == messages
    assert not buffer


@pytest.mark.parametrize("data", [encode_varint(301), b"\xff" * 9, b"\xff\xff\x03"])
def test_length_over_the_limit_is_refused_before_the_message(data: bytes) -> None:
    with pytest.raises(VarintError):
        split_prefixed(bytearray(data), 300)


async def test_varint_limit() -> None:
    assert await read_varint(Bytes(encode_varint(300)), 300) == 300
    with pytest.raises(VarintError):
        await read_varint(Bytes(encode_varint(301)), 300)
    with pytest.raises(VarintError):
        await read_varint(Bytes(b"\xff" * 20), 300)


ips = st.ip_addresses(v=4).map(lambda ip: ("ip4", str(ip))) | st.ip_addresses(v=6).map(lambda ip: ("ip6", str(ip)))
names = st.tuples(
    st.sampled_from(["dns", "dns4", "dns6"]), st.from_regex(r"[a-z][a-z0-9]{0,9}(\.[a-z]{2,9}){0,3}", fullmatch=True)
)


@given(ips | names, st.integers(1, 65_535))
def test_address_round_trip_and_agreement_with_the_reference(host: tuple[str, str], port: int) -> None:
    address = TcpAddress(*host, port)
    assert TcpAddress.parse(str(address)) == address
    assert TcpAddress.from_bytes(address.to_bytes()) == address
    reference = multiaddr.Multiaddr(str(address))
    assert address.to_bytes() == reference.to_bytes()
    owned = multiaddr.Multiaddr(address.owned_by(PEER))
    assert TcpAddress.from_bytes(owned.to_bytes()) == TcpAddress(*host, port, PEER)
    assert TcpAddress.parse(address.owned_by(PEER)).peer == PEER


@given(ips | names, st.integers(1, 65_535))
def test_circuit_address_round_trip_and_agreement_with_the_reference(host: tuple[str, str], port: int) -> None:
    relay = TcpAddress(*host, port, RELAY)
    circuit = relay.through(RELAY)
    assert circuit == TcpAddress(*host, port, None, RELAY)
    assert circuit.relay_address == relay
    for address in (circuit, TcpAddress(*host, port, PEER, RELAY)):
        assert TcpAddress.parse(str(address)) == address
        assert TcpAddress.from_bytes(multiaddr.Multiaddr(str(address)).to_bytes()) == address
    assert circuit.to_bytes() == multiaddr.Multiaddr(str(circuit)).to_bytes()
    assert circuit.owned_by(PEER) == f"{relay}/p2p-circuit/p2p/{PEER}"


def test_direct_public_addresses_come_first_and_circuits_before_local_ones() -> None:
    local, link_local, loopback = (TcpAddress("ip4", host, 1) for host in ("10.0.0.1", "169.254.0.1", "127.0.0.1"))
    name, public = TcpAddress("dns", "node.example", 1), TcpAddress("ip4", "1.1.1.1", 1)
    circuit = TcpAddress("ip4", "1.1.1.2", 1).through(RELAY)
    mixed = [loopback, link_local, local, circuit, name, public]
    assert most_useful(mixed) == [name, public, circuit, local, link_local, loopback]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "nonsense",
        "/ip4/127.0.0.1",
        "/ip4/127.0.0.1/tcp",
        "/ip4/127.0.0.1/tcp/",
        "/ip4/127.0.0.1/tcp/65536",
        "/ip4/127.0.0.1/tcp/-1",
        "/ip4/127.0.0.1/tcp/01",
        "/ip4/127.0.0.1/tcp/4001/",
        "/ip4/127.0.0.1/udp/4001",
        "/ip4/127.0.0.1/tcp/4001/ws",
        "/ip4/::1/tcp/4001",
        "/ip6/127.0.0.1/tcp/4001",
        "/ip6/fe80::1%eth0/tcp/4001",
        "/ip4/localhost/tcp/4001",
        "/dns/-bad/tcp/4001",
        "/dns/" + "x" * 300 + "/tcp/4001",
        "/ip4/127.0.0.1/tcp/4001/p2p/QmNonsense",
        "/ip4/127.0.0.1/tcp/4001/p2p/" + "1" * 500,
        "/ip4/127.0.0.1/tcp/4001/p2p-circuit",
        f"/ip4/127.0.0.1/tcp/4001/p2p-circuit/p2p/{PEER}",
        f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}/p2p-circuit/p2p/{PEER}",
        f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}/p2p-circuit/p2p-circuit",
        f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}/p2p-circuit/p2p",
        f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}/p2p/{PEER}",
    ],
)
def test_bad_address(text: str) -> None:
    with pytest.raises(LocalError):
        TcpAddress.parse(text)


@given(st.binary(max_size=60))
def test_any_bytes_are_an_address_or_refused(raw: bytes) -> None:
    try:
        address = TcpAddress.from_bytes(raw)
    except LocalError:
        return
    assert TcpAddress.parse(str(address)) == address


def test_addresses_of_a_message_are_bounded_and_sifted() -> None:
    good = [TcpAddress("ip4", "192.0.2.1", port).to_bytes() for port in range(1, 20)]
    unusable = [b"", b"\xff" * 30, TcpAddress("ip4", "192.0.2.1", 0).to_bytes()]
    assert [address.port for address in parse_all([*unusable, *good], 8)] == list(range(1, 9))


def test_every_interface_stands_for_the_loopback_at_least() -> None:
    expanded = expand_unspecified("ip4", "0.0.0.0", 4001)  # noqa: S104 - what is tested
    assert TcpAddress("ip4", "127.0.0.1", 4001) in expanded
    assert all(address.protocol == "ip4" and address.host != "0.0.0.0" for address in expanded)  # noqa: S104
    assert expand_unspecified("ip4", "192.0.2.1", 4001) == [TcpAddress("ip4", "192.0.2.1", 4001)]


def test_loopback() -> None:
    assert TcpAddress("ip4", "127.0.0.53", 1).is_loopback
    assert TcpAddress("ip6", "::1", 1).is_loopback
    assert not TcpAddress("ip4", "192.0.2.1", 1).is_loopback
    assert not TcpAddress("dns", "localhost", 1).is_loopback
    assert addresses.MAX_HOST_TEXT < addresses.MAX_ADDRESS_TEXT


async def test_negotiation_outbound() -> None:
    peer = Bytes(encode_message("/multistream/1.0.0") + encode_message("/x/1"))
    await select_outbound(peer, "/x/1")
    assert peer.written == b"\x13/multistream/1.0.0\n\x05/x/1\n"


@pytest.mark.parametrize(
    "answer",
    [
        encode_message("/multistream/1.0.0") + encode_message("na"),
        encode_message("/multistream/2.0.0") + encode_message("/x/1"),
        encode_message("/multistream/1.0.0") + b"\x04/x/1",
    ],
)
async def test_negotiation_outbound_refused(answer: bytes) -> None:
    with pytest.raises(NegotiationError):
        await select_outbound(Bytes(answer), "/x/1")


async def test_negotiation_inbound() -> None:
    peer = Bytes(encode_message("/multistream/1.0.0") + encode_message("/y/1") + encode_message("/x/1"))
    assert await select_inbound(peer, {"/x/1"}) == "/x/1"
    assert peer.written == b"\x13/multistream/1.0.0\n\x03na\n\x05/x/1\n"


@pytest.mark.parametrize("hello", ["/multistream/0.1.0", "GET / HTTP/1.1"])
async def test_negotiation_inbound_refuses_other_protocols(hello: str) -> None:
    with pytest.raises(NegotiationError):
        await select_inbound(Bytes(encode_message(hello)), {"/x/1"})


async def test_negotiation_inbound_gives_up() -> None:
    peer = Bytes(encode_message("/multistream/1.0.0") + encode_message("/y/1") * 8 + encode_message("/x/1"))
    with pytest.raises(NegotiationError):
        await select_inbound(peer, {"/x/1"})


async def test_negotiation_reads_no_long_message() -> None:
    with pytest.raises(VarintError):
        await select_inbound(Bytes(encode_varint(257) + b"x" * 257), {"/x/1"})
