"""Multiaddrs of TCP endpoints: parsing, and what of ours is worth telling others."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from libp2p.utils.address_validation import get_available_interfaces
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_ADDRESS_TEXT = 512
"""Characters of a multiaddr that we are willing to parse."""
_HOST_PROTOCOLS = {"ip4", "ip6", "dns", "dns4", "dns6"}
_HINT = "it looks like /ip4/192.0.2.1/tcp/4001/p2p/12D3KooW..."


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """Where a TCP listener is, and who is expected there."""

    protocol: str
    """`ip4`, `ip6`, `dns`, `dns4` or `dns6`."""
    host: str
    """IP address or host name."""
    port: int
    """TCP port; 0 only for listening."""
    peer: NodeId | None
    """Whose it is, when the address says."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT[/p2p/ID]`; raises LocalError for anything else."""
        if len(text) > MAX_ADDRESS_TEXT:
            msg = "the address is too long"
            raise LocalError(msg)
        try:
            canonical = str(Multiaddr(text))
        except (MultiaddrError, ValueError, TypeError) as error:
            msg = f"{text!r} is not a multiaddr"
            raise LocalError(msg, hint=_HINT) from error
        match canonical.split("/"):
            case ["", protocol, host, "tcp", port] if protocol in _HOST_PROTOCOLS:
                return cls(protocol, host, int(port), None)
            case ["", protocol, host, "tcp", port, "p2p", peer] if protocol in _HOST_PROTOCOLS:
                return cls(protocol, host, int(port), NodeId.parse(peer))
            case _:
                msg = f"{text!r} is not a TCP address"
                raise LocalError(msg, hint=_HINT)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Read the binary form that libp2p messages carry; raises LocalError when it is malformed."""
        try:
            text = str(Multiaddr(raw))
        except (MultiaddrError, ValueError, TypeError) as error:
            msg = "not a binary multiaddr"
            raise LocalError(msg) from error
        return cls.parse(text)

    def to_bytes(self) -> bytes:
        """The binary form, without the peer."""
        return Multiaddr(self.transport).to_bytes()

    @property
    def transport(self) -> str:
        """The address without the peer."""
        return f"/{self.protocol}/{self.host}/tcp/{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on the same machine can dial it."""
        return self.protocol in {"ip4", "ip6"} and ipaddress.ip_address(self.host).is_loopback

    def owned_by(self, peer: NodeId) -> str:
        """The full address with `/p2p/`."""
        return f"{self.transport}/p2p/{peer}"

    def __str__(self) -> str:
        return self.transport if self.peer is None else self.owned_by(self.peer)


def expand_unspecified(protocol: str, host: str, port: int) -> list[TcpAddress]:
    """A bound address as others can dial it: `0.0.0.0` and `::` stand for every interface of the machine."""
    if not ipaddress.ip_address(host).is_unspecified:
        return [TcpAddress(protocol, host, port, None)]
    interfaces = (TcpAddress.parse(str(address)) for address in get_available_interfaces(port))
    return [address for address in interfaces if address.protocol == protocol]


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
