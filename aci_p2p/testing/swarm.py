"""Whole networks of real nodes in one process, for tests: under virtual time and in memory, or over real sockets.

Nodes are the ones of `aci_p2p.node`, with everything that they have: keys, databases, discovery, gossip, jobs. Only the
medium between them, the clock and the models are imagined, and each of these can be the real one instead.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Final, Literal, TypeAlias

import trio
from trio.testing import MockClock

from aci_p2p.clock import MS_PER_S, system_clock, virtual_clock
from aci_p2p.config import DEFAULT_SLOTS, NodeConfig, ProviderConfig
from aci_p2p.dht import RecordRules
from aci_p2p.executor import Executor
from aci_p2p.gossip.market import MAX_WAITING_JOBS, OFFER_QUEUE
from aci_p2p.network import Network, NetworkConfig
from aci_p2p.network.limits import MAX_STREAMS
from aci_p2p.network.memory import MemoryHub
from aci_p2p.network.model import NetworkModel
from aci_p2p.node import open_libp2p
from aci_p2p.protocol.bidding import MAX_OUTSTANDING
from aci_p2p.protocol.envelope import kind_of
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.lifecycle import State
from aci_p2p.protocol.messages import SEAL_BYTES, Kind
from aci_p2p.protocol.validation import MessageRefused
from aci_p2p.tasks import open_background
from aci_p2p.testing.ledger import Ledger
from aci_p2p.testing.running import repeatable_scheduling
from aci_p2p.testing.severable import Cables
from aci_p2p.testing.simulator.casting import INPUT_SHARE
from aci_p2p.testing.simulator.invariant import Invariant, InvariantBroken
from aci_p2p.testing.swarm_node import Surroundings, SwarmNode
from aci_p2p.testing.toy_model import ToyExecutor, ToyModel

MODEL: Final = "toy"
"""Name of the model that providers of a swarm serve."""
NETWORK: Final = "aci-swarm"
"""Network id of swarms."""
START_MS: Final = 1_750_000_000_000
"""Unix milliseconds at which virtual time begins; real envelopes hold real dates."""
LATENCY_S: Final = 0.01
"""Between any two nodes where no model says otherwise, one way, seconds."""
FIRST_PRICE: Final = 1_000
"""Base units for each output token of the first provider."""
PRICE_STEP: Final = 100
"""So much more asks each further one."""
HOUR_S: Final = 3_600.0
"""Seconds."""
RENDEZVOUS_S: Final = 60.0
"""Seconds in which nodes must find each other."""
LOOK_S: Final = 0.5
"""Seconds between looks at whether what is waited for has come."""
SETTLE_S: Final = 180.0
"""Seconds in which everything must have come to rest: longer than any state of a running job may last."""


OpenExecutor: TypeAlias = Callable[[int], AbstractAsyncContextManager[Executor]]
"""Opens the executor of the n-th provider, which serves one model named MODEL."""


class Trace:
    """A hash of all that happens between nodes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def note(self, kind: str, source: NodeId, target: NodeId, data: bytes) -> None:
        """Something happens, at this moment of trio's clock."""
        when = struct.pack(">dI", trio.current_time(), len(data))
        if kind == "frame" and _is_sealed(data):
            data = b""
        self._hash.update(b"".join((when, kind.encode(), source.public_key, target.public_key, data)))

    @property
    def digest(self) -> str:
        """In hex."""
        return self._hash.hexdigest()


def _is_sealed(frame: bytes) -> bool:
    """Whether a frame holds a sealed prompt, whose bytes differ each time."""
    if len(frame) < SEAL_BYTES:
        # Most frames: to read them takes longer than all else that is noted.
        return False
    with suppress(MessageRefused):
        return kind_of(frame) is Kind.INPUT
    return False


