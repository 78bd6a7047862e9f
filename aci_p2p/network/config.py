"""How a node takes part in the network, whatever the transport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aci_p2p.protocol.errors import LocalError

LOOPBACK: Final = "/ip4/127.0.0.1/tcp/0"
"""Any free port, reachable from this machine only."""
DEFAULT_LOW_WATER: Final = 96
"""Connections that a node keeps when it has too many: enough neighbours for gossip and Kademlia many times over."""
DEFAULT_HIGH_WATER: Final = 192
"""Connections at which idle ones are closed (the values of go-libp2p's connection manager)."""


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Where a node listens, how many connections it keeps, and how it gets through NATs."""

    listen: tuple[str, ...] = (LOOPBACK,)
    """Multiaddrs to listen on; none: dial only."""
    announce: tuple[str, ...] = ()
    """Multiaddrs that others can dial and the node cannot know of: a forwarded port, a DNS name."""
    low_water: int = DEFAULT_LOW_WATER
    """Connections kept when idle ones are closed."""
    high_water: int = DEFAULT_HIGH_WATER
    """Connections at which idle ones begin to be closed."""
    relay_server: bool = True
    """Relay for nodes behind NATs, once others can reach us (circuit relay v2)."""
    relay_client: bool = True
    """Be reachable through relays when others cannot reach us."""
    hole_punching: bool = True
    """Turn a relayed connection into a direct one where the NATs allow it (DCUtR)."""
    mdns: bool = False
    """Find and be found by nodes of the same local network (mDNS)."""
    named_only: bool = False
    """Dial nobody but whom `Network.connect` is told: what peers and records say of addresses is not remembered."""

    def __post_init__(self) -> None:
        """Raises LocalError on values that cannot work."""
        if not 0 < self.low_water <= self.high_water:
            msg = f"{self.low_water} and {self.high_water} are no low and high water marks"
            raise LocalError(msg, hint="the low one is at least 1 and the high one not below it")
