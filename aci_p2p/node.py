"""A node: key, network, market, discovery, store and, if it serves models, the provider's role."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from random import Random, SystemRandom
from typing import TYPE_CHECKING, Final, TypeAlias

import trio

from aci_p2p.clock import Clock, system_clock
from aci_p2p.config import NodeConfig, ProviderConfig, parse_stakes
from aci_p2p.consumer import RunningJob, Services, open_job
from aci_p2p.database import StoreError
from aci_p2p.dht import Discovery, DiscoveryOptions, RecordRules, open_discovery
from aci_p2p.gossip import Asks, Market, open_asks, open_market
from aci_p2p.keys import KeyRing
from aci_p2p.network import Network, NetworkConfig
from aci_p2p.peer_clocks import CLOCK_PROTOCOL, clock_service
from aci_p2p.protocol.consumer import ConsumerJob
from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.lifecycle import Party
from aci_p2p.protocol.messages import NONCE_BYTES
from aci_p2p.protocol.publications import CapabilityRecord, NodeRecord
from aci_p2p.protocol.reputation import Reputation
from aci_p2p.protocol.request import JobRequest, JobSecrets
from aci_p2p.protocol.selection import ExpectedCost, Knowledge, SelectionRule, Stakes, StakeTable
from aci_p2p.settlement import Settler
from aci_p2p.store import Store, open_store
from aci_p2p.tasks import open_background
from aci_p2p.version import SOFTWARE

if TYPE_CHECKING:
    from aci_p2p.executor import Executor
    from aci_p2p.provider import ProviderRole
    from aci_p2p.serving import Serving

log = logging.getLogger("aci_p2p.node")

REACH_WAIT_S: Final = 2.0
"""Seconds until found providers must have joined our gossip; two heartbeats."""

SETTLE_S: Final = 3_600.0
"""Seconds between looks for jobs whose challenge window of a day is over: nobody waits for it."""

MAX_EXPERIENCES: Final = 2_048
"""Jobs of ours that are looked through at the start for experience with providers: a third of a second."""

OpenNetwork: TypeAlias = Callable[[KeyPair, NetworkConfig, RecordRules], AbstractAsyncContextManager[Network]]
"""Opens a network for a key, what it is told, and the rules of DHT records."""
OpenStore: TypeAlias = Callable[[Path, NodeId], AbstractAsyncContextManager[Store]]
"""Opens the database at a path, for one node's jobs."""


@dataclass(frozen=True, slots=True)
class NodeParts:
    """What a node is made of; the defaults are real, tests and simulations replace them."""

    open_network: OpenNetwork | None = None
    """None: libp2p."""
    open_executor: Callable[[], AbstractAsyncContextManager[Executor]] | None = None
    """None: a worker process with the numpy reference, over the node's model store."""
    clock: Clock = system_clock
    """Unix milliseconds."""
    entropy: Callable[[int], bytes] = secrets.token_bytes
    """n random bytes."""
    random: Random = field(default_factory=SystemRandom)
    """Picks neighbours and moments."""
    rule: SelectionRule = field(default_factory=ExpectedCost)
    """How bids are chosen."""
    stakes: Stakes | None = None
    """What providers have at stake; None: the table in the configuration."""
    open_store: OpenStore | None = None
    """None: SQLite, as `open_store` opens it."""
    threads: bool = True
    """Write the database in a thread; False under virtual time."""


