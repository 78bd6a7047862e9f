"""Scenario files: one file, the same outcome in memory and over loopback sockets."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from aci_p2p.protocol.errors import LocalError
from aci_p2p.testing import Plan, PlannedJob, PlannedOutcome, open_swarm, read_plan, run, run_plan

MARKET = Path(__file__).with_name("market.toml")


async def in_memory(plan: Plan) -> list[PlannedOutcome]:
    """Run a plan on an imagined network."""
    async with open_swarm(providers=plan.providers, consumers=plan.consumers, seed=plan.seed) as swarm:
        outcomes = await run_plan(swarm, plan)
        await swarm.settle()
        return outcomes


async def over_sockets(plan: Plan) -> list[PlannedOutcome]:
    """Run a plan over libp2p."""
    async with open_swarm(
        providers=plan.providers, consumers=plan.consumers, seed=plan.seed, clock="real", network="libp2p"
    ) as swarm:
        outcomes = await run_plan(swarm, plan)
        swarm.assert_invariants()
        return outcomes


@pytest.mark.slow
def test_one_scenario_has_one_outcome_in_memory_and_over_libp2p() -> None:
    plan = read_plan(MARKET)
    outcomes = run(in_memory, plan)
    assert trio.run(over_sockets, plan) == outcomes
    assert [outcome.provider for outcome in outcomes] == ["provider-0"] * 3 + [""]
    assert [outcome.error for outcome in outcomes] == ["", "", "", "local"]
    assert all(outcome.text and outcome.price for outcome in outcomes[:3])


def test_file_says_what_happens() -> None:
    plan = read_plan(MARKET)
    assert (plan.providers, plan.consumers, plan.seed) == (3, 2, 1)
    assert plan.jobs[1] == PlannedJob("And who was second?", consumer=1, at_s=0.2, max_tokens=20)


@pytest.mark.parametrize(
    "content",
    ["jobs", "speed = 3", "[[job]]\nprompts = 'a'", "[[job]]\nat_s = 1", "[[job]]\nprompt = 'a'\nconsumer = 1"],
    ids=["no TOML", "unknown field", "unknown field of a job", "no prompt", "unknown consumer"],
)
def test_what_is_no_scenario_is_our_own_fault(content: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(content)
    with pytest.raises(LocalError, match="is no scenario"):
        read_plan(path)
