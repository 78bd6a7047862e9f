"""Settings that hold multiaddrs take what the transport takes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aci_p2p.config.addresses import can_be_dialled, can_be_joined_through, can_be_listened_on
from aci_p2p.dht.bootstrap import DnsAddress
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import KeyPair

ONE, OTHER = (str(KeyPair(bytes([number]) * 32).node_id) for number in (1, 2))
PARTS = (
    "ip4", "ip6", "dns", "dns4", "dns6", "dnsaddr", "tcp", "udp", "p2p", "p2p-circuit", "192.0.2.1", "::", "::1",
    "fe80::1%eth0", "boot.example", "_dnsaddr", "a b", "-", "a" * 254, "0", "1", "01", "65535", "65536", "99999", "",
    ONE, OTHER, f"{ONE}x",
)  # fmt: skip
"""What addresses are made of, and what they are not."""


def parsed(address: str) -> TcpAddress | None:
    """What the transport makes of an address."""
    try:
        return TcpAddress.parse(address)
    except LocalError:
        return None


def is_dnsaddr(address: str) -> bool:
    """What discovery makes of an address."""
    try:
        return DnsAddress.parse(address) is not None
    except LocalError:
        return False


hosts = st.sampled_from(
    ["ip4/192.0.2.1", "ip4/::1", "ip6/::1", "ip6/fe80::1%eth0", "dns/boot.example", "dns4/-", "dnsaddr/boot.example"]
)
tails = st.sampled_from(
    ["", f"/p2p/{ONE}", f"/p2p/{ONE}x", f"/p2p/{ONE}/p2p-circuit", f"/p2p/{ONE}/p2p-circuit/p2p/{OTHER}",
     f"/p2p/{ONE}/p2p-circuit/p2p/{ONE}", "/p2p", "/"]
)  # fmt: skip
likely = st.builds("/{}/tcp/{}{}".format, hosts, st.sampled_from(["0", "1", "01", "65535", "65536"]), tails)
unlikely = st.lists(st.sampled_from(PARTS), max_size=9).map(lambda parts: "/" + "/".join(parts))


@given(likely | unlikely | st.text(max_size=20))
@example(f"/dns/{'a' * 600}/tcp/1")
@example(f"/dns/{'a' * 253}/tcp/1/p2p/{ONE}/p2p-circuit/p2p/{OTHER}")
@example(f"/dnsaddr/boot.example/p2p/{ONE}")
@example(f"/dnsaddr/boot.example/p2p/{ONE}x")
def test_what_is_taken_is_what_the_transport_takes(address: str) -> None:
    tcp = parsed(address) if len(address) <= 512 else None
    dials = tcp is not None and tcp.port > 0
    assert can_be_listened_on(address) == (tcp is not None and tcp.is_ip and tcp.relay is None)
    assert can_be_dialled(address) == dials
    assert can_be_joined_through(address) == (dials or is_dnsaddr(address))


@pytest.mark.parametrize(
    ("fits", "address"),
    [
        (can_be_listened_on, "/ip4/127.0.0.1/tcp/0"),
        (can_be_listened_on, f"/ip6/::/tcp/9400/p2p/{ONE}"),
        (can_be_dialled, f"/ip4/192.0.2.1/tcp/9400/p2p/{ONE}/p2p-circuit"),
        (can_be_joined_through, "/dns4/boot.example/tcp/9400"),
        (can_be_joined_through, f"/dnsaddr/_boot.example/p2p/{ONE}"),
    ],
)
def test_addresses_of_each_use(fits: Callable[[str], bool], address: str) -> None:
    assert fits(address)