class Node:
    """A running node. Made by `open_node`."""

    def __init__(
        self,
        *,
        config: NodeConfig,
        parts: NodeParts,
        sealer: Sealer,
        network: Network,
        market: Market,
        discovery: Discovery,
        asks: Asks,
        store: Store,
        settler: Settler,
        reputation: Reputation,
    ) -> None:
        self.config = config
        """What it was told."""
        self.network = network
        """Its connections."""
        self.market = market
        """Offers and bids."""
        self.discovery = discovery
        """Nodes and providers."""
        self.asks = asks
        """Standing asks, and the order book."""
        self.store = store
        """Its jobs on disk."""
        self.settler = settler
        """Tells providers what it owes them."""
        self.reputation = reputation
        """Its experience with providers."""
        self.stakes = parts.stakes or StakeTable(parse_stakes(config.stakes))
        """What providers have at stake."""
        self.serving: Serving | None = None
        """How it serves models, if it does."""
        self._parts = parts
        self._sealer = sealer

    @property
    def node_id(self) -> NodeId:
        """Its identity."""
        return self.network.node_id

    @property
    def provider(self) -> ProviderRole | None:
        """Its provider's role, if it serves models."""
        return None if self.serving is None else self.serving.role

    @property
    def clock(self) -> Clock:
        """The wall clock that it goes by."""
        return self._parts.clock

    @property
    def addresses(self) -> Sequence[str]:
        """Where others may dial it."""
        return self.network.addresses

    async def find_providers(self, model_root: bytes) -> list[Envelope[CapabilityRecord]]:
        """Providers of a model, found in the DHT, checked, connected and ready to hear an offer; maybe none.

        If there are some, the order book has their asks a moment later, and follows them from now on.
        """
        found = await self.discovery.find_providers(model_root)
        if found:
            self.asks.follow(model_root)
        connected = [record.sender for record in found if record.sender in self.network.peers]
        await self.market.wait_until_reachable(model_root, connected, REACH_WAIT_S)
        return found

    @asynccontextmanager
    async def open_job(self, request: JobRequest) -> AsyncGenerator[RunningJob]:
        """Offer a job and run it within the block; iterate over it for what happens."""
        entropy = self._parts.entropy
        fresh = JobSecrets(salt=entropy(NONCE_BYTES), nonce=entropy(NONCE_BYTES))
        knowledge = Knowledge(self.stakes, self.reputation)
        job = ConsumerJob(self._sealer, request, fresh, self._parts.rule, knowledge)
        parts = self._parts
        services = Services(self.network, self.market, self.asks, self.store, parts.clock, parts.random)
        try:
            with self.asks.hold(request.model_root):
                async with open_job(job, services) as running:
                    yield running
        finally:
            self.settler.wake()
            if job.record is not None:
                self.reputation.note(job.record, job.receipt.body if job.record.receipt else None)

    async def provide(self, config: ProviderConfig) -> None:
        """Serve from now on what `config` says: models, prices, slots; jobs that run are run to their end.

        Raises LocalError when a model cannot be served, and then goes on as before.
        """
        assert self.serving is not None
        await self.serving.provide(config)
        self.config = replace(self.config, provider=config)
        self.asks.look_again()
        await self.announce()

    async def announce(self) -> None:
        """Publish where we are and what we serve."""
        await self.discovery.announce(self._describe)

    def _describe(self) -> tuple[NodeRecord, Sequence[CapabilityRecord]]:
        roles = ("provider",) if self.provider else ("bootstrap",)
        record = NodeRecord(tuple(self.addresses), roles, SOFTWARE)
        return record, self.provider.capabilities() if self.provider else ()


