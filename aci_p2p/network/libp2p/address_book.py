"""Where peers may be dialled, what worked and what did not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

from aci_p2p.network.api import KnownPeer
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.limits import MAX_ADDRESSES_PER_PEER, MAX_KNOWN_PEERS
from aci_p2p.protocol.identity import NodeId

BACK_OFF_SECONDS = 2.0
"""How long an address that could not be dialled is left alone, seconds; doubled each time."""
MAX_BACK_OFF_SECONDS = 600.0
"""Longest time that an address is left alone, seconds."""


class _Failure(NamedTuple):
    times: int
    until: float


class AddressBook:
    """At most MAX_ADDRESSES_PER_PEER addresses of each of at most MAX_KNOWN_PEERS peers."""

    def __init__(self, own: NodeId, random: Random) -> None:
        """`random` spreads the attempts of many nodes whose peer went away at one moment."""
        self._own = own
        self._random = random
        self._addresses: OrderedDict[NodeId, tuple[TcpAddress, ...]] = OrderedDict()
        self._connected: OrderedDict[NodeId, None] = OrderedDict()
        self._failures: dict[NodeId, dict[str, _Failure]] = {}

    def learn(self, peer: NodeId, addresses: Sequence[TcpAddress], *, hearsay: bool = False) -> None:
        """Remember where a peer may be dialled: what the peer itself says first.

        `hearsay` (from another peer) never displaces an address that is known already.
        """
        usable = [replace(address, peer=None) for address in addresses if address.port and address.peer in {None, peer}]
        if peer == self._own or not usable:
            return
        known = self.known(peer)
        merged = dict.fromkeys([*known, *usable] if hearsay else [*usable, *known])
        self._addresses[peer] = tuple(merged)[:MAX_ADDRESSES_PER_PEER]
        self._addresses.move_to_end(peer)
        if len(self._addresses) > MAX_KNOWN_PEERS:
            forgotten, _ = self._addresses.popitem(last=False)
            self._failures.pop(forgotten, None)

    def known(self, peer: NodeId) -> tuple[TcpAddress, ...]:
        """Where a peer may be dialled, the best place first."""
        return self._addresses.get(peer, ())

    def due(self, peer: NodeId, now: float) -> tuple[TcpAddress, ...]:
        """Those of the known addresses that are not left alone for having failed."""
        failures = self._failures.get(peer, {})
        return tuple(
            address
            for address in self.known(peer)
            if (failure := failures.get(address.transport)) is None or failure.until <= now
        )

    def failed(self, peer: NodeId, address: TcpAddress, now: float) -> None:
        """A peer was not found at one of its addresses: leave it alone for a while, each time longer."""
        if replace(address, peer=None) not in self.known(peer):
            return
        failures = self._failures.setdefault(peer, {})
        times = failures[address.transport].times + 1 if address.transport in failures else 1
        longest = min(BACK_OFF_SECONDS * 2 ** (times - 1), MAX_BACK_OFF_SECONDS)
        failures[address.transport] = _Failure(times, now + longest * self._random.uniform(0.5, 1))
        known = {one.transport for one in self.known(peer)}
        for forgotten in failures.keys() - known:
            del failures[forgotten]

    def worked(self, peer: NodeId, address: TcpAddress) -> None:
        """A peer was found at an address: it comes first from now on."""
        self.learn(peer, (address,))

    def connected(self, peer: NodeId) -> None:
        """A peer is connected, so it is alive and may be dialled again wherever it is said to be."""
        self._failures.pop(peer, None)
        self._connected[peer] = None
        self._connected.move_to_end(peer)
        if len(self._connected) > MAX_KNOWN_PEERS:
            self._connected.popitem(last=False)

    def known_peers(self) -> tuple[KnownPeer, ...]:
        """See `Network.known_peers`."""
        return tuple(
            KnownPeer(peer, tuple(address.owned_by(peer) for address in self.known(peer)))
            for peer in reversed(self._connected)
            if self.known(peer)
        )
