"""What each attack brings and spoils, against the same world in which nobody cheats."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest

from aci_p2p.testing.simulator import STRATEGIES, UNBUILT, Measurement, UnbuiltAttack, measure, trial
from tests.simulator.conftest import PROCESSES, selected

MOST_HARM = 0.05
"""Share of the honest jobs that an attack may spoil."""
SEEDS = (1, 2, 3)
"""Of the worlds that are looked at, too, where an attack seems to spoil more."""
PAYING = [name for name, strategy in STRATEGIES.items() if strategy.pays]
HARMING = [name for name, strategy in STRATEGIES.items() if strategy.harms]

REQUIRED = {
    "offer spam", "bid spam", "bid dumping", "stale bid", "withheld result", "truncated result", "wrong model",
    "quantised model", "wrong prompt", "copied result", "equivocation", "forged receipt", "replay", "replayed award",
    "replay from another network", "replay as another version", "sybil bids", "eclipse", "censoring relay",
    "lying clock", "malformed message", "slow stream", "colluding providers", "lazy validator", "colluding validators",
    "false challenge", "challenge censorship", "payment refusal", "double spend of a voucher",
}  # fmt: skip
"""What the library must hold at least."""


Found = dict[str, Future[Measurement]]


@pytest.fixture(scope="module")
def pool() -> Generator[ProcessPoolExecutor]:
    """Where worlds run."""
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, pool: ProcessPoolExecutor) -> Found:
    """What each strategy that is asked for brings."""
    return {name: pool.submit(measure, trial(name)) for name in selected(request, "name")}


def marked(names: list[str], reason: str) -> list[object]:
    """Each strategy, those that are not stopped yet as expected failures with their reason."""
    return [
        pytest.param(
            name, marks=pytest.mark.xfail(strict=True, raises=AssertionError, reason=getattr(STRATEGIES[name], reason))
        )
        if name in names
        else name
        for name in STRATEGIES
    ]


@pytest.mark.slow
@pytest.mark.simulation
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", marked(PAYING, "pays"))
def test_an_attack_brings_nothing(name: str, found: Found) -> None:
    measured = found[name].result()
    assert measured.nodes
    assert measured.jobs
    assert measured.unearned == 0, measured
    assert measured.profit <= 0, measured


@pytest.mark.slow
@pytest.mark.simulation
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", marked(HARMING, "harms"))
def test_an_attack_spoils_next_to_nothing(name: str, found: Found, pool: ProcessPoolExecutor) -> None:
    measured = [found[name].result()]
    if measured[0].harm > MOST_HARM and name not in HARMING:
        # A few jobs more or less are chance: what counts is the share in several worlds.
        measured += pool.map(measure, [replace(trial(name), seed=seed) for seed in SEEDS])
    assert sum(one.spoiled for one in measured) <= MOST_HARM * sum(one.jobs for one in measured), measured


@pytest.mark.parametrize(
    "attack",
    [pytest.param(one, marks=pytest.mark.xfail(strict=True, reason=one.waits_for), id=one.name) for one in UNBUILT],
)
def test_an_attack_on_what_is_not_built(attack: UnbuiltAttack) -> None:
    assert attack.is_expressible, f"the protocol knows no {attack.kind.lower()}"


def test_the_library_is_complete() -> None:
    assert {*STRATEGIES, *(one.name for one in UNBUILT)} >= REQUIRED
    assert not set(STRATEGIES) & {one.name for one in UNBUILT}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_every_strategy_states_its_goal(strategy: type) -> None:
    assert getattr(strategy, "goal", "")
