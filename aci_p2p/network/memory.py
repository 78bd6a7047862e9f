"""The seam in one process: no sockets, no clock but trio's, no randomness but what is passed in. For tests.

Endpoints of a `MemoryHub` are an ideal cable apart, or stand in an imagined internet, with latencies, losses and NATs;
they can be cut off, and the whole be split. Gossip floods over the connections, which is what gossipsub does in a swarm
smaller than its mesh degree. DHT values and provider records are kept by the endpoints closest to the key among those
reachable, as in Kademlia.

Under `trio.testing.MockClock` a run takes no real time.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from random import Random

from aci_p2p.network.api import Network, RecordSelector, RecordValidator
from aci_p2p.network.memory_endpoint import MemoryNetwork
from aci_p2p.network.memory_medium import Medium, Note
from aci_p2p.network.memory_records import RecordRules
from aci_p2p.network.model import Nat, NetworkModel, Place
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.tasks import Notice, open_background


class MemoryHub:
    """What the endpoints of one simulated network share."""

    def __init__(
        self,
        *,
        latency: float = 0.0,
        model: NetworkModel | None = None,
        random: Random | None = None,
        note: Note | None = None,
    ) -> None:
        """`latency`: one-way delay between any two endpoints, virtual seconds, unless there is a `model`.

        `random` draws what the model leaves to chance; None: the same each time. `note` hears what happens.
        """
        self.medium = Medium(latency, model, random or Random(0), note)  # noqa: S311 - no secrets
        """What lies between the endpoints."""
        self.changes = Notice()
        """Tells when a partition comes or goes, and when a connection is lost."""
        self._endpoints: dict[NodeId, MemoryNetwork] = {}
        self._cut_off: set[NodeId] = set()
        self._opened = 0

    @asynccontextmanager
    async def open_network(
        self, key: KeyPair, *, record_validator: RecordValidator, record_selector: RecordSelector
    ) -> AsyncGenerator[Network]:
        """An endpoint for the block. Raises LocalError when the key already has one here."""
        if key.node_id in self._endpoints:
            msg = f"{key.node_id.short} is already on this hub"
            raise LocalError(msg)
        self._opened += 1
        self.medium.settle(key.node_id)
        address = f"/memory/{self._opened}/p2p/{key.node_id}"
        async with open_background() as nursery:
            network = MemoryNetwork(self, key.node_id, address, nursery, RecordRules(record_validator, record_selector))
            self._endpoints[key.node_id] = network
            nursery.start_soon(network.pump)
            try:
                yield network
            finally:
                self._disconnect(network)
                del self._endpoints[key.node_id]

    def place(self, node: NodeId, place: Place) -> None:
        """Let a node stand somewhere, instead of where the model puts it."""
        self.medium.places[node] = place

    def partition(self, *groups: Iterable[NodeId]) -> None:
        """Split the network: only members of the same group reach each other; those in none are one more group.

        Frames on connections in between wait; the connections are lost after KEEP_ALIVE_S, unless it is healed before.
        """
        self.medium.split(groups)
        self.changes.notify()
        for network in self._endpoints.values():
            network.split()

    def heal(self) -> None:
        """End the partition. Lost connections come back only when somebody dials."""
        self.medium.join()
        for network in self._endpoints.values():
            network.heal()
        self.changes.notify()

    def cut_off(self, peer: NodeId) -> None:
        """Cut a peer's cable: its connections are lost and it can neither dial nor be dialled."""
        self._cut_off.add(peer)
        if (network := self._endpoints.get(peer)) is not None:
            self._disconnect(network)

    def restore(self, peer: NodeId) -> None:
        """Plug a peer in again; connections come back only when somebody dials."""
        self._cut_off.discard(peer)

    def disconnect(self, a: NodeId, b: NodeId) -> None:
        """Drop the connection between two endpoints; either may dial again."""
        self._endpoints[a].drop_link(b)
        if (other := self._endpoints.get(b)) is not None:
            self.medium.carry(a, b, None, lambda: other.drop_link(a))
        self.changes.notify()

    def endpoint(self, peer: NodeId) -> MemoryNetwork | None:
        """The endpoint of a peer, None when there is none or it is cut off."""
        return None if peer in self._cut_off else self._endpoints.get(peer)

    def owner_of(self, number: str) -> NodeId | None:
        """Whose endpoint has this number in its address; None when nobody's has."""
        for peer in self._endpoints:
            if (network := self.endpoint(peer)) is not None and network.addresses[0].startswith(f"/memory/{number}/"):
                return peer
        return None

    def relay_between(self, a: NodeId, b: NodeId) -> NodeId | None:
        """A node that everybody can dial and that both reach; None when there is none."""
        for node in self._endpoints:
            is_between = node not in {a, b} and self.endpoint(node) and self.medium.places[node].nat is Nat.OPEN
            if is_between and not self.medium.is_cut(a, b, node):
                return node
        return None

    def circuits_through(self, node: NodeId) -> int:
        """Connections that a node relays."""
        return sum(network.relays().count(node) for network in self._endpoints.values()) // 2

    def _disconnect(self, network: MemoryNetwork) -> None:
        """An endpoint is gone, and with it what it relays."""
        for peer in network.peers:
            self.disconnect(network.node_id, peer)
        for other in self._endpoints.values():
            other.drop_circuits(network.node_id)