class Swarm:
    """Nodes that have found each other. Made by `open_swarm`."""

    def __init__(
        self, around: Surroundings, nursery: trio.Nursery, hub: MemoryHub | None, trace: Trace | None, *, asks: bool
    ) -> None:
        """`nursery` runs the nodes; `hub` is None over libp2p; `trace` hashes what happens on the hub.

        `asks`: whether providers publish standing asks.
        """
        self._asks = asks
        self.seed = around.seed
        """What fixes keys, nonces and choices."""
        self.clock = around.clock
        """Unix milliseconds, as nodes without skew see them."""
        self.model_root = around.model_root
        """Weights root of the model that the providers serve."""
        self.ledger = around.ledger
        """Every record that reached a disk."""
        self.providers: list[SwarmNode] = []
        """Nodes that serve the model, the cheapest first unless their prices were given."""
        self.consumers: list[SwarmNode] = []
        """Nodes that only ask."""
        self._nursery = nursery
        self._hub = hub
        self._trace = trace

    @property
    def model(self) -> str:
        """The model that the providers serve, as `ACI.inference` takes it."""
        return self.model_root.hex()

    @property
    def nodes(self) -> list[SwarmNode]:
        """All nodes, providers first."""
        return [*self.providers, *self.consumers]

    @property
    def running(self) -> list[SwarmNode]:
        """Those that run."""
        return [node for node in self.nodes if node.is_up]

    @property
    def trace(self) -> str:
        """Hash of all that has happened between the nodes so far, in hex; empty over libp2p."""
        return self._trace.digest if self._trace else ""

    async def start(self, node: SwarmNode) -> None:
        """Start a node that is down; it knows where the others are or were."""
        if not node.is_up:
            known = [other.address for other in self.nodes if other is not node and other.address]
            await node.start(self._nursery, known)

    async def stop(self, node: SwarmNode) -> None:
        """Stop a node in good order: it hands back its jobs and says that it leaves."""
        await node.stop()

    async def crash(self, node: SwarmNode) -> None:
        """Kill a node: at once nothing of it reaches its disk or anybody else. Returns when its tasks are gone."""
        node.kill()
        await node.wait_until_down()

    def crash_at(self, node: SwarmNode, transition: int) -> None:
        """Kill a node when its n-th transition from now on is on its disk, and nothing is sent of it."""
        if transition < 1:
            msg = "the next transition is number 1"
            raise LocalError(msg)
        node.kill_after(transition)

    async def restart(self, node: SwarmNode) -> None:
        """Start a node again with its key and its disk, stopping it in good order if it runs."""
        if node.is_up:
            await node.stop()
        await self.start(node)

    def skew(self, node: SwarmNode, seconds: float) -> None:
        """Set a node's clock ahead, or back if negative."""
        node.skew_ms = round(seconds * MS_PER_S)

    def partition(self, *groups: Iterable[SwarmNode]) -> None:
        """Split the network: only members of the same group reach each other; those in none are one more group."""
        self._memory().partition(*([node.node_id for node in group] for group in groups))

    def heal(self) -> None:
        """End the partition."""
        self._memory().heal()

    def _memory(self) -> MemoryHub:
        if self._hub is None:
            msg = "real sockets cannot be partitioned"
            raise LocalError(msg, hint="leave network= out")
        return self._hub

    async def advance(self, *, hours: float = 0.0, seconds: float = 0.0) -> None:
        """Let time pass: real time, or virtual time in next to none."""
        await trio.sleep(hours * HOUR_S + seconds)

    async def rendezvous(self, timeout_s: float = RENDEZVOUS_S) -> None:
        """Wait until every running consumer has found all running providers, they hear it, and it knows what
        they ask, if they publish that. Raises TooSlowError.
        """
        with trio.fail_after(timeout_s):
            async with trio.open_nursery() as nursery:
                for consumer in self.consumers:
                    if consumer.is_up:
                        nursery.start_soon(self._find_providers, consumer)

    async def _find_providers(self, consumer: SwarmNode) -> None:
        wanted = {provider.node_id for provider in self.providers if provider.is_up}
        while True:
            node = consumer.node
            found = {record.sender for record in await node.find_providers(self.model_root)}
            asking = {ask.sender for ask in node.asks.book.view(self.model_root, node.clock())}
            if wanted <= found & set(node.network.peers) and (wanted <= asking or not self._asks):
                return
            await trio.sleep(LOOK_S)

    async def settle(self, timeout_s: float = SETTLE_S) -> None:
        """Wait until all jobs have ended and nothing of them is left over, then check everything.

        Raises InvariantBroken, also when it takes longer than `timeout_s` seconds.
        """
        with trio.move_on_after(timeout_s):
            while self._left_over():  # noqa: ASYNC110 - many things are waited for
                await trio.sleep(LOOK_S)
        for detail in self._left_over():
            raise InvariantBroken(Invariant.ENDS, detail)
        self.assert_invariants()

    def _left_over(self) -> list[str]:
        """What running nodes still have to do."""
        left: list[str] = []
        there = {node.node_id for node in self.running}
        left += [
            f"job {payment.job_id.hex()[:8]} is not settled with {payment.peer.short}"
            for consumer, payment in self.ledger.unsettled()
            if {consumer, payment.peer} <= there
        ]
        for node in self.running:
            streams = node.node.network.statistics().streams
            left += [
                f"job {job.job_id.hex()[:8]} of {node.name} is {job.state.value}"
                for job in self.ledger.unfinished(node.name)
                # Who has answered only waits for its receipt, and what is owed was looked at above.
                if job.state is not State.REVEALED
            ]
            if streams:
                left.append(f"{node.name} has {streams} streams")
            # Over libp2p each connection has tasks, and connections come and go.
            if self._hub is not None and node.tasks > node.idle_tasks:
                left.append(f"{node.name} has {node.tasks} tasks, {node.idle_tasks} when it was idle")
        return left

    def assert_invariants(self) -> None:
        """Check what must hold at any moment. Raises InvariantBroken.

        States follow the table; nobody is paid twice or without a promise; both sides agree; queues are bounded.
        """
        self.ledger.check()
        for node in self.running:
            for what, size, limit in _queues(node):
                if size > limit:
                    raise InvariantBroken(Invariant.BOUNDED, f"{node.name}: {size} {what}, and not {limit}")


