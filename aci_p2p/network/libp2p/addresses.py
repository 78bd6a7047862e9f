"""Multiaddrs of TCP endpoints, direct and through a relay, as text and as bytes.

Only the forms that this node can dial or listen at are understood: an IP address or host name, a TCP port, and
optionally whom to expect there, or which relay is there and whom it leads to.

Source: https://github.com/multiformats/multiaddr and its protocol table; for circuits
https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Self, TypeAlias, cast

import ifaddr

from aci_p2p.network.libp2p.upstream import get_available_interfaces
from aci_p2p.network.libp2p.varint import encode_varint, split_varint
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.publications import MAX_ADDRESSES

MAX_ADDRESS_TEXT = 512
"""Characters of a multiaddr that we are willing to parse."""
MAX_HOST_TEXT = 253
"""Characters of a host name (RFC 1035)."""

_CACHED = 1_024
"""Addresses whose parsed form is kept: every answer of the DHT names the same ones again."""

_IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_IpNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_IP_CODES = {"ip4": 4, "ip6": 41}
_NAME_CODES = {"dns": 53, "dns4": 54, "dns6": 55}
_PROTOCOLS = {code: protocol for protocol, code in {**_IP_CODES, **_NAME_CODES}.items()}
_IP_BYTES = {"ip4": 4, "ip6": 16}
_TCP_CODE = 6
_P2P_CODE = 421
_CIRCUIT_CODE = 290
_CIRCUIT = "p2p-circuit"
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")
_MAX_PORT = 65_535
_HINT = "it looks like /ip4/192.0.2.1/tcp/4001/p2p/12D3KooW..."


class Scope(IntEnum):
    """From where an address can be dialled; the narrower, the less."""

    LOOPBACK = 0
    """From the same machine."""
    PRIVATE = 1
    """From the same local network, or another that is not the Internet."""
    PUBLIC = 2
    """From everywhere."""


@lru_cache(_CACHED)
def scope_of(ip: str) -> Scope | None:
    """The scope of an IP address; None when nobody is there whom one could mean: unspecified, multicast, reserved."""
    address = ipaddress.ip_address(ip)
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_loopback:
        return Scope.LOOPBACK
    if address.is_unspecified or address.is_multicast or address.is_reserved:
        return None
    return Scope.PUBLIC if address.is_global else Scope.PRIVATE


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """Where a TCP listener is, and who is expected there or behind it."""

    protocol: str
    """`ip4`, `ip6`, `dns`, `dns4` or `dns6`."""
    host: str
    """IP address in its canonical form, or host name."""
    port: int
    """TCP port; 0 only for listening."""
    peer: NodeId | None = None
    """Whose address it is, when it says."""
    relay: NodeId | None = None
    """The relay that listens there and leads to the peer; None when the peer listens there itself."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a multiaddr; raises LocalError for anything but these.

        `/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT[/p2p/ID]`, or `.../tcp/PORT/p2p/RELAY/p2p-circuit[/p2p/ID]`.
        """
        if len(text) > MAX_ADDRESS_TEXT:
            msg = "the address is too long"
            raise LocalError(msg)
        match text.split("/"):
            case ["", protocol, host, "tcp", port, *rest] if _PORT.fullmatch(port):
                relay, peer = _parse_peers(rest, text)
                return cls(protocol, _canonical_host(protocol, host, text), _checked_port(port, text), peer, relay)
            case _:
                raise _not_an_address(text)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Read the binary form that libp2p messages carry; raises LocalError when it is anything else."""
        try:
            return cls._decode(raw[:MAX_ADDRESS_TEXT])
        except (ValueError, IndexError) as error:
            msg = "not the binary multiaddr of a TCP endpoint"
            raise LocalError(msg) from error

    @classmethod
    @lru_cache(_CACHED)
    def _decode(cls, raw: bytes) -> Self:
        code, rest = split_varint(raw)
        protocol = _PROTOCOLS.get(code, "")
        if protocol in _IP_BYTES:
            host, rest = str(ipaddress.ip_address(rest[: _IP_BYTES[protocol]])), rest[_IP_BYTES[protocol] :]
        else:
            length, rest = split_varint(rest)
            host, rest = rest[:length].decode("ascii"), rest[length:]
        code, rest = split_varint(rest)
        port, rest = int.from_bytes(rest[:2]), rest[2:]
        if code != _TCP_CODE:
            msg = "not TCP"
            raise ValueError(msg)
        suffix = ""
        while rest:
            code, rest = split_varint(rest)
            if code == _CIRCUIT_CODE:
                suffix += f"/{_CIRCUIT}"
                continue
            length, rest = split_varint(rest)
            if code != _P2P_CODE or length > len(rest):
                msg = "more than a TCP endpoint and peers"
                raise ValueError(msg)
            suffix += f"/p2p/{NodeId.from_peer_id(rest[:length])}"
            rest = rest[length:]
        return cls.parse(f"/{protocol}/{host}/tcp/{port}{suffix}")

    def to_bytes(self, owner: NodeId | None = None) -> bytes:
        """The binary form, with `/p2p/` only for an owner that is given; that of a circuit names the relay."""
        if self.protocol in _IP_CODES:
            host = encode_varint(_IP_CODES[self.protocol]) + ipaddress.ip_address(self.host).packed
        else:
            name = self.host.encode("ascii")
            host = encode_varint(_NAME_CODES[self.protocol]) + encode_varint(len(name)) + name
        endpoint = host + encode_varint(_TCP_CODE) + self.port.to_bytes(2)
        circuit = b"" if self.relay is None else _encode_peer(self.relay) + encode_varint(_CIRCUIT_CODE)
        return endpoint + circuit + (b"" if owner is None else _encode_peer(owner))

    @property
    def transport(self) -> str:
        """The address without the peer; that of a circuit names the relay."""
        endpoint = f"/{self.protocol}/{self.host}/tcp/{self.port}"
        return endpoint if self.relay is None else f"{endpoint}/p2p/{self.relay}/{_CIRCUIT}"

    @property
    def is_ip(self) -> bool:
        """Whether the host is an IP address and no name."""
        return self.protocol in _IP_CODES

    @property
    def is_global(self) -> bool:
        """Whether the host is an IP address to which the Internet routes; what a name stands for is not known."""
        return self.is_ip and ipaddress.ip_address(self.host).is_global

    @property
    def scope(self) -> Scope | None:
        """See `scope_of`; what a name stands for is not known, so it counts as public."""
        return scope_of(self.host) if self.is_ip else Scope.PUBLIC

    @property
    def relay_address(self) -> TcpAddress:
        """Of a circuit: where its relay can be dialled."""
        return TcpAddress(self.protocol, self.host, self.port, self.relay)

    def through(self, relay: NodeId) -> TcpAddress:
        """Of a relay's address: the circuit through it, to whomever it leads."""
        return TcpAddress(self.protocol, self.host, self.port, None, relay)

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on the same machine can dial it."""
        return self.protocol in _IP_CODES and ipaddress.ip_address(self.host).is_loopback

    def owned_by(self, peer: NodeId) -> str:
        """The full address with `/p2p/`."""
        return f"{self.transport}/p2p/{peer}"

    def __str__(self) -> str:
        return self.transport if self.peer is None else self.owned_by(self.peer)


def _encode_peer(peer: NodeId) -> bytes:
    return encode_varint(_P2P_CODE) + encode_varint(len(peer.peer_id)) + peer.peer_id


def _parse_peers(parts: list[str], text: str) -> tuple[NodeId | None, NodeId | None]:
    """The relay and the peer named after a TCP port."""
    match parts:
        case []:
            return None, None
        case ["p2p", peer]:
            return None, NodeId.parse(peer)
        case ["p2p", relay, "p2p-circuit"]:
            return NodeId.parse(relay), None
        case ["p2p", relay, "p2p-circuit", "p2p", peer] if relay != peer:
            return NodeId.parse(relay), NodeId.parse(peer)
        case _:
            raise _not_an_address(text)


def _not_an_address(text: str) -> LocalError:
    msg = f"{text!r} is not the multiaddr of a TCP endpoint"
    return LocalError(msg, hint=_HINT)


def _canonical_host(protocol: str, host: str, text: str) -> str:
    if protocol in _IP_CODES:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            address = None
        if address is not None and f"ip{address.version}" == protocol and "%" not in host:
            return str(address)
    elif protocol in _NAME_CODES and len(host) <= MAX_HOST_TEXT and _HOST_NAME.fullmatch(host):
        return host.lower()
    raise _not_an_address(text)


def _checked_port(port: str, text: str) -> int:
    if int(port) > _MAX_PORT:
        msg = f"{text!r} has no such port"
        raise LocalError(msg, hint=f"ports go up to {_MAX_PORT}")
    return int(port)


def expand_unspecified(protocol: str, host: str, port: int) -> list[TcpAddress]:
    """A bound address as others can dial it: `0.0.0.0` and `::` stand for every interface of the machine."""
    if not ipaddress.ip_address(host).is_unspecified:
        return [TcpAddress(protocol, host, port)]
    interfaces = [str(address) for address in cast("list[object]", get_available_interfaces(port))]
    return [TcpAddress.parse(address) for address in interfaces if address.startswith(f"/{protocol}/")]


def homes_of(own: Iterable[TcpAddress]) -> dict[str, Scope]:
    """Of each IP version, the widest scope of our own addresses."""
    homes: dict[str, Scope] = {}
    for address in own:
        if (scope := address.scope) is not None:
            homes[address.protocol] = max(scope, homes.get(address.protocol, scope))
    return homes


def believable(addresses: Iterable[TcpAddress], teller: Scope, homes: Mapping[str, Scope]) -> list[TcpAddress]:
    """Of the addresses that somebody in the scope `teller` told us, those that may be dialled; `homes`: see `homes_of`.

    They reach as far as the teller does, so that he may know them himself, or are of local networks and so are we: who
    is on the Internet cannot make a node there knock on its neighbours, and nobody far makes one knock on itself.
    """
    believed: list[TcpAddress] = []
    for address in addresses:
        scope = address.scope
        is_home = scope is Scope.PRIVATE is homes.get(address.protocol)
        if scope is not None and (scope >= teller or is_home):
            believed.append(address)
    return believed


def may_be_near(addresses: Iterable[TcpAddress]) -> bool:
    """Whether one of these is a name, routed by the Internet, or of a network in which this machine is, too."""
    hosts: list[_IpAddress] = []
    for address in addresses:
        if not address.is_ip or address.is_global:
            return True
        hosts.append(ipaddress.ip_address(address.host))
    networks = _own_networks() if hosts else []
    return any(host in network for host in hosts for network in networks)


def _own_networks() -> list[_IpNetwork]:
    """The networks of this machine's interfaces."""
    every = (one for adapter in ifaddr.get_adapters() for one in adapter.ips)
    # IPv6 addresses come with flow and scope.
    return [
        ipaddress.ip_network((one.ip if isinstance(one.ip, str) else one.ip[0], one.network_prefix), strict=False)
        for one in every
    ]


