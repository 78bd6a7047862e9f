"""Swarms: nodes that have found each other, what may happen to them, and that what must hold is noticed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from aci_p2p import Answer, Fallback, NoBids, Requirements
from aci_p2p.executor import Executor, Message, ModelStore, open_process_executor
from aci_p2p.network.memory_medium import KEEP_ALIVE_S
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.protocol.job import JobRecord
from aci_p2p.protocol.lifecycle import State
from aci_p2p.protocol.publications import CapabilityRecord
from aci_p2p.testing import ROUGH, InvariantBroken, NodeDown, Swarm, SwarmNode, ToyExecutor, ToyModel, open_swarm, run
from aci_p2p.testing.ledger import Ledger
from aci_p2p.testing.swarm import MODEL, NETWORK
from tests.executor.tiny import write_tiny_model

PAID = (State.AWARDED, State.ACCEPTED, State.STREAMING, State.COMMITTED, State.REVEALED, State.RECEIPTED)
"""States of a provider's job until it is paid."""
CHEAPEST = Requirements(latency_value=0, retry_cost=0)
"""Whoever is cheapest, whatever has come of asking the others."""
OpenSwarm = Callable[..., AbstractAsyncContextManager[Swarm]]


async def test_cheapest_of_those_who_found_each_other_answers(swarm: Swarm) -> None:
    consumer = swarm.consumers[0]
    assert {node.node_id for node in swarm.providers} <= set(consumer.node.network.peers)
    answer = await consumer.ask("Who are you?", max_tokens=8)
    assert answer.provider == swarm.providers[0].node_id
    assert answer.text
    await swarm.settle()


async def test_options_reach_the_client(swarm: Swarm) -> None:
    with pytest.raises(NoBids):
        await swarm.consumers[0].ask("For nothing?", requirements=Requirements(max_price=1))


async def test_day_passes_and_jobs_become_final(swarm: Swarm) -> None:
    await swarm.consumers[0].ask("Who are you?", max_tokens=8)
    before = swarm.clock()
    await swarm.advance(hours=25, seconds=100)
    assert swarm.clock() - before == 25 * 3_600_000 + 100_000
    assert [job.state for node in (*swarm.consumers, swarm.providers[0]) for job in node.jobs] == [State.FINAL] * 2


async def test_stopped_node_is_missed_and_comes_back(swarm: Swarm) -> None:
    first, second, _ = swarm.providers
    identity = first.node_id
    await swarm.stop(first)
    assert first not in swarm.running
    with pytest.raises(NodeDown):
        await first.ask("Are you there?")
    assert (await swarm.consumers[0].ask("Who is left?", requirements=CHEAPEST)).provider == second.node_id
    await swarm.start(first)
    await swarm.rendezvous()
    assert first.node_id == identity
    assert (await swarm.consumers[0].ask("Who is back?", requirements=CHEAPEST)).provider == identity
    await swarm.restart(first)
    assert first.is_up


async def test_partition_hides_the_others_and_heals(swarm: Swarm) -> None:
    consumer, (first, *others) = swarm.consumers[0], swarm.providers
    swarm.partition([consumer, *others], [first])
    await swarm.advance(seconds=KEEP_ALIVE_S + 1)
    assert first.node_id not in consumer.node.network.peers
    assert not first.node.network.peers
    assert (await consumer.ask("Who hears me?", requirements=CHEAPEST)).provider == others[0].node_id
    swarm.heal()
    await swarm.rendezvous()
    assert (await consumer.ask("Who hears me now?", requirements=CHEAPEST)).provider == first.node_id
    await swarm.settle()


async def test_unnamed_nodes_are_a_group_of_their_own(swarm: Swarm) -> None:
    consumer = swarm.consumers[0]
    swarm.partition([consumer])
    await swarm.advance(seconds=KEEP_ALIVE_S + 1)
    assert not consumer.node.network.peers
    assert len(swarm.providers[0].node.network.peers) == 2


