"""What the workers of `network.py` share: the workloads, and how each is timed, whichever library carries it.

A worker is a process that performs one workload and prints its figures as JSON; rates are per second of processor time.
`tests/interop/js/benchmark.mjs` does the same in JavaScript.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, NoReturn

import trio

PAYLOAD_BYTES: Final = 1024
"""A request, its answer, and a gossip message."""
CHUNK_BYTES: Final = 64 << 10
"""Written at once in the bulk transfer."""
CHUNKS: Final = 64
"""In one transfer, at whose end the receiver says that it has read them."""
SECONDS: Final = 0.5
"""How long each workload is repeated."""
WARM_UP_S: Final = 0.2
"""Before that, and not counted: windows open, JavaScript is compiled."""
PAIRS: Final = 12
"""Of hosts, of which one dials the other, pair after pair."""
IN_FLIGHT: Final = 16
"""Gossip messages published that some subscriber still lacks: stock py-libp2p drops them from 32 on."""
LOST_S: Final = 1.0
"""Without a message for so long, those in flight are lost."""
FINDS: Final = 5
"""Keys provided, and as many records stored, each looked up once."""
QUIET_SHARE: Final = 0.1
"""Of a core: below it, a network that was just put together has come to rest."""
QUIET_S: Final = 5.0
"""How long to wait for that."""
AT_ONCE: Final = 4
"""Nodes that join a swarm at the same time."""
POLL_S: Final = 0.001
"""Between looks at whether a peer is identified: not every library tells."""

Step = Callable[[], Awaitable[None]]
"""One repetition of a workload."""


class Pair(ABC):
    """Two connected hosts."""

    @abstractmethod
    def open_requests(self) -> AbstractAsyncContextManager[Step]:
        """A stream for the block; each step is a request and its answer."""

    @abstractmethod
    def open_bulk(self) -> AbstractAsyncContextManager[Step]:
        """A stream for the block; each step is a transfer of CHUNKS."""


class Mesh(ABC):
    """Hosts that are all connected, and all subscribed to one topic."""

    @abstractmethod
    async def publish(self, data: bytes) -> None:
        """The first one publishes."""

    @abstractmethod
    def received(self) -> int:
        """Messages that each of the others has received."""


class Swarm(ABC):
    """Nodes of a DHT, and one more that joins at last."""

    @abstractmethod
    async def announce(self, number: int) -> None:
        """A node provides a key and stores a record, both made from `number`."""

    @abstractmethod
    async def join(self) -> None:
        """The newcomer joins."""

    @abstractmethod
    async def find_provider(self, number: int) -> bool:
        """The newcomer looks for who provides a key; whether it found the one who does."""

    @abstractmethod
    async def find_record(self, number: int) -> bool:
        """The newcomer looks a record up; whether it found the right one."""


class Library(ABC):
    """A libp2p implementation."""

    @abstractmethod
    def open_pairs(self, count: int, *, complete: bool = False) -> AbstractAsyncContextManager[list[Step]]:
        """So many pairs of hosts for the block; each step connects one and waits until the server is identified.

        `complete` hosts have gossip, with one topic, and are nodes of a DHT.
        """

    @abstractmethod
    def open_pair(self) -> AbstractAsyncContextManager[Pair]:
        """Two hosts for the block."""

    @abstractmethod
    def open_mesh(self, count: int) -> AbstractAsyncContextManager[Mesh]:
        """So many hosts for the block."""

    @abstractmethod
    def open_swarm(self, count: int) -> AbstractAsyncContextManager[Swarm]:
        """So many nodes for the block, which have all dialled the first."""


def key_of(number: int) -> bytes:
    """What is provided, 32 bytes."""
    return bytes([number + 1]) * 32


def record_of(number: int) -> tuple[str, bytes]:
    """Where a record lies, and what it holds."""
    return f"/aci/bench/{number}", bytes([number]) * 256


def resident_bytes() -> int:
    """Memory that the process occupies."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def join_all(steps: Iterable[Step]) -> None:
    """Let nodes join, some at a time."""
    waiting = iter(steps)

    async def work() -> None:
        for step in waiting:
            await step()

    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(work)


async def settle() -> None:
    """Wait until nothing happens any more, for at most QUIET_S."""
    with trio.move_on_after(QUIET_S):
        while True:
            before = time.process_time()
            await trio.sleep(0.5)
            if time.process_time() - before < 0.5 * QUIET_SHARE:
                return


