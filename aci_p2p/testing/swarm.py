"""Whole networks of real nodes in one process, for tests: under virtual time and in memory, or over real sockets.

Nodes are the ones of `aci_p2p.node`, with everything that they have: keys, databases, discovery, gossip, jobs. Only the
medium between them, the clock and the models are imagined, and each of these can be the real one instead.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final, Literal

import trio
import trio.testing

from aci_p2p.client import ACI, Answer, Requirements
from aci_p2p.clock import MS_PER_S, Clock, system_clock, virtual_clock
from aci_p2p.config import NodeConfig, ProviderConfig
from aci_p2p.dht import RecordRules
from aci_p2p.executor import Executor
from aci_p2p.network import Network, NetworkConfig
from aci_p2p.network.memory import MemoryHub
from aci_p2p.node import Node, NodeParts, open_libp2p, open_node
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.testing.toy_model import ToyExecutor, ToyModel

MODEL: Final = "toy"
"""Name of the model that providers of a swarm serve."""
NETWORK: Final = "aci-swarm"
"""Network id of swarms."""
FIRST_PRICE: Final = 1_000
"""Base units for each output token of the first provider."""
PRICE_STEP: Final = 100
"""So much more asks each further one."""
HOUR_S: Final = 3_600.0
"""Seconds."""

OpenExecutor = Callable[[int], AbstractAsyncContextManager[Executor]]
"""Opens the executor of the n-th provider, which serves one model named MODEL."""


class SwarmNode:
    """One node of a swarm: runs, is killed, comes back."""

    def __init__(self, swarm: Swarm, name: str, config: NodeConfig, executor: int | None) -> None:
        """`executor`: number of the provider that it is; None: it only consumes."""
        self.name = name
        """What it is called in messages."""
        self.skew_ms = 0
        """How far its clock is ahead, milliseconds."""
        self._swarm = swarm
        self._config = config
        self._executor = executor
        self._node: Node | None = None
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._drawn = 0

    def __repr__(self) -> str:
        return f"<{self.name}{'' if self.is_up else ', down'}>"

    @property
    def is_up(self) -> bool:
        """Whether it runs."""
        return self._node is not None

    @property
    def node(self) -> Node:
        """The node itself. Raises LocalError while it is down."""
        if self._node is None:
            msg = f"{self.name} is down"
            raise LocalError(msg)
        return self._node

    @property
    def node_id(self) -> NodeId:
        """Its identity."""
        return self.node.node_id

    async def ask(self, prompt: str, *, max_tokens: int = 64, requirements: Requirements | None = None) -> Answer:
        """Run one inference from here. Raises what `ACI.inference` raises."""
        async with ACI(self.node) as aci:
            return await aci.inference(
                prompt=prompt, model=self._swarm.model_root.hex(), max_tokens=max_tokens, requirements=requirements
            )

    def _entropy(self, size: int) -> bytes:
        self._drawn += 1
        seed = f"{self._swarm.seed}/{self.name}/{self._drawn}".encode()
        return hashlib.shake_256(seed).digest(size)

    def _clock(self) -> int:
        return self._swarm.clock() + self.skew_ms

    async def run(self, bootstrap: Sequence[str], started: trio.Event) -> None:
        """Run until `stop` or `kill`."""
        swarm, number = self._swarm, self._executor
        parts = NodeParts(
            open_network=swarm.open_network,
            open_executor=None if number is None else lambda: swarm.open_executor(number),
            clock=self._clock,
            entropy=self._entropy,
            threads=not swarm.is_virtual,
        )
        config = NodeConfig(
            home=self._config.home, network=NETWORK, key=self.name, own_key=True, bootstrap=tuple(bootstrap),
            provider=self._config.provider, p2p=self._config.p2p,
        )  # fmt: skip
        self._scope, self._ended = trio.CancelScope(), trio.Event()
        try:
            with self._scope:
                async with open_node(config, parts=parts, require_bootstrap=False) as node:
                    self._node = node
                    started.set()
                    await trio.sleep_forever()
        finally:
            self._node = None
            self._ended.set()

    async def stop(self) -> None:
        """Stop in good order, as SIGTERM does."""
        self._scope.cancel()
        await self._ended.wait()


class Swarm:
    """Nodes that have found each other. Made by `open_swarm`."""

    def __init__(
        self,
        seed: int,
        nursery: trio.Nursery,
        hub: MemoryHub | None,
        clock: Clock,
        open_executor: OpenExecutor,
        root: bytes,
    ) -> None:
        """`hub`: None for libp2p."""
        self.seed = seed
        """What fixes keys and nonces."""
        self.clock = clock
        """Unix milliseconds, as nodes without skew see them."""
        self.open_executor = open_executor
        """Opens the n-th provider's executor."""
        self.model_root = root
        """Weights root of the model that the providers serve."""
        self.providers: list[SwarmNode] = []
        """Nodes that serve the model, the cheapest first."""
        self.consumers: list[SwarmNode] = []
        """Nodes that only ask."""
        self._hub = hub
        self._nursery = nursery
        self._addresses: dict[SwarmNode, str] = {}

    @property
    def nodes(self) -> list[SwarmNode]:
        """All nodes, providers first."""
        return [*self.providers, *self.consumers]

    @property
    def is_virtual(self) -> bool:
        """Whether time is virtual."""
        return self.clock is virtual_clock

    @asynccontextmanager
    async def open_network(self, key: KeyPair, config: NetworkConfig, rules: RecordRules) -> AsyncGenerator[Network]:
        """The medium of one node."""
        if self._hub is None:
            async with open_libp2p(key, config, rules) as network:
                yield network
            return
        async with self._hub.open_network(
            key, record_validator=rules.validate, record_selector=rules.select
        ) as network:
            yield network

    async def start(self, node: SwarmNode) -> None:
        """Start a node that is down; it knows the addresses of those that have run so far."""
        if node.is_up:
            return
        started = trio.Event()
        known = [address for other, address in self._addresses.items() if other is not node]
        self._nursery.start_soon(node.run, known, started)
        await started.wait()
        self._addresses[node] = node.node.addresses[0]

    async def stop(self, node: SwarmNode) -> None:
        """Stop a node in good order: it finishes or hands back its jobs."""
        await node.stop()

    async def advance(self, *, hours: float = 0.0, seconds: float = 0.0) -> None:
        """Let time pass: real time, or virtual time in next to none."""
        await trio.sleep(hours * HOUR_S + seconds)

    def skew(self, node: SwarmNode, seconds: float) -> None:
        """Set a node's clock ahead, or back if negative."""
        node.skew_ms = round(seconds * MS_PER_S)


