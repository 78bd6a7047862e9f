"""The planned jobs of a scenario on real nodes: the file that the simulator reads, and the same outcomes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from typing import Final, Literal

import trio

from aci_p2p.network.model import NetworkModel
from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.protocol.request import NoBids
from aci_p2p.testing.simulator.casting import cast, toy_model
from aci_p2p.testing.simulator.scenario import MAX_LATENCY_MS, PlannedJob, PlannedOutcome, Scenario
from aci_p2p.testing.swarm import Swarm, open_swarm
from aci_p2p.testing.swarm_node import CHEAPEST
from aci_p2p.testing.toy_model import ToyExecutor

MAX_NODES: Final = 64
"""Most nodes of a scenario on real nodes: each has keys, a database and a connection to every other."""
MS_PER_S: Final = 1_000


@asynccontextmanager
async def open_scenario(
    scenario: Scenario, *, network: Literal["memory", "libp2p"] = "memory"
) -> AsyncGenerator[Swarm]:
    """A swarm for a scenario within the block: its size, prices, speeds, slots, network and seed.

    "memory" needs virtual time, as `open_swarm` does; "libp2p" has loopback sockets and real time. Raises LocalError
    for a scenario with something that real nodes cannot do.
    """
    _check(scenario, network)
    servings = cast(scenario)
    model = toy_model(0)
    async with open_swarm(
        providers=scenario.provider_count,
        consumers=scenario.nodes - scenario.provider_count,
        seed=scenario.seed,
        clock="real" if network == "libp2p" else "virtual",
        network="libp2p" if network == "libp2p" else scenario.network,
        executor=lambda number: nullcontext(ToyExecutor(model, tokens_per_second=MS_PER_S / servings[number].pace_ms)),
        prices=[serving.price for serving in servings],
        slots=scenario.slots,
    ) as swarm:
        yield swarm


async def run_scenario(swarm: Swarm, scenario: Scenario) -> list[PlannedOutcome]:
    """Ask what a scenario plans of a swarm that `open_scenario` opened; what came of each job, in their order.

    The nodes have found each other, so that the first job is asked at once, and the others as long after it as planned.
    """
    if (len(swarm.providers), len(swarm.nodes)) != (scenario.provider_count, scenario.nodes):
        msg = (
            f"the scenario has {scenario.provider_count} providers among {scenario.nodes} nodes, and the swarm has not"
        )
        raise LocalError(msg, hint="open_scenario opens a swarm for it")
    outcomes = [PlannedOutcome.failed("")] * len(scenario.jobs)
    began = trio.current_time() - min((job.at_s for job in scenario.jobs), default=0.0)

    async def ask(number: int, job: PlannedJob) -> None:
        await trio.sleep_until(began + job.at_s)
        outcomes[number] = await _outcome(swarm, scenario, job)

    async with trio.open_nursery() as nursery:
        for number, job in enumerate(scenario.jobs):
            nursery.start_soon(ask, number, job)
    return outcomes


async def _outcome(swarm: Swarm, scenario: Scenario, job: PlannedJob) -> PlannedOutcome:
    try:
        answer = await swarm.consumers[job.consumer].ask(
            job.prompt,
            max_tokens=job.max_tokens,
            model=toy_model(job.model).root.hex(),
            requirements=replace(
                CHEAPEST, max_price=job.max_price, max_latency_ms=MAX_LATENCY_MS, bid_window_ms=scenario.bid_window_ms
            ),
        )
    except NoBids:
        # Whether it was offered before it failed is no part of an outcome.
        return PlannedOutcome.failed(NoBids.code)
    except AciError as error:
        return PlannedOutcome.failed(error.code)
    provider = [node.node_id for node in swarm.providers].index(answer.provider)
    return PlannedOutcome(provider, answer.text, len(answer.tokens), answer.receipt.body.price, "")


def _check(scenario: Scenario, network: str) -> None:
    """Raises LocalError with everything in the scenario that real nodes cannot do."""
    impossible = {
        "random jobs: it plans none": not scenario.jobs,
        "faults: a test does to its nodes what it likes": bool(scenario.faults),
        "adversaries": bool(scenario.adversaries),
        "standing asks: which of them a consumer knows is a matter of moments": scenario.asks,
        f"{scenario.model_count} models: they serve one": scenario.model_count > 1,
        f"{scenario.nodes} nodes: {MAX_NODES} at most": scenario.nodes > MAX_NODES,
        "a network of its own: sockets are as fast as they are": network == "libp2p"
        and scenario.network != NetworkModel(),
    }
    if found := [what for what, is_there in impossible.items() if is_there]:
        msg = f"real nodes cannot run this scenario, for it has {'; '.join(found)}"
        raise LocalError(msg, hint="the simulator can")
