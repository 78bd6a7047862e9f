"""Nodes die at every transition that they store, and the market goes on: no job stuck, nobody paid twice."""

from __future__ import annotations

import pytest
import trio

from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.testing import NodeDown, Swarm, SwarmNode, open_swarm, run

MAX_TOKENS = 6
"""One transition for each token, besides those before and after."""
RECEIPTED = (State.RECEIPTED, State.PENDING, State.FINAL)


async def ask_while_dying(swarm: Swarm, victim: SwarmNode, transition: int) -> AciError | None:
    """Ask once while a node is to die at a transition; how that failed, if it did."""
    swarm.crash_at(victim, transition)
    try:
        await swarm.consumers[0].ask("Do you hear me?", max_tokens=MAX_TOKENS)
    except AciError as error:
        return error
    return None


async def die_and_return(seed: int, role: Party, transition: int) -> tuple[bool, list[State]]:
    """Whether the victim died, and what the consumer's first job came to. The next job must be answered."""
    async with open_swarm(providers=2, seed=seed) as swarm:
        victim = swarm.consumers[0] if role is Party.CONSUMER else swarm.providers[0]
        failure = await ask_while_dying(swarm, victim, transition)
        died = not victim.is_up
        if not died:
            swarm.crash_at(victim, 1_000)
        assert (failure is not None) is died or role is Party.PROVIDER
        assert not died or role is Party.PROVIDER or isinstance(failure, NodeDown)
        await swarm.advance(seconds=90)
        if died:
            await swarm.restart(victim)
        await swarm.rendezvous()
        job = swarm.consumers[0].jobs[0]
        answer = await swarm.consumers[0].ask("And now?", max_tokens=MAX_TOKENS)
        assert answer.provider == swarm.providers[0].node_id
        await swarm.settle()
        await swarm.advance(hours=25)
        await swarm.settle()
        assert not [record for node in swarm.nodes for record in node.jobs if record.state is State.PENDING]
        for provider in swarm.providers:
            for record in provider.jobs:
                if record.state in RECEIPTED:
                    assert record.price == job.price or record.job_id != job.job_id
        return died, swarm.ledger.history(swarm.consumers[0].name, job.job_id, Party.CONSUMER)


@pytest.mark.slow
@pytest.mark.parametrize("role", [Party.CONSUMER, Party.PROVIDER])
def test_death_at_every_transition(role: Party) -> None:
    ends: list[State] = []
    for transition in range(1, 40):
        died, history = run(die_and_return, transition, role, transition)
        ends.append(history[-1])
        if not died:
            break
    assert not died
    assert ends[-1] is State.FINAL
    print(role, ends)
    # Before the receipt a death ends the job; after it the job is as good as done.
    assert len(ends) > MAX_TOKENS


async def test_what_a_dead_node_wants_to_write_does_not_reach_its_disk(swarm: Swarm) -> None:
    consumer = swarm.consumers[0]
    swarm.crash_at(consumer, 2)
    with pytest.raises(NodeDown):
        await consumer.ask("Are you there?")
    (job,) = consumer.jobs
    await swarm.advance(seconds=60)
    assert consumer.jobs == [job]
    await swarm.restart(consumer)
    (stored,) = await consumer.node.store.jobs()
    assert stored.state is State.CANCELLED
    assert await consumer.node.store.history(job.job_id, Party.CONSUMER) == [
        (record, at) for record, at in await consumer.node.store.history(job.job_id, Party.CONSUMER)
    ]


async def test_nothing_of_a_dead_node_is_heard(swarm: Swarm) -> None:
    provider = swarm.providers[0]
    async with swarm.consumers[0].stream("Tell me everything", max_tokens=200) as stream:
        assert await anext(stream)
        await swarm.crash(provider)
        assert provider.node_id not in swarm.consumers[0].node.network.peers
        with pytest.raises(AciError):
            async for _ in stream:
                pass
    swarm.assert_invariants()


async def test_crash_is_at_once(swarm: Swarm) -> None:
    consumer, provider = swarm.consumers[0], swarm.providers[0]
    with trio.CancelScope() as scope:
        scope.cancel()
        await swarm.crash(provider)
    assert not provider.is_up
    assert provider.node_id not in consumer.node.network.peers
    with pytest.raises(NodeDown):
        _ = provider.node
