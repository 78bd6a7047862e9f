"""Finding nodes and providers: joining, announcing, looking up. The trio shell around the machines of this room."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from random import Random, SystemRandom
from typing import Final

import trio

from aci_p2p.clock import Clock
from aci_p2p.dht.announcing import Announcer, Record
from aci_p2p.dht.bootstrap import WANTED_PEERS, BootstrapReport
from aci_p2p.dht.exchange import (
    MAX_MODELS,
    PUBLISH_DELAY_S,
    PUBLISH_GAP_S,
    SECOND_PUBLISH_S,
    RecordExchange,
    exchange_topic,
)
from aci_p2p.dht.joining import CacheKeeper, Membership
from aci_p2p.dht.records import RecordRules, capability_key, node_key
from aci_p2p.dht.search import MAX_PROVIDERS, Searches
from aci_p2p.network.api import Network, Subscription
from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import KINDS, Kind
from aci_p2p.protocol.publications import CapabilityRecord, NodeRecord
from aci_p2p.protocol.validation import ACCEPTED, MessageRefused, Validation
from aci_p2p.tasks import open_background

LOOK_S: Final = 900.0
"""Longest time between looks at what there is to do, seconds: nobody tells of an interface's new address."""
RECORD_LIFETIME_MS: Final = KINDS[Kind.NODE_RECORD].lifetime_ms
"""Milliseconds for which our records hold: as long as records may."""
LEAVE_S: Final = 1.0
"""Seconds for taking our records back when we leave."""
ANNOUNCE_WAIT_S: Final = 3.0
"""Seconds that announcing waits for the DHT; storing goes on behind."""
PUBLISH_AT_ONCE: Final = 16
"""Records that are being stored in the DHT at once."""
EXCHANGE_QUEUE: Final = 64
"""Exchanged records waiting to be looked at; their contents are kept when they are checked."""

log = logging.getLogger("aci_p2p.dht")

Describe = Callable[[], tuple[NodeRecord, Sequence[CapabilityRecord]]]
"""What a node says of itself at the moment."""


@dataclass(frozen=True, slots=True)
class DiscoveryOptions:
    """By which ways a node finds others."""

    cache: Path | None = None
    """File of the address cache; None: remember nothing."""
    mdns: bool = False
    """Find and be found by nodes of the same local network."""
    offline: bool = False
    """Contact nobody that is not named: neither cache nor exchange nor mDNS, and nobody that a record tells of."""
    threads: bool = True
    """Read and write the cache in a thread; False under virtual time."""


