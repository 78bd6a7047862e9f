"""The DHT of simulated nodes: what each keeps is kept in the stores of real nodes, and judged by their rules.

Lookups are not routed: whoever looks for a key asks the nodes that are nearest to it of those that it can reach, all at
once, after the time that the way to them takes. What they answer is theirs to decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from aci_p2p.dht.announcing import Announcer, Record
from aci_p2p.dht.discovery import RECORD_LIFETIME_MS
from aci_p2p.dht.records import RecordRules, capability_key, node_key
from aci_p2p.dht.search import MAX_PROVIDERS
from aci_p2p.network.libp2p.kad_stores import ProviderStore, RecordStore
from aci_p2p.network.libp2p.kad_table import BUCKET_SIZE, position, position_of
from aci_p2p.network.libp2p.kademlia import MAX_PROVIDERS_PER_ANSWER
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.publications import CapabilityRecord, NodeRecord
from aci_p2p.testing.simulator.node import NETWORK, SimNode
from aci_p2p.testing.simulator.transport import Transport

LOOKUP_TRIPS: Final = 6
"""One-way trips of a lookup: three rounds of questions and answers."""
TICK_MS: Final = 10_000
"""How often a node looks at whether its records are to be published again, milliseconds."""
PEERS: Final = 12
"""Connected peers of every node that is up, on average; decides when records are spread again."""
MAX_KEYS_CACHED: Final = 8_192
"""Keys whose nearest nodes are remembered until somebody comes or goes."""
MS_PER_S: Final = 1_000

Found = Callable[[Sequence[Envelope[CapabilityRecord]]], None]
"""Is given the providers that a lookup found."""
Describe = Callable[[], Sequence[CapabilityRecord]]
"""What a node serves at the moment."""


class Shelf(Protocol):
    """What a node keeps for the DHT, and what it says of it."""

    def keep(self, key: str, value: bytes) -> None:
        """Somebody stores a record."""
        ...

    def record(self, key: str) -> bytes | None:
        """Somebody asks for a record."""
        ...

    def keep_provider(self, root: bytes, provider: NodeId) -> None:
        """Somebody says that it serves a model."""
        ...

    def providers(self, root: bytes) -> Sequence[NodeId]:
        """Somebody asks who serves a model."""
        ...


class HonestShelf:
    """Keeps what is valid, and says what it keeps."""

    def __init__(self, node: SimNode) -> None:
        """Empty, as after a start: nothing of it is on disk."""
        self._node = node
        own = position_of(node.node_id)
        self._records = RecordStore(own)
        self._providers = ProviderStore(own)
        self._rules = RecordRules(NETWORK, lambda: node.clock)

    @property
    def _now(self) -> float:
        return self._node.world.now / MS_PER_S

    def keep(self, key: str, value: bytes) -> None:
        """Keep a valid record unless a newer one is held."""
        held = self._records.get(key, self._now)
        try:
            self._rules.validate(key, value)
        except AciError:
            return
        if held is None or held == value or self._rules.select(key, (held, value)):
            self._records.put(key, value, self._now)

    def record(self, key: str) -> bytes | None:
        """What is held."""
        return self._records.get(key, self._now)

    def keep_provider(self, root: bytes, provider: NodeId) -> None:
        """Keep that a node serves a model; nodes of one world are all in networks of their own."""
        self._providers.add(root, provider, None, self._now)

    def providers(self, root: bytes) -> Sequence[NodeId]:
        """Who is known to serve a model."""
        return self._providers.get(root, self._now)


class Directory:
    """The DHT of one world."""

    def __init__(self, transport: Transport, nodes: Sequence[SimNode]) -> None:
        self.shelves: dict[int, Shelf] = {node.index: HonestShelf(node) for node in nodes}
        """What each node keeps, by its number; attackers put others here."""
        self.lookups = 0
        """Searches for providers so far."""
        self.found = 0
        """Providers that they found, together."""
        self._transport = transport
        self._world = transport.world
        self._positions = [(position_of(node.node_id), node) for node in nodes]
        self._nearest: dict[bytes, list[SimNode]] = {}

    def changed(self) -> None:
        """Somebody came or went."""
        self._nearest.clear()

    def restarted(self, node: SimNode) -> None:
        """A node has lost what it kept for others."""
        if node.honest:
            self.shelves[node.index] = HonestShelf(node)
        self.changed()

    def nearest(self, asker: SimNode, key: bytes) -> list[SimNode]:
        """The nodes that keep a key, of those that an asker can reach."""
        known = self._nearest.get(key)
        if known is None:
            if len(self._nearest) >= MAX_KEYS_CACHED:
                self._nearest.clear()
            target = position(key)
            ranked = sorted(self._positions, key=lambda one: one[0] ^ target)
            # Half of the nodes may be on the other side of a partition, and as many again.
            known = self._nearest[key] = [node for _, node in ranked if node.up][: 4 * BUCKET_SIZE]
        if not self._transport.is_split:
            return [node for node in known if node.up][:BUCKET_SIZE]
        is_cut = self._transport.is_cut
        return [node for node in known if node.up and not is_cut(asker, node)][:BUCKET_SIZE]

    def _after_lookup(self, asker: SimNode, key: bytes, act: Callable[[list[SimNode]], None]) -> None:
        """Look a key up, and act on the nodes nearest to it if the asker still runs."""

        def arrive() -> None:
            if asker.up:
                act(self.nearest(asker, key))

        nearest = self.nearest(asker, key)
        trip = self._transport.delay_ms(asker, nearest[0], 0) if nearest else 0
        self._world.after(LOOKUP_TRIPS * trip, arrive)

    def publish(self, node: SimNode, body: Record) -> None:
        """Store a record of a node about itself."""
        value = node.sealer.seal(body, node.clock, lifetime_ms=RECORD_LIFETIME_MS).data
        if isinstance(body, NodeRecord):
            self._store(node, node_key(node.node_id), value)
            return
        self._store(node, capability_key(body.model_root, node.node_id), value)
        if body.slots:
            self._after_lookup(node, body.model_root, lambda nearest: self._provide(nearest, body.model_root, node))

    def _store(self, node: SimNode, key: str, value: bytes) -> None:
        def act(nearest: list[SimNode]) -> None:
            for keeper in nearest:
                self.shelves[keeper.index].keep(key, value)

        self._after_lookup(node, key.encode(), act)

    def _provide(self, nearest: list[SimNode], root: bytes, node: SimNode) -> None:
        for keeper in nearest:
            self.shelves[keeper.index].keep_provider(root, node.node_id)

    def find(self, node: SimNode, root: bytes, found: Found) -> None:
        """Search the providers of a model as `aci_p2p.dht.search` does: each record checked by who asked for it."""

        def act(nearest: list[SimNode]) -> None:
            named: Counter[NodeId] = Counter()
            for keeper in nearest:
                answer = self.shelves[keeper.index].providers(root)[:MAX_PROVIDERS_PER_ANSWER]
                named.update(list(dict.fromkeys(answer)))
            # What most of them say comes first; among equals, what was said first.
            providers = [provider for provider, _ in named.most_common(MAX_PROVIDERS) if provider != node.node_id]
            records = [record for provider in providers if (record := self._look_up(node, root, provider))]
            self.lookups += 1
            self.found += len(records)
            found([record for record in records if record.body.slots])

        self._after_lookup(node, root, act)

    def _look_up(self, node: SimNode, root: bytes, provider: NodeId) -> Envelope[CapabilityRecord] | None:
        key = capability_key(root, provider)
        nearest = self.nearest(node, key.encode())
        said = dict.fromkeys(self.shelves[keeper.index].record(key) for keeper in nearest)
        rules = RecordRules(NETWORK, lambda: node.clock)
        newest: Envelope[CapabilityRecord] | None = None
        for value in said:
            try:
                record = rules.open_capability(key, value) if value is not None else None
            except AciError:
                continue
            if record is not None and (newest is None or record.header.sequence > newest.header.sequence):
                newest = record
        return newest


class Announcing:
    """What one node publishes about itself, on the machine that real nodes run."""

    def __init__(self, node: SimNode, directory: Directory, describe: Describe) -> None:
        """`describe` says what it serves."""
        self._node = node
        self._directory = directory
        self._describe = describe
        self._announcer = Announcer(node.random)
        self._is_leaving = False
        roles = ("provider",) if describe() else ("consumer",)
        self._record = NodeRecord((), roles, "aci-sim/1")

    def begin(self) -> None:
        """Publish now, and whenever it is due."""
        self._node.world.after(self._node.random.randrange(TICK_MS), self._tick)

    def restarted(self) -> None:
        """The node has forgotten what it published."""
        self._announcer = Announcer(self._node.random)

    def leave(self) -> None:
        """Take back what we said we serve."""
        self._is_leaving = True
        self._publish(self._announcer.withdraw())

    def come_back(self) -> None:
        """Serve again."""
        self._is_leaving = False

    def _tick(self) -> None:
        if self._node.up and not self._is_leaving:
            self._announcer.update(self._record, self._describe())
            self._publish(self._announcer.due(PEERS, self._node.world.now / MS_PER_S))
        self._node.world.after(TICK_MS, self._tick)

    def _publish(self, records: Sequence[Record]) -> None:
        for record in records:
            self._directory.publish(self._node, record)