async def test_job_across_a_partition_ends(swarm: Swarm) -> None:
    consumer = swarm.consumers[0]
    async with consumer.stream("Tell me everything", max_tokens=200) as stream:
        await anext(stream)
        swarm.partition([consumer])
        with pytest.raises(AciError):
            async for _ in stream:
                pass
    swarm.heal()
    await swarm.settle()
    assert [job.state for job in consumer.jobs] == [State.PROVIDER_FAULT]


async def test_clock_that_is_off_is_not_believed(swarm: Swarm) -> None:
    consumer = swarm.consumers[0]
    swarm.skew(consumer, 3_600)
    assert consumer.node.clock() == swarm.clock() + 3_600_000
    with pytest.raises(NoBids):
        await consumer.ask("What time is it?")
    swarm.skew(consumer, 0)
    await swarm.advance(seconds=120)
    await consumer.ask("And now?")


async def test_rough_internet(open_swarm: OpenSwarm) -> None:
    async with open_swarm(providers=4, consumers=2, network=ROUGH, seed=3) as swarm:
        for number in range(3):
            for consumer in swarm.consumers:
                assert (await consumer.ask(f"Question {number}?", max_tokens=4)).text
        await swarm.settle()


async def test_own_executor(open_swarm: OpenSwarm) -> None:
    model = ToyModel("another")

    def open_executor(number: int) -> AbstractAsyncContextManager[Executor]:
        return nullcontext(ToyExecutor(model, fail_after=0 if number == 0 else None))

    async with open_swarm(providers=2, executor=open_executor, model_root=model.root) as swarm:
        # The cheapest has it, and fails.
        assert (await swarm.consumers[0].ask("Does it work?")).provider == swarm.providers[1].node_id
        with pytest.raises(AciError):
            await swarm.consumers[0].ask("And alone?", fallback=Fallback(providers=1))
        assert swarm.model_root == model.root


def serve(executor: Executor) -> Callable[[int], AbstractAsyncContextManager[Executor]]:
    """Every provider has this executor."""
    return lambda _number: nullcontext(executor)


async def test_speed_is_what_was_asked_for(open_swarm: OpenSwarm) -> None:
    slow = ToyExecutor(ToyModel(), tokens_per_second=0.1)
    async with open_swarm(providers=1, executor=serve(slow)) as swarm:
        began = trio.current_time()
        answer = await swarm.consumers[0].ask("How fast?", max_tokens=3)
        assert 10 * len(answer.tokens) <= trio.current_time() - began < 10 * len(answer.tokens) + 5


@pytest.mark.parametrize(
    "lie", [{"runs": ToyModel("small")}, {"runs": ToyModel(rounding=12)}], ids=["wrong model", "quantised model"]
)
async def test_a_lie_is_paid_for_and_found_by_running_the_true_model(
    open_swarm: OpenSwarm, lie: dict[str, Any]
) -> None:
    true = ToyExecutor(ToyModel())

    async def differs(answer: Answer) -> bool:
        prompt = await true.encode(MODEL, [Message("user", "Who are you?")])
        found = await true.forward(MODEL, (*prompt, *answer.tokens), start=len(prompt) - 1)
        return tuple(found.logits[:-1].argmax(axis=1)) != answer.tokens

    for honest in (True, False):
        executor = ToyExecutor(ToyModel(), **({} if honest else lie))
        async with open_swarm(providers=1, executor=serve(executor)) as swarm:
            answer = await swarm.consumers[0].ask("Who are you?", max_tokens=12)
            await swarm.settle()
            assert answer.receipt.body.price > 0
            assert await differs(answer) is not honest


async def test_an_answer_can_be_cut_short(open_swarm: OpenSwarm) -> None:
    async with open_swarm(providers=1, executor=serve(ToyExecutor(ToyModel(), stop_after=2))) as swarm:
        answer = await swarm.consumers[0].ask("Who are you?", max_tokens=12)
        assert len(answer.tokens) == 2
        assert answer.receipt.body.price > 0
        await swarm.settle()


