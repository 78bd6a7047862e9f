"""Settings that hold multiaddrs: their form is checked when they are read, before anything starts.

The transport's own parser has the last word; it is not asked here, since loading libp2p for it takes half a second in
commands that need no network.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from aci_p2p.config.kinds import BadItem, Texts
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId

MAX_ADDRESS_TEXT: Final = 512
"""Characters of a multiaddr; the longest host name and two peer ids fit."""
MAX_HOST_TEXT: Final = 253
"""Characters of a host name (RFC 1035)."""
MAX_PORT: Final = 65_535
"""The highest TCP port."""

_HOST_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_DNSADDR_NAME: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?")
_PORT: Final = re.compile(r"0|[1-9][0-9]{0,4}")


class Addresses(Texts):
    """A list of multiaddrs of one use."""

    metavar = "MULTIADDR"

    def __init__(self, use: str, example: str, fits: Callable[[str], bool]) -> None:
        """`use`: what the addresses are for, with "to"; `fits`: whether a text is one of them."""
        self._wanted = f"a multiaddr {use}, such as {example}"
        self._fits = fits

    def from_texts(self, texts: Sequence[str]) -> tuple[str, ...]:
        """From a flag that was repeated."""
        return self._checked(super().from_texts(texts))

    def from_toml(self, value: object, folder: Path) -> tuple[str, ...]:
        """An array of strings."""
        return self._checked(super().from_toml(value, folder))

    def _checked(self, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for address in addresses:
            if len(address) > MAX_ADDRESS_TEXT or not self._fits(address):
                raise BadItem(self._wanted, address)
        return addresses


def can_be_listened_on(address: str) -> bool:
    """Whether it is an IP address and a TCP port, 0 for any; who listens there may be said."""
    match address.split("/"):
        case ["", "ip4" | "ip6" as protocol, host, "tcp", port, *rest]:
            return _is_ip(protocol, host) and _is_port(port, least=0) and _names_owner(rest)
        case _:
            return False


def can_be_dialled(address: str) -> bool:
    """Whether it is a host and a TCP port, maybe with whom to expect there, or with a relay and whom it leads to."""
    match address.split("/"):
        case ["", protocol, host, "tcp", port, *rest]:
            return _is_host(protocol, host) and _is_port(port, least=1) and _are_peers(rest)
        case _:
            return False


def can_be_joined_through(address: str) -> bool:
    """Whether it can be dialled, or is a `/dnsaddr` name that leads to addresses which can."""
    match address.split("/"):
        case ["", "dnsaddr", name]:
            return bool(_DNSADDR_NAME.fullmatch(name))
        case ["", "dnsaddr", name, "p2p", peer]:
            return bool(_DNSADDR_NAME.fullmatch(name)) and _is_peer(peer)
        case _:
            return can_be_dialled(address)


LISTEN: Final = Addresses("to listen on", "/ip4/0.0.0.0/tcp/9400", can_be_listened_on)
"""Where a node listens."""
ANNOUNCE: Final = Addresses("that others can dial", "/ip4/192.0.2.1/tcp/9400", can_be_dialled)
"""Where others reach it."""
BOOTSTRAP: Final = Addresses(
    "to join through", "/ip4/192.0.2.1/tcp/9400/p2p/12D3KooW... or /dnsaddr/boot.example", can_be_joined_through
)
"""Whom it asks first."""


def _is_host(protocol: str, host: str) -> bool:
    if protocol in ("dns", "dns4", "dns6"):
        return len(host) <= MAX_HOST_TEXT and bool(_HOST_NAME.fullmatch(host))
    return _is_ip(protocol, host)


def _is_ip(protocol: str, host: str) -> bool:
    try:
        return f"ip{ipaddress.ip_address(host).version}" == protocol and "%" not in host
    except ValueError:
        return False


def _is_port(text: str, *, least: int) -> bool:
    return bool(_PORT.fullmatch(text)) and least <= int(text) <= MAX_PORT


def _names_owner(parts: Sequence[str]) -> bool:
    return not parts or (len(parts) == 2 and _are_peers(parts))  # noqa: PLR2004 - p2p and a peer id


def _are_peers(parts: Sequence[str]) -> bool:
    match parts:
        case []:
            return True
        case ["p2p", peer] | ["p2p", peer, "p2p-circuit"]:
            return _is_peer(peer)
        case ["p2p", relay, "p2p-circuit", "p2p", peer]:
            return relay != peer and _is_peer(relay) and _is_peer(peer)
        case _:
            return False


def _is_peer(text: str) -> bool:
    try:
        NodeId.parse(text)
    except LocalError:
        return False
    return True
