"""Finding nodes and providers: bootstrap, announcement, lookup."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final, TypeVar

import trio

from aci_p2p.clock import Clock
from aci_p2p.dht.records import RecordRules, capability_key, node_key
from aci_p2p.network.api import Network
from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.errors import AciError, LocalError, ResourceError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import SECOND, CapabilityRecord, NodeRecord
from aci_p2p.tasks import open_background

REANNOUNCE_S: Final = 600.0
"""Seconds between announcements; records live six times as long, so that five may be lost."""
RECORD_LIFETIME_MS: Final = 3_600 * SECOND
"""An hour."""
DIAL_TIMEOUT_S: Final = 5.0
"""Seconds for connecting to one node, noise handshake included."""
LOOKUP_TIMEOUT_S: Final = 5.0
"""Seconds for a whole lookup of a model's providers."""
MAX_PROVIDERS: Final = 32
"""Providers that a lookup returns at most."""

log = logging.getLogger("aci_p2p.dht")

T = TypeVar("T")
U = TypeVar("U")


class BootstrapFailed(ResourceError):
    """None of the given bootstrap addresses could be reached."""

    code = "bootstrap_failed"

    def __init__(self, failures: Sequence[tuple[str, AciError]]) -> None:
        """`failures`: each address with what went wrong."""
        tried = "; ".join(f"{address}: {error.message}" for address, error in failures)
        super().__init__(f"no bootstrap node answers ({tried})", hint="check the address, and that the node runs")
        self.failures = tuple(failures)


class Discovery:
    """What one node announces and finds. Made by `open_discovery`."""

    def __init__(self, network: Network, sealer: Sealer, rules: RecordRules, clock: Clock) -> None:
        """`sealer` signs our records; `rules` judge those of others."""
        self._network = network
        self._sealer = sealer
        self._rules = rules
        self._clock = clock
        self._node: NodeRecord | None = None
        self._capabilities: tuple[CapabilityRecord, ...] = ()

    async def join(self, bootstrap: Sequence[str]) -> tuple[NodeId, ...]:
        """Connect to all bootstrap addresses at once; who answered.

        Raises LocalError for an address that is none, BootstrapFailed when nobody answered.
        """
        results = await _gather(self._dial, bootstrap)
        for result in results:
            if isinstance(result, LocalError):
                raise result
        reached = tuple(result for result in results if isinstance(result, NodeId))
        if bootstrap and not reached:
            pairs = zip(bootstrap, results, strict=True)
            raise BootstrapFailed([(address, error) for address, error in pairs if isinstance(error, AciError)])
        return reached

    async def announce(self, node: NodeRecord, capabilities: Sequence[CapabilityRecord]) -> None:
        """Publish our records now; they are renewed until the block of `open_discovery` ends.

        One that cannot be published is logged, hinders no other, and is tried again when the others are renewed.
        """
        self._node = node
        self._capabilities = tuple(capabilities)
        await self.announce_again()

    async def announce_again(self) -> None:
        """Publish our records once more, newly signed. What fails is logged."""
        if self._node is not None:
            with _failures_logged("this node"):
                await self._put(node_key(self._network.node_id), self._node)
        for capability in self._capabilities:
            with _failures_logged(capability.model_name):
                await self._put(capability_key(capability.model_root, self._network.node_id), capability)
                await self._network.provide(capability.model_root)

    async def find_providers(self, model_root: bytes, limit: int = MAX_PROVIDERS) -> list[Envelope[CapabilityRecord]]:
        """Providers of a model whose signed records we could check, connected where possible; maybe none."""
        found: dict[NodeId, Envelope[CapabilityRecord]] = {}

        async def look_up(node: NodeId) -> None:
            record = await self._capability(model_root, node)
            if record is not None:
                # Counts from now on, however long the node takes to answer.
                found[node] = record
                await self._reach(node, record.body.addresses)

        with trio.move_on_after(LOOKUP_TIMEOUT_S):
            nodes = await self._network.find_providers(model_root, limit)
            await _gather(look_up, [node for node in nodes if node != self._network.node_id][:limit])
        return list(found.values())

    async def _capability(self, model_root: bytes, node: NodeId) -> Envelope[CapabilityRecord] | None:
        key = capability_key(model_root, node)
        value = await self._network.get_record(key)
        if value is None:
            return None
        try:
            return self._rules.open_capability(key, value)
        except AciError:
            return None

    async def _reach(self, node: NodeId, addresses: Sequence[str]) -> None:
        """Connect to a node at one of the addresses that it claims for itself."""
        self._network.learn_addresses(node, addresses)
        for address in addresses:
            if node not in self._network.peers and address.endswith(f"/p2p/{node}"):
                await self._dial(address)

    async def _dial(self, address: str) -> NodeId | AciError:
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                return await self._network.connect(address)
        except AciError as error:
            return error
        except trio.TooSlowError:
            return ResourceError(f"no answer within {DIAL_TIMEOUT_S:g} s")

    async def _put(self, key: str, record: NodeRecord | CapabilityRecord) -> None:
        envelope = self._sealer.seal(record, self._clock(), lifetime_ms=RECORD_LIFETIME_MS)
        await self._network.put_record(key, envelope.data)


@contextmanager
def _failures_logged(what: str) -> Generator[None]:
    try:
        yield
    except AciError as error:
        log.warning("%s cannot be announced: %s", what, error)


async def _gather(function: Callable[[T], Awaitable[U]], items: Sequence[T]) -> list[U]:
    """Results of `function` over `items`, run at once, in the order of the items."""
    results: dict[int, U] = {}

    async def run(index: int, item: T) -> None:
        results[index] = await function(item)

    async with trio.open_nursery() as nursery:
        for index, item in enumerate(items):
            nursery.start_soon(run, index, item)
    return [results[index] for index in range(len(items))]


@asynccontextmanager
async def open_discovery(
    network: Network, sealer: Sealer, rules: RecordRules, clock: Clock
) -> AsyncGenerator[Discovery]:
    """Discovery over a network within the block; what was announced is renewed every REANNOUNCE_S seconds."""
    discovery = Discovery(network, sealer, rules, clock)

    async def renew() -> None:
        while True:
            await trio.sleep(REANNOUNCE_S)
            await discovery.announce_again()

    async with open_background() as nursery:
        nursery.start_soon(renew)
        yield discovery
