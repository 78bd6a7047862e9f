"""Scenario files: one file, the same outcomes in the simulator, among nodes in memory and over loopback sockets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from aci_p2p.network.model import LAN
from aci_p2p.protocol.errors import LocalError
from aci_p2p.testing import (
    PlannedJob,
    PlannedOutcome,
    Scenario,
    load_scenario,
    open_scenario,
    open_swarm,
    run,
    run_scenario,
)
from aci_p2p.testing.simulator import Fault, Simulation

MARKET = load_scenario(Path(__file__).with_name("market.toml"))
WHY = (PlannedJob(0, 20, "Why?", 4),)


async def in_memory(scenario: Scenario) -> list[PlannedOutcome]:
    """Run a scenario on an imagined network."""
    async with open_scenario(scenario) as swarm:
        outcomes = await run_scenario(swarm, scenario)
        await swarm.settle()
        return outcomes


async def over_sockets(scenario: Scenario) -> list[PlannedOutcome]:
    """Run a scenario over libp2p."""
    async with open_scenario(scenario, network="libp2p") as swarm:
        outcomes = await run_scenario(swarm, scenario)
        await swarm.settle()
        return outcomes


@pytest.mark.slow
def test_one_file_has_one_outcome_in_the_simulator_in_memory_and_over_libp2p() -> None:
    outcomes = list(Simulation(MARKET).run().planned)
    assert run(in_memory, MARKET) == outcomes
    assert trio.run(over_sockets, MARKET) == outcomes
    # The second is the cheapest.
    assert [outcome.provider for outcome in outcomes] == [1, 1, 1, 1, None, None, 1]
    assert [outcome.error for outcome in outcomes] == ["", "", "", "", "no_bids", "no_bids", ""]
    assert all(outcome.text and outcome.tokens and outcome.price for outcome in outcomes if not outcome.error)


@pytest.mark.parametrize("seed", [2, 3])
def test_prices_and_speeds_drawn_by_lot_are_the_same(seed: int) -> None:
    jobs = tuple(PlannedJob(number % 3, 20 + number, f"Question {number}?") for number in range(6))
    scenario = Scenario(seed=seed, nodes=6, providers=0.5, hours=0.02, jobs=jobs, asks=False)
    outcomes = list(Simulation(scenario).run().planned)
    assert run(in_memory, scenario) == outcomes
    assert not any(outcome.error for outcome in outcomes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"jobs": ()}, "random jobs"),
        ({"faults": frozenset({Fault.CRASH})}, "faults"),
        ({"adversaries": 0.2}, "adversaries"),
        ({"asks": True}, "standing asks"),
        ({"models": 2}, "2 models"),
        ({"nodes": 65, "models": 1}, "65 nodes"),
    ],
    ids=["random jobs", "faults", "adversaries", "asks", "models", "nodes"],
)
def test_what_real_nodes_cannot_do_is_said(change: dict[str, object], reason: str) -> None:
    scenario = replace(Scenario(nodes=5, providers=0.6, jobs=WHY, asks=False), **change)  # type: ignore[arg-type] # the point
    with pytest.raises(LocalError, match=f"real nodes cannot run this scenario, for it has {reason}"):
        run(in_memory, scenario)


def test_sockets_have_no_network_model() -> None:
    with pytest.raises(LocalError, match="sockets are as fast as they are"):
        trio.run(over_sockets, replace(MARKET, network=LAN))


def test_a_scenario_needs_a_swarm_of_its_size() -> None:
    async def elsewhere() -> None:
        async with open_swarm(providers=1) as swarm:
            await run_scenario(swarm, MARKET)

    with pytest.raises(LocalError, match="the swarm has not"):
        run(elsewhere)


def test_a_planned_job_whose_consumer_cheats_never_ends() -> None:
    simulation = Simulation(
        Scenario(seed=5, nodes=2, adversaries=0.5, strategies=("offer spam",), hours=0.02, jobs=WHY)
    )
    (outcome,) = simulation.run().planned
    assert outcome == PlannedOutcome.failed("never_ended")
