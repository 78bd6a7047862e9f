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
STALE_FAILURES = 3
"""Failures in a row after which an address makes room for others, and is forgotten once its peer is found elsewhere;
not before, since it may be our own line that is down."""


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
        self._proven: dict[NodeId, set[TcpAddress]] = {}
        self._connected: OrderedDict[NodeId, None] = OrderedDict()
        self._failures: dict[NodeId, dict[str, _Failure]] = {}

    def learn(self, peer: NodeId, addresses: Sequence[TcpAddress], *, hearsay: bool = False) -> None:
        """Remember where a peer may be dialled, as it says itself: that replaces what it has said before.

        `hearsay` (from another peer) is added, and displaces only what has failed.
        """
        usable = [replace(address, peer=None) for address in addresses if address.port and address.peer in {None, peer}]
        if peer == self._own or not usable:
            return
        known = self.known(peer)
        proven = self._proven.get(peer, set())
        self._keep(peer, [*known, *usable] if hearsay else [*usable, *(one for one in known if one in proven)])

    def _keep(self, peer: NodeId, addresses: Sequence[TcpAddress]) -> None:
        ranked = sorted(dict.fromkeys(addresses), key=lambda address: self._is_stale(peer, address))
        self._addresses[peer] = tuple(ranked)[:MAX_ADDRESSES_PER_PEER]
        self._addresses.move_to_end(peer)
        if len(self._addresses) > MAX_KNOWN_PEERS:
            forgotten, _ = self._addresses.popitem(last=False)
            self._failures.pop(forgotten, None)
            self._proven.pop(forgotten, None)

    def _is_stale(self, peer: NodeId, address: TcpAddress) -> bool:
        failure = self._failures.get(peer, {}).get(address.transport)
        return failure is not None and failure.times >= STALE_FAILURES

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
        if times >= STALE_FAILURES:
            self._proven.get(peer, set()).discard(replace(address, peer=None))
        known = {one.transport for one in self.known(peer)}
        for forgotten in failures.keys() - known:
            del failures[forgotten]

    def prefer(self, peer: NodeId, address: TcpAddress) -> None:
        """A peer was found at an address, or our user says so: it comes first, and stays until it fails."""
        if peer == self._own or not address.port:
            return
        address = replace(address, peer=None)
        known = self.known(peer)
        self._proven[peer] = {one for one in self._proven.get(peer, ()) if one in known} | {address}
        self._keep(peer, [address, *known])

    def connected(self, peer: NodeId) -> None:
        """A peer is alive: it may be dialled again wherever it is said to be, unless it was never found there."""
        fresh = tuple(address for address in self.known(peer) if not self._is_stale(peer, address))
        if fresh:
            self._addresses[peer] = fresh
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