class Discovery:
    """What one node announces and finds. Made by `open_discovery`."""

    def __init__(
        self,
        network: Network,
        sealer: Sealer,
        rules: RecordRules,
        clock: Clock,
        *,
        membership: Membership,
        exchange: RecordExchange | None,
        searches: Searches,
        announcer: Announcer,
        nursery: trio.Nursery,
    ) -> None:
        """`sealer` signs our records; `rules` judge those of others; `nursery` holds what goes on in between."""
        self._network = network
        self._sealer = sealer
        self._rules = rules
        self._clock = clock
        self._membership = membership
        self._exchange = exchange
        self._searches = searches
        self._nursery = nursery
        self._announcer = announcer
        self._describe: Describe | None = None
        self._failing: set[bytes] = set()
        self._topic = exchange_topic(sealer.network)
        self._sealed: dict[bytes, tuple[Record, bytes]] = {}
        self._exchange_at = inf
        self._exchanged_at = -inf
        self._exchanges = 0
        self._publishing = trio.CapacityLimiter(PUBLISH_AT_ONCE)

    async def join(self, bootstrap: Sequence[str], *, require: bool = True) -> None:
        """Keep to these addresses from now on, and wait until somebody answers, there or where the cache says.

        With `require`, nobody's answer is an error; without, waiting ends after a second, and the node keeps trying.
        Raises LocalError for an address that is none, BootstrapFailed when nobody answered.
        """
        await self._membership.join(bootstrap, require=require)

    def forget(self, bootstrap: Sequence[str]) -> None:
        """Keep to these addresses no more; connections stay."""
        self._membership.forget(bootstrap)

    def bootstrap_report(self) -> tuple[BootstrapReport, ...]:
        """How it stands with the bootstrap addresses."""
        return self._membership.report()

    async def announce(self, describe: Describe) -> None:
        """Publish our records now; until the block of `open_discovery` ends they are renewed, and changes published.

        Waits until they are stored, at most ANNOUNCE_WAIT_S. `describe` is asked again after each `look_again`. What
        cannot be published is logged, hinders nothing else, and is tried again. In the end all is taken back.
        """
        self._describe = describe
        self._announcer.update(*describe())
        now = trio.current_time()
        records = self._announcer.due(len(self._network.peers), now, renew=True)
        published = trio.Event()
        self._plan_exchange(now)
        self._nursery.start_soon(self._publish, records, published)
        self.look_again()
        with trio.move_on_after(ANNOUNCE_WAIT_S):
            await published.wait()

    async def find_providers(self, model_root: bytes, limit: int = MAX_PROVIDERS) -> list[Envelope[CapabilityRecord]]:
        """Providers of a model whose signed records we could check, connected where possible; maybe none.

        Ends when `limit` are connected, soon after the first is, or after LOOKUP_TIMEOUT_S; connecting to the others
        goes on. Those that are connected and have a free slot come first.
        """
        return await self._searches.find(model_root, limit)

    def known_nodes(self) -> list[Envelope[NodeRecord]]:
        """Nodes that have told of themselves over gossip, the latest first."""
        return self._exchange.nodes(self._clock()) if self._exchange else []

    def look_again(self) -> None:
        """What the node says of itself may have changed."""
        self._membership.news.notify()

    async def watch(self) -> None:
        """Look at what there is to do whenever the network changes, until cancelled."""
        while True:
            await self._network.changed()
            self._membership.news.notify()

    async def run(self) -> None:
        """Do what is due, until cancelled."""
        while True:
            now = trio.current_time()
            self._membership.tick(now)
            due = min(now + LOOK_S, self._membership.next_due(now))
            if self._describe is not None:
                due = min(due, self._announce_changes(self._describe, now))
            with trio.move_on_at(due):
                await self._membership.news.wait()

    def _announce_changes(self, describe: Describe, now: float) -> float:
        """Announce and exchange what is due; when there is more to do."""
        self._announcer.update(*describe())
        if records := self._announcer.due(len(self._network.peers), now):
            self._plan_exchange(now)
            self._nursery.start_soon(self._publish, records)
        due = self._announcer.next_due(len(self._network.peers))
        if not self._network.topic_peers(self._topic):
            return due
        if now >= self._exchange_at:
            self._exchanges += 1
            self._exchanged_at = now
            # Soon after the first publication the neighbours have neighbours.
            self._exchange_at = now + SECOND_PUBLISH_S if self._exchanges == 1 else inf
            self._nursery.start_soon(self._exchange_records)
        return min(due, self._exchange_at)

    def _plan_exchange(self, now: float) -> None:
        """What is announced is told to our neighbours, too, but not each time."""
        if self._exchange is not None:
            self._exchange_at = min(self._exchange_at, max(now + PUBLISH_DELAY_S, self._exchanged_at + PUBLISH_GAP_S))

    async def leave(self) -> None:
        """Take back what we said we serve, and write the address cache."""
        # Nothing is announced again meanwhile, and nothing waits for a turn that may come too late.
        self._describe = None
        self._publishing.total_tokens = inf
        with trio.CancelScope(shield=True, deadline=trio.current_time() + LEAVE_S):
            if self._network.peers and (records := self._announcer.withdraw()):
                await self._publish(records)
        await self._membership.leave()

    async def _publish(self, records: Sequence[Record], published: trio.Event | None = None) -> None:
        async with trio.open_nursery() as nursery:
            for record in records:
                nursery.start_soon(self._publish_one, record)
        if published is not None:
            published.set()

    async def _publish_one(self, record: Record) -> None:
        async with self._publishing:
            key = _key(record)
            try:
                await self._put(record)
                self._failing.discard(key)
            except AciError as error:
                name = record.model_name if isinstance(record, CapabilityRecord) else "this node"
                # Told once, though it is tried again and again.
                level = logging.DEBUG if key in self._failing else logging.WARNING
                log.log(level, "%s cannot be announced: %s", name, error)
                self._failing.add(key)
                self._announcer.failed(record, trio.current_time())

    async def _put(self, record: Record) -> None:
        data = self._seal(record)
        if isinstance(record, NodeRecord) or record.slots:
            self._sealed[_key(record)] = record, data
        if isinstance(record, NodeRecord):
            await self._network.put_record(node_key(self._network.node_id), data)
            return
        if not record.slots and self._exchange:
            await self._network.publish(self._topic, data)
        await self._network.put_record(capability_key(record.model_root, self._network.node_id), data)
        if record.slots:
            await self._network.provide(record.model_root)

    async def _exchange_records(self) -> None:
        """Tell our neighbours about ourselves, each time in another envelope: gossip passes nothing on twice."""
        for record in self._announcer.current[: MAX_MODELS + 1]:
            if record.addresses:
                sealed, data = self._sealed.pop(_key(record), (None, b""))
                await self._network.publish(self._topic, data if sealed == record else self._seal(record))
        self._sealed.clear()

    def _seal(self, record: Record) -> bytes:
        return self._sealer.seal(record, self._clock(), lifetime_ms=RECORD_LIFETIME_MS).data