def _queues(node: SwarmNode) -> list[tuple[str, int, int]]:
    """What a node holds of something, and how much it may."""
    market, role = node.node.market.statistics(), node.node.provider
    queues = [
        ("offers waiting", market.offers.waiting, OFFER_QUEUE),
        ("bids waiting", market.bids.waiting, OFFER_QUEUE),
        ("jobs waiting for bids", market.waiting_jobs, MAX_WAITING_JOBS),
        ("streams", node.node.network.statistics().streams, 2 * MAX_STREAMS),
    ]
    if role is not None:
        provider = role.statistics()
        queues += [
            ("jobs running", provider.running, provider.slots),
            ("bids out", provider.outstanding, MAX_OUTSTANDING),
        ]
    return queues


@asynccontextmanager
async def open_swarm(
    *,
    providers: int = 3,
    consumers: int = 1,
    seed: int = 1,
    clock: Literal["virtual", "real"] = "virtual",
    network: NetworkModel | Literal["libp2p"] | None = None,
    executor: OpenExecutor | None = None,
    model_root: bytes | None = None,
    prices: Sequence[int] = (),
    slots: int = DEFAULT_SLOTS,
    asks: bool = False,
) -> AsyncGenerator[Swarm]:
    """A swarm within the block: real nodes that have found each other.

    With the virtual clock, run under `MockClock(autojump_threshold=0)`, as `aci_p2p.testing.run` and the pytest fixture
    do; equal seeds then give equal runs. `network`: how an imagined one behaves (None: 10 ms from node to node), or
    "libp2p" for loopback sockets and real time. `executor` replaces the toy model, or sets its speed and its faults
    (`lambda number: nullcontext(ToyExecutor(...))`); `model_root` is the root of what it serves. `prices`: base units
    for each output token, by provider; by default, and behind their end, each is dearer than the one before. `slots`:
    jobs that a provider runs at once. With `asks` providers publish standing asks; an hour of virtual time then takes
    some seconds.

    Raises LocalError for parts that do not fit together, TooSlowError when the nodes do not find each other.
    """
    _check(clock, network)
    model, trace = ToyModel(MODEL), Trace()

    @asynccontextmanager
    async def open_toy(_number: int) -> AsyncGenerator[Executor]:
        yield ToyExecutor(model)

    hub: MemoryHub | None = None
    if network != "libp2p":
        hub = MemoryHub(latency=LATENCY_S, model=network, random=Random(seed), note=trace.note)  # noqa: S311 - is to repeat
    cables = Cables(partial(_open_endpoint, hub), hub)
    is_virtual = clock == "virtual"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aci-swarm-")))
        if is_virtual:
            stack.enter_context(repeatable_scheduling(seed))
        around = Surroundings(
            seed=seed,
            clock=_virtual_clock if is_virtual else system_clock,
            threads=not is_virtual,
            open_network=cables.open_network,
            cut=cables.cut,
            mend=cables.mend,
            ledger=Ledger(NETWORK),
            model_root=model_root or model.root,
        )
        async with open_background() as nursery:
            swarm = Swarm(around, nursery, hub, trace if hub else None, asks=asks)
            for number in range(providers):
                price = prices[number] if number < len(prices) else FIRST_PRICE + number * PRICE_STEP
                config = _config(folder, f"provider-{number}", _serving(price, slots, asks=asks))
                swarm.providers.append(SwarmNode(config.key, config, around, partial(executor or open_toy, number)))
            for number in range(consumers):
                config = _config(folder, f"consumer-{number}")
                swarm.consumers.append(SwarmNode(config.key, config, around, None))
            await _begin(swarm)
            yield swarm


