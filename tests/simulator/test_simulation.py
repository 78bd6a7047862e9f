"""One world is one world: seeds, traces, planned jobs, time."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from aci_p2p.executor import Message, Sampling
from aci_p2p.network.model import LAN, NetworkModel
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.job import PaymentState
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.protocol.messages import Offer
from aci_p2p.testing.simulator import (
    Fault,
    PlannedJob,
    Scenario,
    Simulation,
    page,
    random_scenario,
    summarise,
)
from aci_p2p.testing.simulator.node import Disk
from aci_p2p.testing.simulator.world import START_MS
from aci_p2p.testing.toy_model import ToyModel


def fill(disk: Disk) -> None:
    disk.is_full = True


def empty(disk: Disk) -> None:
    disk.is_full = False


BAD_DAY = Scenario(seed=3, nodes=16, hours=0.05, adversaries=0.2, faults=frozenset(Fault), job_interval_s=60)


def test_a_seed_fixes_everything() -> None:
    first, second, other = (Simulation(scenario).run() for scenario in (BAD_DAY, BAD_DAY, random_scenario(4)))
    assert first == second
    assert first.trace != other.trace


@pytest.mark.slow
def test_the_hash_seed_of_the_interpreter_changes_nothing() -> None:
    program = (
        "from aci_p2p.testing.simulator import *;"
        "print([Simulation(random_scenario(seed)).run().trace for seed in (2, 3, 5)])"
    )
    traces = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(traces) == 1


def test_a_calm_world_answers_every_job_rightly() -> None:
    simulation = Simulation(Scenario(nodes=12, hours=0.1, job_interval_s=60))
    result = simulation.run()
    summary = summarise(result)
    assert summary.jobs == summary.answered > 40
    assert not summary.wrong
    assert sum(result.income.values()) == result.spending == summary.spent > 0
    assert not result.fired
    assert not result.unread
    # Every lookup finds the three or four providers of the model.
    assert result.found >= 3 * result.lookups - 12


def test_planned_jobs_are_won_by_the_cheapest() -> None:
    jobs = tuple(PlannedJob(number % 2, 5.0 * number + 15, f"question {number}", 16) for number in range(4))
    simulation = Simulation(
        Scenario(nodes=5, hours=0.02, providers=0.6, prices=(1_200, 1_000, 1_100), jobs=jobs, network=LAN)
    )
    outcomes = simulation.run().outcomes
    assert [outcome.consumer for outcome in outcomes] == [3, 4, 3, 4]
    model = ToyModel()
    for job, outcome in zip(jobs, outcomes, strict=True):
        prompt = model.encode([Message("user", job.prompt)])
        steps = list(model.answer(prompt, job.max_tokens, Sampling()))
        assert outcome.provider == simulation.nodes[1].node_id
        assert outcome.text == outcome.expected == "".join(step.text for step in steps)
        assert outcome.price == (len(prompt) * 250 + len(steps) * 1_000) * 5 // 4


def test_jobs_become_final_after_a_day() -> None:
    simulation = Simulation(Scenario(nodes=4, hours=26, job_interval_s=20_000))
    simulation.run()
    records = [record for node in simulation.nodes for record in node.disk.jobs.values()]
    for role in (Party.CONSUMER, Party.PROVIDER):
        states = {record.state for record in records if record.role is role}
        assert {State.FINAL, State.PENDING} <= states


def test_a_full_disk_ends_the_job_and_nothing_else() -> None:
    simulation = Simulation(Scenario(nodes=3, hours=0.02, jobs=(PlannedJob(0, 20, "why?"), PlannedJob(0, 50, "why?"))))
    (provider,) = simulation.providers.values()
    (consumer, *_) = simulation.consumers.values()
    simulation.world.after(19_000, fill, consumer.node.disk)
    simulation.world.after(40_000, empty, consumer.node.disk)
    failures = [outcome.failure for outcome in simulation.run().outcomes]
    assert failures == ["store", ""]
    assert not provider.running


def one_job(**values: Any) -> Simulation:  # noqa: ANN401 - any field of a scenario
    job = PlannedJob(0, 20, "question 2", 64)
    return Simulation(
        Scenario(nodes=4, hours=0.02, providers=0.5, prices=(1_000, 1_100), jobs=(job,), network=LAN, **values)
    )


def test_another_goes_on_where_a_provider_has_died() -> None:
    simulation = one_job()
    simulation.providers[0].fail_after = 16
    (outcome,) = simulation.run().outcomes
    assert outcome.text == outcome.expected
    assert outcome.provider == simulation.nodes[1].node_id
    paid = simulation.judge.accounts.promised_for(outcome.job_id)
    assert paid.keys() == {node.node_id for node in simulation.nodes[:2]}
    assert sum(paid.values()) == outcome.price


def test_who_was_away_is_told_what_it_is_owed() -> None:
    simulation = one_job()
    provider, consumer = simulation.nodes[0], simulation.nodes[2]

    def look() -> None:
        if any(record.state is State.PENDING for record in consumer.disk.jobs.values()) and simulation.world.now < away:
            simulation.crash(provider)

    away = START_MS + 40_000
    simulation.world.after_event.append(look)
    simulation.world.at(away, simulation.restart, provider)
    result = simulation.run()
    (record,) = provider.disk.jobs.values()
    assert record.state is State.PENDING
    assert record.updated_at > away
    assert result.income == {0: result.spending}


def test_what_was_promised_before_a_crash_is_paid_after_it() -> None:
    simulation = one_job()
    consumer = simulation.nodes[2]

    def look() -> None:
        if any(payment.state is PaymentState.RUNNING for payment in consumer.disk.payments.values()) and consumer.up:
            simulation.crash(consumer)
            simulation.world.after(5_000, simulation.restart, consumer)

    simulation.world.after_event.append(look)
    result = simulation.run()
    (payment,) = consumer.disk.payments.values()
    assert payment.state is PaymentState.SETTLED
    assert result.income == {0: payment.amount}


@pytest.mark.parametrize("asks", [True, False])
def test_whose_prices_are_known_is_asked_alone(asks: bool) -> None:  # noqa: FBT001 - a parameter
    simulation = one_job(asks=asks)
    broadcast: list[Offer] = []
    simulation.gossip.eavesdroppers.append((simulation.nodes[3], lambda offer: broadcast.append(offer.body), _deaf))
    (outcome,) = simulation.run().outcomes
    assert outcome.provider == simulation.nodes[0].node_id
    assert bool(broadcast) is not asks


def _deaf(_bid: object) -> None:
    """Heeds no bids."""


def test_symmetric_nats_meet_through_a_relay() -> None:
    far = NetworkModel(symmetric_share=1.0)
    near = Simulation(Scenario(nodes=4, hours=0.05, job_interval_s=60)).run()
    relayed = Simulation(Scenario(nodes=4, hours=0.05, job_interval_s=60, network=far)).run()
    assert summarise(relayed).answered == summarise(near).answered > 0
    assert summarise(relayed).duration_ms > summarise(near).duration_ms


@pytest.mark.parametrize(
    "values",
    [
        {"nodes": 1},
        {"hours": 0},
        {"hours": float("inf")},
        {"hours": float("nan")},
        {"adversaries": 1.0},
        {"providers": 0.0},
        {"models": -1},
        {"slots": 0},
        {"job_interval_s": 0},
        {"bid_window_ms": 10_001},
        {"prices": (0,)},
        {"jobs": (PlannedJob(70, 0, "?"),)},
    ],
)
def test_worlds_that_cannot_be(values: dict[str, object]) -> None:
    with pytest.raises(LocalError):
        Scenario(**values)  # type: ignore[arg-type] # the point


def test_the_page_holds_its_pictures() -> None:
    text = page(Simulation(BAD_DAY).run())
    assert text.count("<svg") == 3
    assert "NaN" not in text
    assert "nan" not in text.replace("finance", "")