async def test_prices_and_slots_are_as_given(open_swarm: OpenSwarm) -> None:
    async with open_swarm(prices=(3_000, 1_050), slots=1) as swarm:
        answer = await swarm.consumers[0].ask("Who is cheapest?", max_tokens=4)
        assert answer.provider == swarm.providers[1].node_id
        # The third asks what it asks without prices.
        assert [record.body.output_token_price for record in await _records(swarm)] == [1_050, 1_200, 3_000]
        assert {record.body.slots for record in await _records(swarm)} == {1}


async def _records(swarm: Swarm) -> list[Envelope[CapabilityRecord]]:
    records = await swarm.consumers[0].node.find_providers(swarm.model_root)
    return sorted(records, key=lambda record: record.body.output_token_price)


@pytest.mark.slow
async def test_default_executor_on_a_tiny_model(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "models")
    model = store.add_directory(write_tiny_model(tmp_path / "tiny"), MODEL)

    def open_executor(_number: int) -> AbstractAsyncContextManager[Executor]:
        return open_process_executor(store, threads=1)

    # Its processes know nothing of virtual time.
    async with open_swarm(providers=1, executor=open_executor, model_root=model.root, clock="real") as swarm:
        first, second = [await swarm.consumers[0].ask("Who are you?", max_tokens=3) for _ in range(2)]
        assert first.tokens == second.tokens
        await swarm.settle()


async def test_virtual_time_needs_its_clock() -> None:
    with pytest.raises(LocalError, match="MockClock"):
        async with open_swarm():
            pass


async def test_sockets_need_real_time(autojump_clock: object) -> None:
    with pytest.raises(LocalError, match="virtual time"):
        async with open_swarm(network="libp2p"):
            pass


async def test_first_transition_is_number_one(swarm: Swarm) -> None:
    with pytest.raises(LocalError):
        swarm.crash_at(swarm.providers[0], 0)


@pytest.mark.slow
async def test_crash_and_restart_over_sockets() -> None:
    async with open_swarm(providers=2, clock="real", network="libp2p") as swarm:
        consumer, (first, second) = swarm.consumers[0], swarm.providers
        async with consumer.stream("Tell me everything", max_tokens=200, fallback=Fallback(providers=1)) as stream:
            await anext(stream)
            await swarm.crash(first)
            with pytest.raises(AciError), trio.fail_after(20):
                async for _ in stream:
                    pass
        assert [job.state for job in first.jobs] == [State.STREAMING]
        assert (await consumer.ask("Who is left?", max_tokens=4)).provider == second.node_id
        await swarm.restart(first)
        await swarm.rendezvous()
        assert [job.state for job in first.jobs] == [State.CANCELLED]
        assert (await consumer.ask("Who is back?", max_tokens=4, requirements=CHEAPEST)).provider == first.node_id
        with pytest.raises(LocalError, match="partitioned"):
            swarm.partition([first])
        swarm.assert_invariants()


# What must hold is noticed when it does not.


async def test_job_that_goes_on_is_no_rest(swarm: Swarm) -> None:
    async with swarm.consumers[0].stream("Tell me everything", max_tokens=200) as stream:
        await anext(stream)
        with pytest.raises(InvariantBroken, match="every job ends"):
            await swarm.settle(0.1)


async def test_task_that_nobody_waits_for_is_noticed(swarm: Swarm) -> None:
    node = swarm.providers[0]
    async with swarm.consumers[0].stream("Who?", max_tokens=1) as stream:
        async for _ in stream:
            pass
    await swarm.settle()
    discovery = node.node.discovery
    discovery._nursery.start_soon(trio.sleep_forever)
    with pytest.raises(InvariantBroken, match="tasks"):
        await swarm.settle(2)