def _check(clock: str, network: NetworkModel | str | None) -> None:
    if clock == "virtual" and network == "libp2p":
        msg = "sockets know nothing of virtual time"
        raise LocalError(msg, hint='use clock="real" with network="libp2p"')
    if clock == "virtual" and not isinstance(trio.lowlevel.current_clock(), MockClock):
        msg = "the virtual clock needs trio's MockClock"
        raise LocalError(msg, hint='use `aci_p2p.testing.run`, the fixture `swarm`, or clock="real"')


def _virtual_clock() -> int:
    return START_MS + virtual_clock()


def _config(folder: Path, name: str, provider: ProviderConfig | None = None) -> NodeConfig:
    return NodeConfig(home=folder / name, network=NETWORK, key=name, own_key=True, provider=provider)


def _serving(price: int, slots: int, *, asks: bool) -> ProviderConfig:
    return ProviderConfig(
        models=(MODEL,), input_token_price=price // INPUT_SHARE, output_token_price=price, slots=slots, asks=asks
    )


async def _begin(swarm: Swarm) -> None:
    """Start all nodes, and let them find each other."""
    for node in swarm.nodes:
        await swarm.start(node)
    await swarm.rendezvous()
    # What that has started is under way a moment later.
    await trio.sleep(LOOK_S)
    for node in swarm.nodes:
        node.idle_tasks = node.tasks


@asynccontextmanager
async def _open_endpoint(
    hub: MemoryHub | None, key: KeyPair, config: NetworkConfig, rules: RecordRules
) -> AsyncGenerator[Network]:
    opening = (
        open_libp2p(key, config, rules)
        if hub is None
        else hub.open_network(key, record_validator=rules.validate, record_selector=rules.select)
    )
    async with opening as network:
        yield network