def most_useful(addresses: Iterable[TcpAddress]) -> list[TcpAddress]:
    """What a node with these addresses announces: at most MAX_ADDRESSES, those that most others can dial first.

    Names and globally routable addresses, then circuits, then addresses of local networks, then link-local ones. Of the
    loopback addresses, which other machines cannot use, one comes last if there is room, for nodes on the same machine;
    all of them if there are only such.
    """
    all_addresses = list(addresses)
    reachable = sorted((address for address in all_addresses if not address.is_loopback), key=_narrowness)
    loopback = [address for address in all_addresses if address.is_loopback]
    return [*reachable, *(loopback[:1] if reachable else loopback)][:MAX_ADDRESSES]


def _narrowness(address: TcpAddress) -> int:
    """The larger, the fewer machines can dial it, or the more it costs."""
    if address.relay is not None:
        return 1
    if not address.is_ip or address.is_global:
        return 0
    return 3 if ipaddress.ip_address(address.host).is_link_local else 2


def parse_all(raw_addresses: Iterable[bytes], limit: int) -> list[TcpAddress]:
    """The first `limit` well-formed, dialable addresses of a peer's message; the others are skipped."""
    addresses: list[TcpAddress] = []
    for raw in raw_addresses:
        if len(addresses) == limit:
            break
        try:
            address = TcpAddress.from_bytes(raw)
        except LocalError:
            continue
        if address.port:
            addresses.append(address)
    return addresses