async def answered(swarm: Swarm) -> JobRecord:
    """The first provider's record of a job that is done."""
    await swarm.consumers[0].ask("Who are you?", max_tokens=4)
    await swarm.settle()
    (job,) = swarm.providers[0].jobs
    return job


def stored(ledger: Ledger, node: SwarmNode, *records: JobRecord) -> None:
    """A node has stored these."""
    ledger.stored(node.name, node.node_id, records, ())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("states follow the table", {"state": State.STREAMING}),
        ("no money without a receipt", {"price": 7}),
        ("no money without a receipt", {"receipt": b"IOU"}),
    ],
)
async def test_wrong_record_is_noticed(open_swarm: OpenSwarm, name: str, change: dict[str, Any]) -> None:
    async with open_swarm() as swarm:
        job = await answered(swarm)
        stored(swarm.ledger, swarm.providers[0], replace(job, **{"state": State.FINAL, **change}))
        with pytest.raises(InvariantBroken, match=name):
            swarm.assert_invariants()


async def test_two_paid_providers_are_noticed(open_swarm: OpenSwarm) -> None:
    with pytest.raises(InvariantBroken, match="one result for a job"):
        async with open_swarm() as swarm:
            job = await answered(swarm)
            stored(swarm.ledger, swarm.providers[1], *(replace(job, state=state) for state in PAID))
            swarm.assert_invariants()


async def test_money_out_of_nowhere_is_noticed(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        job = await answered(swarm)
        stored(swarm.ledger, swarm.consumers[0], replace(swarm.consumers[0].jobs[0], state=State.FINAL))
        ledger = Ledger(NETWORK)
        stored(ledger, swarm.providers[0], *(replace(job, state=state) for state in PAID))
        with pytest.raises(InvariantBroken, match="paid by nobody"):
            ledger.check()


async def test_queue_without_bounds_is_noticed(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    await swarm.consumers[0].ask("Who are you?", max_tokens=4)
    monkeypatch.setattr("aci_p2p.testing.swarm.MAX_OUTSTANDING", 0)
    with pytest.raises(InvariantBroken, match="bids out"):
        swarm.assert_invariants()
    monkeypatch.undo()


# Equal seeds give equal runs.

_PROBE = """
from aci_p2p.testing import ROUGH, open_swarm, run

async def main():
    async with open_swarm(providers=3, consumers=2, seed={seed}, network=ROUGH) as swarm:
        await swarm.consumers[0].ask("Who?", max_tokens=4)
        await swarm.crash(swarm.providers[1])
        swarm.partition([swarm.consumers[0]])
        await swarm.advance(seconds=60)
        swarm.heal()
        await swarm.restart(swarm.providers[1])
        await swarm.advance(hours=1)
        await swarm.consumers[1].ask("And who?", max_tokens=4)
        await swarm.settle()
        print(swarm.trace)

run(main, seed={seed})
"""


def trace_of(seed: int, hash_seed: str) -> str:
    """The trace of a run in a process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROBE.format(seed=seed)],
        check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
    ).stdout  # fmt: skip


@pytest.mark.slow
def test_runs_repeat_whatever_the_hash_seed() -> None:
    traces = [trace_of(5, hash_seed) for hash_seed in ("0", "1", "42")]
    assert len(traces[0]) == 65
    assert len(set(traces)) == 1
    assert trace_of(6, "0") != traces[0]


def test_run_returns_what_the_function_returns_and_takes_no_time() -> None:
    async def sleep(hours: float) -> float:
        await trio.sleep(3_600 * hours)
        return trio.current_time()

    assert run(sleep, 1_000) == 3_600_000


def test_scheduling_is_as_before_behind_a_run() -> None:
    random = trio._core._run._r
    before = random.getstate()

    async def nothing() -> None:
        await trio.lowlevel.checkpoint()

    run(nothing)
    assert random.getstate() == before
