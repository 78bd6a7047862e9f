"""What the network adds to a job: from offer to first token beyond the executor's own time, and the event loop's delay.

A provider and a consumer in one process over loopback libp2p, the default model, its worker process beside them. Run:
`.venv/bin/python tests/benchmarks/job.py [--json]` (or `make bench`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio

from aci_p2p import ACI, NodeConfig, NodeParts, ProviderConfig, open_node
from aci_p2p.config import default_home
from aci_p2p.consumer import Offered
from aci_p2p.executor import Executor, GenerationRequest, Message, ModelStore, open_process_executor
from aci_p2p.protocol.catalogue import DEFAULT_MODEL
from aci_p2p.protocol.job import Chosen, Deliver

PROMPT = "What is the capital of France?"
JOBS = 30
TICK_S = 0.01
LONG_TOKENS = 200


@dataclass(frozen=True)
class Figures:
    """Milliseconds, medians over JOBS jobs unless they say otherwise."""

    executor_first_ms: float
    """The executor alone: from `generate` to its first token."""
    job_first_ms: float
    """A job over the network: from the offer's publication to the first token at the consumer."""
    overhead_ms: float
    """The difference: gossip, bids, award, accept, prompt, durable records."""
    overhead_p99_ms: float
    """The 99th percentile of the jobs' times, less the executor's median."""
    award_ms: float
    """From the offer's publication to the choice."""
    tick_idle_p99_ms: float
    """Delay of a 10 ms ticker in the nodes' event loop without a job, 99th percentile."""
    tick_busy_p99_ms: float
    """The same while the provider generates and streams."""
    tokens_per_second: float
    """Of the streamed job, at the consumer."""
    machine: str
    """Where this was measured."""


async def main() -> Figures:
    """Measure."""
    models = default_home() / "models"
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        executor = await stack.enter_async_context(open_process_executor(ModelStore(models)))

        @asynccontextmanager
        async def shared() -> AsyncGenerator[Executor]:
            yield executor

        serving = NodeConfig(
            home=folder / "provider", model_store=models, provider=ProviderConfig(models=(DEFAULT_MODEL,))
        )
        provider = await stack.enter_async_context(open_node(serving, parts=NodeParts(open_executor=shared)))
        asking = NodeConfig(home=folder / "consumer", bootstrap=tuple(provider.addresses[:1]))
        consumer = await stack.enter_async_context(open_node(asking))
        aci = await stack.enter_async_context(ACI(consumer))
        await _job(aci, 2)
        alone: list[float] = []
        awards: list[float] = []
        firsts: list[float] = []
        for _ in range(JOBS):
            alone.append(await _alone(executor))
            award, first = await _job(aci, 2)
            awards.append(award)
            firsts.append(first)
        idle, _ = await _ticks(trio.sleep, 3.0)
        busy, speed = await _ticks(_stream, aci)
    own = statistics.median(alone)
    return Figures(
        executor_first_ms=_ms(own),
        job_first_ms=_ms(statistics.median(firsts)),
        overhead_ms=_ms(statistics.median(firsts) - own),
        overhead_p99_ms=_ms(_p99(firsts) - own),
        award_ms=_ms(statistics.median(awards)),
        tick_idle_p99_ms=_ms(_p99(idle)),
        tick_busy_p99_ms=_ms(_p99(busy)),
        tokens_per_second=round(speed or 0.0, 1),
        machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    )


async def _alone(executor: Executor) -> float:
    """Seconds from `generate` to the first token, without a network."""
    started = time.perf_counter()
    request = GenerationRequest((Message("user", PROMPT),), 2)
    first = 0.0
    async with executor.generate(DEFAULT_MODEL, request) as chunks:
        async for _ in chunks:
            first = first or time.perf_counter() - started
    return first


async def _job(aci: ACI, tokens: int) -> tuple[float, float]:
    """Seconds from the offer to the choice, and to the first token."""
    offered = award = first = 0.0
    async with aci.stream(prompt=PROMPT, max_tokens=tokens) as stream:
        async for update in stream.updates:
            now = time.perf_counter()
            match update:
                case Offered():
                    offered = now
                case Chosen():
                    award = now - offered
                case Deliver() if not first:
                    first = now - offered
                case _:
                    pass
    return award, first


async def _stream(aci: ACI) -> float:
    """Tokens per second of one long job."""
    async with aci.stream(prompt="Tell me a long story about the sea.", max_tokens=LONG_TOKENS) as stream:
        started, count = 0.0, 0
        async for update in stream.updates:
            if isinstance(update, Deliver):
                started, count = started or time.perf_counter(), count + len(update.tokens)
        return (count - 1) / (time.perf_counter() - started)


async def _ticks(work: Callable[[Any], Awaitable[float | None]], argument: object) -> tuple[list[float], float | None]:
    """How late a 10 ms ticker is while `work` runs, seconds; and what the work gives."""
    late: list[float] = []

    async def tick() -> None:
        due = trio.current_time() + TICK_S
        while True:
            await trio.sleep_until(due)
            late.append(trio.current_time() - due)
            due = max(due + TICK_S, trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        result = await work(argument)
        nursery.cancel_scope.cancel()
    return late, result


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * 99 // 100)]


def _ms(seconds: float) -> float:
    return round(seconds * 1_000, 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args().json
    figures = asdict(trio.run(main))
    if as_json:
        print(json.dumps(figures, indent=2))
    for name, value in () if as_json else figures.items():
        print(f"{name:<20} {value}")