@asynccontextmanager
async def open_swarm(
    *,
    providers: int = 3,
    consumers: int = 1,
    seed: int = 1,
    clock: Literal["virtual", "real"] = "virtual",
    network: MemoryHub | Literal["libp2p"] | None = None,
    executor: OpenExecutor | None = None,
    model_root: bytes | None = None,
) -> AsyncGenerator[Swarm]:
    """A swarm within the block: real nodes that have found each other.

    With the virtual clock, run under `trio.testing.MockClock(autojump_threshold=0)`, as `aci_p2p.testing.run` and the
    pytest fixture do. `executor` replaces the toy model; `model_root` is then the root of what it serves.

    Raises LocalError for parts that do not fit together.
    """
    model = ToyModel(MODEL)

    @asynccontextmanager
    async def open_toy(_number: int) -> AsyncGenerator[Executor]:
        yield ToyExecutor(model)

    is_virtual = clock == "virtual"
    if is_virtual and network == "libp2p":
        msg = "sockets know nothing of virtual time"
        raise LocalError(msg, hint='use clock="real" with network="libp2p"')
    hub = None if network == "libp2p" else network or MemoryHub(latency=0.01)
    with tempfile.TemporaryDirectory(prefix="aci-swarm-") as folder:
        async with trio.open_nursery() as nursery:
            swarm = Swarm(
                seed, nursery, hub, virtual_clock if is_virtual else system_clock, executor or open_toy,
                model_root or model.root,
            )  # fmt: skip
            for number in range(providers):
                price = FIRST_PRICE + number * PRICE_STEP
                serving = ProviderConfig(models=(MODEL,), input_token_price=price // 4, output_token_price=price)
                config = NodeConfig(home=Path(folder) / f"provider-{number}", provider=serving)
                swarm.providers.append(SwarmNode(swarm, f"provider-{number}", config, number))
            for number in range(consumers):
                config = NodeConfig(home=Path(folder) / f"consumer-{number}")
                swarm.consumers.append(SwarmNode(swarm, f"consumer-{number}", config, None))
            for node in swarm.nodes:
                await swarm.start(node)
            try:
                yield swarm
            finally:
                nursery.cancel_scope.cancel()