def _key(record: Record) -> bytes:
    return record.model_root if isinstance(record, CapabilityRecord) else b""


class _Listener:
    """Hears what others exchange, and remembers where they can be dialled."""

    def __init__(self, network: Network, exchange: RecordExchange, clock: Clock, membership: Membership) -> None:
        self._network = network
        self._exchange = exchange
        self._clock = clock
        self._membership = membership

    def validate(self, forwarder: NodeId, data: bytes) -> Validation:
        """Judge a message; what it says is kept at once, since the queue behind may overflow."""
        try:
            node = self._exchange.hear(forwarder, data, self._clock(), trio.current_time())
        except MessageRefused as error:
            return error.validation
        if node is not None:
            self._network.learn_addresses(node.sender, node.body.addresses)
            if len(self._network.peers) < WANTED_PEERS:
                self._membership.news.notify()
        return ACCEPTED

    async def run(self, subscription: Subscription) -> None:
        """Empty the queue, until cancelled."""
        async for _ in subscription:
            pass


@asynccontextmanager
async def open_discovery(
    network: Network,
    sealer: Sealer,
    rules: RecordRules,
    clock: Clock,
    options: DiscoveryOptions | None = None,
    random: Random | None = None,
) -> AsyncGenerator[Discovery]:
    """Discovery over a network within the block, which begins with nobody: see `Discovery.join`.

    What was announced is renewed until the end, and then taken back. `random`: None takes the system's.
    """
    options, random = options or DiscoveryOptions(), random or SystemRandom()
    exchange = RecordExchange(sealer.network, network.node_id, random.randbytes(32))
    cache: CacheKeeper | None = None
    if options.cache is not None and not options.offline:
        cache = CacheKeeper(options.cache, clock, threads=options.threads)

    def hints() -> list[str]:
        connected = set(network.peers)
        known = [(one.peer, one.addresses[0]) for one in network.known_peers()]
        # Where they can be dialled, the network has heard, and knows which of it to believe.
        heard = [(node.sender, f"/p2p/{node.sender}") for node in exchange.nodes(clock())]
        return [address for peer, address in [*known, *heard] if peer not in connected]

    async with open_background() as nursery, AsyncExitStack() as stack:
        membership = Membership(network, random, nursery, cache=cache, hints=list if options.offline else hints)
        searches = Searches(network, rules, exchange, clock, nursery, may_dial=not options.offline)
        discovery = Discovery(
            network, sealer, rules, clock, membership=membership, exchange=None if options.offline else exchange,
            searches=searches, announcer=Announcer(random), nursery=nursery,
        )  # fmt: skip
        await membership.load()
        if not options.offline:
            listener = _Listener(network, exchange, clock, membership)
            topic = exchange_topic(sealer.network)
            subscription = await stack.enter_async_context(
                network.subscribe(topic, listener.validate, capacity=EXCHANGE_QUEUE)
            )
            nursery.start_soon(listener.run, subscription)
        if options.mdns and not options.offline:
            # Imported here: few nodes use it, and what it needs takes a tenth of a second.
            from aci_p2p.dht.mdns import open_mdns  # noqa: PLC0415

            await stack.enter_async_context(open_mdns(network, membership.offer, random))
        nursery.start_soon(discovery.watch)
        nursery.start_soon(discovery.run)
        try:
            yield discovery
        finally:
            await discovery.leave()
