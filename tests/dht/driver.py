"""Nodes that discover over the in-memory network, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from aci_p2p.clock import virtual_clock
from aci_p2p.dht import Discovery, RecordRules, open_discovery
from aci_p2p.dht.discovery import DiscoveryOptions
from aci_p2p.network import Network
from aci_p2p.network.memory import MemoryHub
from aci_p2p.protocol.envelope import Sealer
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.publications import CapabilityRecord, NodeRecord
from tests.protocol.driver import ENGINE, NETWORK, NOW, PRICES

ROOT: Final = bytes([5]) * 32
OTHER_ROOT: Final = bytes([6]) * 32
HOUR_S: Final = 3_600


def clock() -> int:
    """Virtual time, from NOW."""
    return NOW + virtual_clock()


RULES: Final = RecordRules(NETWORK, clock)


@dataclass(frozen=True)
class Peer:
    """A node that discovers."""

    network: Network
    discovery: Discovery
    sealer: Sealer

    @property
    def node_id(self) -> NodeId:
        return self.network.node_id

    @property
    def address(self) -> str:
        return self.network.addresses[0]

    def capability(self, root: bytes = ROOT, addresses: Sequence[str] | None = None) -> CapabilityRecord:
        return CapabilityRecord(
            model_root=root, model_name="model", context=8_192, engine=ENGINE, **PRICES, slots=4, free_slots=4,
            price_curve=(), addresses=tuple(self.network.addresses if addresses is None else addresses),
        )  # fmt: skip

    async def announce(self, *capabilities: CapabilityRecord) -> None:
        await self.discovery.announce(lambda: (NodeRecord((self.address,), (), "aci-p2p/1"), capabilities))

    async def found(self, root: bytes = ROOT, **limit: int) -> list[NodeId]:
        """The providers of a model, each with its own record."""
        records = await self.discovery.find_providers(root, **limit)
        assert all(record.body.model_root == root for record in records)
        return [record.sender for record in records]


OpenPeers = Callable[[int], AbstractAsyncContextManager[list[Peer]]]


@asynccontextmanager
async def open_peer(hub: MemoryHub, number: int, options: DiscoveryOptions | None = None) -> AsyncGenerator[Peer]:
    key = KeyPair(number.to_bytes(32))
    sealer = Sealer(key, NETWORK)
    async with (
        hub.open_network(key, record_validator=RULES.validate, record_selector=RULES.select) as network,
        open_discovery(network, sealer, RULES, clock, options, Random(number)) as discovery,  # noqa: S311
    ):
        yield Peer(network, discovery, sealer)


def dead(number: int) -> str:
    """The address of nobody."""
    return f"/memory/{number}/p2p/{KeyPair(number.to_bytes(32)).node_id}"


@dataclass(frozen=True)
class Home:
    """Where the cache of a node lies."""

    path: Path

    @property
    def options(self) -> DiscoveryOptions:
        return DiscoveryOptions(cache=self.path, threads=False)
