"""Searching a model's providers: in what was exchanged and in the DHT at once, each record checked, each node dialled.

A search goes on in the background when its askers have enough, so that slow providers are there for the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import trio

from aci_p2p.clock import Clock
from aci_p2p.dht.exchange import RecordExchange
from aci_p2p.dht.joining import dial
from aci_p2p.dht.records import RecordRules, capability_key
from aci_p2p.network.api import Network
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.publications import CapabilityRecord

LOOKUP_TIMEOUT_S: Final = 5.0
"""Seconds for a whole search."""
PATIENCE_S: Final = 0.5
"""Seconds from the first provider that is connected until a search returns without the others."""
MAX_PROVIDERS: Final = 32
"""Providers that a search returns at most."""
MAX_SEARCHES: Final = 16
"""Searches at once, each for another model; more wait."""

log = logging.getLogger("aci_p2p.dht")


class _Search:
    """One search; several askers may wait for it."""

    def __init__(self) -> None:
        self.found: dict[NodeId, Envelope[CapabilityRecord]] = {}
        self.is_over = False
        self.changed = trio.Event()

    def add(self, record: Envelope[CapabilityRecord]) -> bool:
        """Keep a record unless a newer one of the same node is there."""
        held = self.found.get(record.sender)
        if held is not None and held.header.sequence >= record.header.sequence:
            return False
        self.found[record.sender] = record
        self.notify()
        return True

    def notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class Searches:
    """The searches of one node."""

    def __init__(
        self,
        network: Network,
        rules: RecordRules,
        exchange: RecordExchange,
        clock: Clock,
        nursery: trio.Nursery,
        *,
        may_dial: bool,
    ) -> None:
        """`nursery` holds searches that go on; `may_dial`: connect to what is found."""
        self._network = network
        self._rules = rules
        self._exchange = exchange
        self._clock = clock
        self._nursery = nursery
        self._may_dial = may_dial
        self._running: dict[bytes, _Search] = {}
        self._limiter = trio.CapacityLimiter(MAX_SEARCHES)

    async def find(self, model_root: bytes, limit: int) -> list[Envelope[CapabilityRecord]]:
        """See `Discovery.find_providers`."""
        search = self._running.get(model_root)
        if search is None:
            search = self._running[model_root] = _Search()
            self._nursery.start_soon(self._run, model_root, search)
        with trio.move_on_after(LOOKUP_TIMEOUT_S) as scope:
            while not search.is_over:
                peers = set(self._network.peers)
                connected = [record for node, record in search.found.items() if node in peers and record.body.slots]
                if len(connected) >= limit:
                    break
                if connected:
                    scope.deadline = min(scope.deadline, trio.current_time() + PATIENCE_S)
                await search.changed.wait()
        peers = set(self._network.peers)
        served = [record for record in search.found.values() if record.body.slots]
        served.sort(key=lambda record: (record.sender not in peers, not record.body.free_slots))
        return served[:limit]

    async def _run(self, model_root: bytes, search: _Search) -> None:
        try:
            async with self._limiter:
                with trio.move_on_after(LOOKUP_TIMEOUT_S):
                    async with trio.open_nursery() as nursery:
                        for record in self._exchange.providers(model_root, self._clock())[:MAX_PROVIDERS]:
                            nursery.start_soon(self._consider, search, record)
                        nodes = await self._network.find_providers(model_root, MAX_PROVIDERS)
                        for node in nodes:
                            if node != self._network.node_id:
                                nursery.start_soon(self._look_up, search, model_root, node)
        finally:
            del self._running[model_root]
            search.is_over = True
            search.notify()

    async def _look_up(self, search: _Search, model_root: bytes, node: NodeId) -> None:
        key = capability_key(model_root, node)
        value = await self._network.get_record(key)
        try:
            record = self._rules.open_capability(key, value) if value is not None else None
        except AciError:
            return
        if record is not None:
            await self._consider(search, record)

    async def _consider(self, search: _Search, record: Envelope[CapabilityRecord]) -> None:
        # Counts from now on, however long the node takes to answer.
        if search.add(record) and record.body.slots and self._may_dial:
            await self._reach(record.sender, record.body.addresses)
            search.notify()

    async def _reach(self, node: NodeId, addresses: Sequence[str]) -> None:
        """Try to connect to a node at the addresses that it claims for itself."""
        self._network.learn_addresses(node, addresses)
        if node not in self._network.peers:
            try:
                await dial(self._network, f"/p2p/{node}")
            except AciError as error:
                log.debug("%s cannot be reached: %s", node.short, error)
