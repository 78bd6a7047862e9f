"""Awards and jobs per second among real nodes over loopback libp2p, for `market.py`.

All nodes are in this process, with their databases on its disk, durable as always. The executor does next to nothing:
one token, in no time.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from aci_p2p import ACI, NodeConfig, NodeParts, ProviderConfig, Requirements, open_node
from aci_p2p.clock import system_clock
from aci_p2p.executor import Executor
from aci_p2p.node import Node
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import JobRecord, Payment
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.store import Store, open_store
from aci_p2p.testing import ToyExecutor, ToyModel
from tests.benchmarks.market_simulated import Awards

MODEL: Final = ToyModel("toy")
"""What is served."""
PRICE: Final = 1_000
"""Base units for each output token, of all providers."""
SLOTS: Final = 64
"""Of the provider whose jobs are counted; more than ever run at once."""
AT_ONCE: Final = 16
"""Jobs that one consumer has running then: enough that none waits for another's disk or timer."""
READY_S: Final = 30.0
"""In which nodes must have found each other, seconds."""
LOOK_S: Final = 0.1
"""Between looks at whether they have, seconds."""
REST_S: Final = 0.02
"""Between two jobs whose awards are timed, seconds: each is alone."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """Jobs of one consumer and one provider on one core."""

    jobs: int
    """Jobs whose provider holds the receipt."""
    wall_s: float
    """How long they took, seconds."""
    processor_s: float
    """How much of it the processor worked, both nodes together, seconds."""
    commits: int
    """Durable transactions of both nodes."""


class _Watch:
    """What reaches the nodes' databases."""

    def __init__(self) -> None:
        self.moved: dict[bytes, dict[State, float]] = {}
        """When each job of a consumer came to a state first, seconds."""
        self.stores: list[Store] = []
        """Databases that were opened."""

    @property
    def commits(self) -> int:
        """Transactions so far."""
        return sum(store.statistics().transactions for store in self.stores)

    def open(self, path: Path, node: NodeId) -> AbstractAsyncContextManager[Store]:
        """A node's database."""
        return open_store(path, node, make=partial(_WatchedStore, watch=self))

    def stored(self, records: Sequence[JobRecord]) -> None:
        """Records have reached the disk."""
        for record in records:
            if record.role is Party.CONSUMER:
                self.moved.setdefault(record.job_id, {}).setdefault(record.state, time.perf_counter())


class _WatchedStore(Store):
    """A database that tells what reaches it."""

    def __init__(self, connection: sqlite3.Connection, node: NodeId, *, threads: bool, watch: _Watch) -> None:
        """`watch` is told."""
        super().__init__(connection, node, threads=threads)
        self._watch = watch
        watch.stores.append(self)

    async def put_jobs(self, records: Sequence[JobRecord], payments: Sequence[Payment] = ()) -> None:
        """As any."""
        await super().put_jobs(records, payments)
        self._watch.stored(records)


@asynccontextmanager
async def _open_toy() -> AsyncGenerator[Executor]:
    yield ToyExecutor(MODEL, tokens_per_second=float("inf"))


@asynccontextmanager
async def _open_market(providers: int, watch: _Watch, *, asks: bool, slots: int) -> AsyncGenerator[ACI]:
    """A client of so many providers, all of which it knows."""
    parts = NodeParts(open_executor=_open_toy, open_store=watch.open)
    serving = ProviderConfig(
        models=(MODEL.name,), input_token_price=PRICE // 4, output_token_price=PRICE, slots=slots, asks=asks
    )
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        known: tuple[str, ...] = ()
        for number in range(providers):
            config = NodeConfig(home=folder / str(number), bootstrap=known, provider=serving)
            node = await stack.enter_async_context(open_node(config, parts=parts))
            known = known or tuple(node.addresses[:1])
        config = NodeConfig(home=folder / "consumer", bootstrap=known)
        consumer = await stack.enter_async_context(open_node(config, parts=NodeParts(open_store=watch.open)))
        with trio.fail_after(READY_S):
            while not await _knows(consumer, providers, asks=asks):  # noqa: ASYNC110 - many things are waited for
                await trio.sleep(LOOK_S)
        yield await stack.enter_async_context(ACI(consumer))


async def _knows(consumer: Node, providers: int, *, asks: bool) -> bool:
    """Whether a consumer has found that many providers, and their asks."""
    consumer.asks.follow(MODEL.root)
    if asks and consumer.asks.book.providers(MODEL.root, system_clock()) < providers:
        return False
    return len(await consumer.find_providers(MODEL.root)) == providers <= len(consumer.network.peers)


async def _ask(aci: ACI, number: int) -> None:
    await aci.inference(
        prompt=f"question {number}", model=MODEL.root.hex(), max_tokens=1, requirements=Requirements(max_price=10**12)
    )


async def measure_awards(providers: int, *, asks: bool, jobs: int) -> Awards:
    """The awards of jobs that come one after the other, on a network without a distance."""
    watch = _Watch()
    async with _open_market(providers, watch, asks=asks, slots=4) as aci:
        for number in range(providers):
            await _ask(aci, number)
        watch.moved.clear()
        for number in range(jobs):
            await _ask(aci, providers + number)
            await trio.sleep(REST_S)
    moved = watch.moved.values()
    return Awards(
        jobs=jobs,
        award=[1_000 * (at[State.AWARDED] - at[State.OFFERED]) for at in moved if State.AWARDED in at],
        accept=[1_000 * (at[State.ACCEPTED] - at[State.OFFERED]) for at in moved if State.ACCEPTED in at],
    )


def count_jobs(seconds: float) -> Throughput:
    """How many jobs a second go through, both nodes on one core, on which this process stays."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return trio.run(measure_jobs, seconds)


async def measure_jobs(seconds: float) -> Throughput:
    """As `count_jobs`, on any cores."""
    watch, done = _Watch(), 0

    async def work(aci: ACI, deadline: float) -> None:
        nonlocal done
        while trio.current_time() < deadline:
            await _ask(aci, done)
            done += 1

    async with _open_market(1, watch, asks=True, slots=SLOTS) as aci:
        for number in range(AT_ONCE):
            await _ask(aci, -number)
        commits = watch.commits
        wall, processor = time.perf_counter(), time.process_time()
        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(work, aci, trio.current_time() + seconds)
        # A job is over when its provider holds the receipt.
        while await aci.node.store.owed(0):  # noqa: ASYNC110 - nobody tells
            await trio.sleep(LOOK_S)
        return Throughput(
            jobs=done,
            wall_s=time.perf_counter() - wall,
            processor_s=time.process_time() - processor,
            commits=watch.commits - commits,
        )