@asynccontextmanager
async def open_node(
    config: NodeConfig | None = None, *, parts: NodeParts | None = None, require_bootstrap: bool = True
) -> AsyncGenerator[Node]:
    """Run a node within the block: it joins through its bootstrap addresses and its cache, and serves if it is told to.

    With `require_bootstrap` it has joined when the block begins; without, it starts whether anybody answers or not, and
    keeps trying. Raises LocalError (key, models, addresses), AddressInUse, BootstrapFailed.
    """
    config, parts = config or NodeConfig(), parts or NodeParts()
    if config.provider is not None and config.provider.serve:
        # Before others connect, whom its loading would keep waiting.
        import_module("aci_p2p.serving")
    rules = RecordRules(config.network, parts.clock)
    open_network = parts.open_network or open_libp2p
    with _key(config) as key:
        sealer = Sealer(key, config.network)
        async with (
            _open_store(config, key.node_id, parts) as store,
            open_network(key, replace(config.p2p, named_only=config.offline), rules) as network,
            open_market(network, config.network, parts.clock, random=parts.random) as market,
            open_discovery(
                network, sealer, rules, parts.clock, _discovery_options(config, parts), parts.random
            ) as discovery,
            open_asks(network, market, sealer, parts.clock, random=parts.random) as asks,
            open_background() as tasks,
        ):
            await store.note_key(parts.clock())
            await store.recover(parts.clock())
            reputation = Reputation(key.node_id, config.network)
            for job in reversed(await store.recent(Party.CONSUMER, MAX_EXPERIENCES)):
                reputation.note(job)
            tasks.start_soon(_settle, store, reputation, parts.clock)
            await discovery.join(config.bootstrap, require=require_bootstrap)
            settler = Settler(network, store, sealer, parts.clock)
            tasks.start_soon(settler.run)
            node = Node(
                config=config, parts=parts, sealer=sealer, network=network, market=market, discovery=discovery,
                asks=asks, store=store, settler=settler, reputation=reputation,
            )  # fmt: skip
            with network.serve(CLOCK_PROTOCOL, clock_service(parts.clock)):
                try:
                    if config.provider is not None and config.provider.serve:
                        async with _providing(node, config.provider, parts, sealer):
                            await node.announce()
                            yield node
                        return
                    if config.own_key:
                        await node.announce()
                    yield node
                finally:
                    await settler.flush()


def _open_store(config: NodeConfig, node: NodeId, parts: NodeParts) -> AbstractAsyncContextManager[Store]:
    if parts.open_store is not None:
        return parts.open_store(config.database_path, node)
    return open_store(config.database_path, node, threads=parts.threads)


def _discovery_options(config: NodeConfig, parts: NodeParts) -> DiscoveryOptions:
    return DiscoveryOptions(
        cache=config.address_cache_path, mdns=config.p2p.mdns, offline=config.offline, threads=parts.threads
    )


async def _settle(store: Store, reputation: Reputation, clock: Clock) -> None:
    """Finalise jobs as their challenge windows end, until cancelled."""
    while True:
        await trio.sleep(SETTLE_S)
        try:
            for job in await store.settle(clock()):
                reputation.note(job)
        except StoreError as error:
            log.warning("jobs are not settled: %s", error)


@contextmanager
def _key(config: NodeConfig) -> Generator[KeyPair]:
    ring = KeyRing(config.keys_path)
    with ring.use(config.key) if config.own_key else ring.use_any(config.key) as key:
        yield key


@asynccontextmanager
async def open_libp2p(key: KeyPair, config: NetworkConfig, rules: RecordRules) -> AsyncGenerator[Network]:
    """A network over libp2p within the block. Raises LocalError, AddressInUse."""
    # Imported here: libp2p takes half a second, which commands that need no network should not pay.
    from aci_p2p.network.libp2p import open_libp2p_network  # noqa: PLC0415

    async with open_libp2p_network(
        key, config, record_validator=rules.validate, record_selector=rules.select
    ) as network:
        yield network


@asynccontextmanager
async def _providing(node: Node, config: ProviderConfig, parts: NodeParts, sealer: Sealer) -> AsyncGenerator[None]:
    """Serve models within the block."""
    # Imported here: it is a fourteenth of a start, which nodes that serve nothing should not pay.
    from aci_p2p.serving import open_serving  # noqa: PLC0415

    async with open_serving(
        config, network=node.network, market=node.market, discovery=node.discovery, asks=node.asks, store=node.store,
        sealer=sealer, models_path=node.config.models_path, open_executor=parts.open_executor, clock=parts.clock,
        entropy=parts.entropy,
    ) as node.serving:  # fmt: skip
        yield