async def rate(step: Step) -> float:
    """Steps a second of processor time."""
    until = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < until:
        await step()
    count, started, until = 0, time.process_time(), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        await step()
        count += 1
    return count / (time.process_time() - started)


def finish(**figures: float) -> NoReturn:
    """Print the figures and end the process: closing many hosts is not part of the measurement."""
    print(json.dumps(figures), flush=True)
    os._exit(0)


async def measure_connections(library: Library) -> NoReturn:
    """Connections a second, and milliseconds by the clock on the wall for one, the median."""
    durations: list[float] = []
    async with library.open_pairs(PAIRS) as steps:
        await settle()
        started = time.process_time()
        for connect in steps:
            begun = time.perf_counter()
            await connect()
            durations.append(1e3 * (time.perf_counter() - begun))
        finish(connections=PAIRS / (time.process_time() - started), dial_ms=statistics.median(durations))


async def measure_streams(library: Library) -> NoReturn:
    """Requests on one stream, streams opened for one request each, and 10^6 bytes one way, each a second."""
    async with library.open_pair() as pair:

        async def request_on_its_own() -> None:
            async with pair.open_requests() as request:
                await request()

        async with pair.open_requests() as request:
            requests = await rate(request)
        streams = await rate(request_on_its_own)
        async with pair.open_bulk() as transfer:
            transfers = await rate(transfer)
        finish(requests=requests, streams=streams, megabytes=transfers * CHUNKS * CHUNK_BYTES / 1e6)


async def measure_gossip(library: Library, count: int) -> NoReturn:
    """Messages of the first host a second that reach all others, and how many did not."""
    async with library.open_mesh(count) as mesh:
        await settle()
        published, lost = 0, 0

        async def publish(seconds: float) -> None:
            nonlocal published, lost
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                published += 1
                await mesh.publish(published.to_bytes(PAYLOAD_BYTES))
                patience = time.perf_counter() + LOST_S
                while published - lost - mesh.received() >= IN_FLIGHT:
                    await trio.lowlevel.checkpoint()
                    if time.perf_counter() > patience:
                        lost = published - mesh.received()

        await publish(WARM_UP_S)
        before, started = mesh.received(), time.process_time()
        await publish(SECONDS)
        finish(messages=(mesh.received() - before) / (time.process_time() - started), lost=lost)


async def measure_memory(library: Library) -> NoReturn:
    """MiB for each of many nodes with gossip and DHT, each connected to one other."""
    async with library.open_pairs(1, complete=True) as first:
        for connect in first:
            await connect()
        before = resident_bytes()
        async with library.open_pairs(PAIRS, complete=True) as steps:
            for connect in steps:
                await connect()
            await settle()
            finish(memory=(resident_bytes() - before) / (2 * PAIRS) / (1 << 20))


async def measure_finds(library: Library, count: int) -> NoReturn:
    """Milliseconds by the clock on the wall to find a provider and a record, the median, and how many were found.

    It is a node that joined after everything was announced who looks, and who therefore holds none of it.
    """
    found = 0
    provider_ms: list[float] = []
    record_ms: list[float] = []
    async with library.open_swarm(count) as swarm:
        await settle()
        for number in range(FINDS):
            await swarm.announce(number)
        await swarm.join()
        await settle()
        for number in range(FINDS):
            for find, durations in ((swarm.find_provider, provider_ms), (swarm.find_record, record_ms)):
                started = time.perf_counter()
                found += await find(number)
                durations.append(1e3 * (time.perf_counter() - started))
        finish(
            provider_ms=statistics.median(provider_ms),
            record_ms=statistics.median(record_ms),
            missing=2 * FINDS - found,
        )


def run_worker(library: Library) -> NoReturn:
    """Perform the workload that the command line names, with its number of hosts where it has one."""
    name, *counts = sys.argv[1:]
    workloads: dict[str, Callable[..., Awaitable[NoReturn]]] = {
        "connections": measure_connections,
        "streams": measure_streams,
        "gossip": measure_gossip,
        "memory": measure_memory,
        "finds": measure_finds,
    }
    trio.run(workloads[name], library, *map(int, counts))
    raise AssertionError
