"""Nodes die at every transition that they store, and the market goes on: no job stuck, nobody paid twice."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio

from aci_p2p import Fallback
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.testing import NodeDown, Swarm, SwarmNode, open_swarm, run

MAX_TOKENS = 6
FOREVER = 1_000
"""More transitions than any test has."""


async def ask_while_dying(swarm: Swarm, victim: SwarmNode, transition: int) -> bool:
    """Ask once while a node is to die at a transition; whether it died."""
    swarm.crash_at(victim, transition)
    try:
        await swarm.consumers[0].ask("Do you hear me?", max_tokens=MAX_TOKENS)
    except NodeDown:
        assert victim is swarm.consumers[0]
    except AciError:
        assert victim is swarm.providers[0]
    await swarm.advance(seconds=5)
    died = not victim.is_up
    if not died:
        swarm.crash_at(victim, FOREVER)
    return died


async def die_and_return(role: Party, transition: int) -> tuple[bool, State, list[State]]:
    """Whether the victim died, and how the job ended for the consumer and its providers."""
    async with open_swarm(providers=2, seed=transition) as swarm:
        (consumer,) = swarm.consumers
        victim = consumer if role is Party.CONSUMER else swarm.providers[0]
        died = await ask_while_dying(swarm, victim, transition)
        await swarm.advance(seconds=85)
        if died:
            await swarm.restart(victim)
        await swarm.rendezvous()
        await swarm.settle()
        # The market goes on as before.
        answer = await consumer.ask("And now?", max_tokens=MAX_TOKENS)
        assert answer.provider == swarm.providers[0].node_id
        await swarm.settle()
        await swarm.advance(hours=25)
        await swarm.settle()
        job, other = consumer.jobs
        assert other.state is State.FINAL
        ends = [record.state for one in swarm.providers for record in one.jobs if record.job_id == job.job_id]
        return died, job.state, ends


CONSUMER_DIES: tuple[tuple[State, list[State]], ...] = (
    (State.CANCELLED, []),
    (State.CANCELLED, []),
    (State.CANCELLED, [State.CONSUMER_FAULT]),
    # It had all of the answer, too little for a voucher, and knows nothing of it any more.
    (State.CANCELLED, [State.CONSUMER_FAULT]),
    # The receipt was signed and stored: it goes out after the restart.
    (State.FINAL, [State.FINAL]),
    (State.FINAL, [State.FINAL]),
    (State.FINAL, [State.FINAL]),
)
"""How a job ends for the consumer and for its providers when the consumer dies at its first transition, its second...;
the last is one that it does not have."""
PROVIDER_DIES: tuple[tuple[State, list[State]], ...] = (
    # Wherever it dies before its proof is out, the next goes on.
    *((State.FINAL, [State.CANCELLED, State.FINAL]),) * 4,
    (State.FINAL, [State.FINAL]),
    (State.FINAL, [State.FINAL]),
)
"""The same when the cheapest provider dies."""


@pytest.mark.slow
@pytest.mark.parametrize(("role", "ends"), [(Party.CONSUMER, CONSUMER_DIES), (Party.PROVIDER, PROVIDER_DIES)])
def test_death_at_every_transition(role: Party, ends: Sequence[tuple[State, list[State]]]) -> None:
    came = [run(die_and_return, role, transition) for transition in range(1, len(ends) + 1)]
    assert [died for died, _, _ in came] == [True] * (len(ends) - 1) + [False]
    assert tuple((consumer, providers) for _, consumer, providers in came) == ends


async def test_what_a_dead_node_wants_to_write_does_not_reach_its_disk(swarm: Swarm) -> None:
    consumer = swarm.consumers[0]
    swarm.crash_at(consumer, 2)
    with pytest.raises(NodeDown):
        await consumer.ask("Are you there?")
    await swarm.advance(seconds=60)
    (job,) = consumer.jobs
    assert job.state is State.AWARDED
    await swarm.restart(consumer)
    (stored,) = await consumer.node.store.jobs()
    assert stored.state is State.CANCELLED
    history = await consumer.node.store.history(job.job_id, Party.CONSUMER)
    assert [state for state, _ in history] == [State.OFFERED, State.AWARDED, State.CANCELLED]
    assert swarm.ledger.history(consumer.name, job.job_id, Party.CONSUMER) == [state for state, _ in history]


async def test_who_is_back_is_paid_at_once(swarm: Swarm) -> None:
    """However long it was away, and however seldom it was tried by then."""
    consumer, provider = swarm.consumers[0], swarm.providers[0]
    answer = await consumer.ask("Who answers?", max_tokens=4)
    assert answer.provider == provider.node_id
    provider.kill()
    await provider.wait_until_down()
    await swarm.advance(hours=3)
    assert len(await consumer.node.store.owed(0)) == 1
    await swarm.restart(provider)
    began = trio.current_time()
    await swarm.rendezvous()
    while await consumer.node.store.owed(0):  # noqa: ASYNC110 - nobody tells
        await trio.sleep(0.1)
    assert trio.current_time() - began < 30
    await swarm.settle()


async def test_nothing_of_a_dead_node_is_heard(swarm: Swarm) -> None:
    provider, node = swarm.providers[0], swarm.consumers[0].node
    heard = swarm.trace
    alone = Fallback(providers=1)
    async with swarm.consumers[0].stream("Tell me everything", max_tokens=200, fallback=alone) as stream:
        assert await anext(stream)
        provider.kill()
        heard = swarm.trace
        with trio.move_on_after(0.005):
            await provider.wait_until_down()
        assert provider.node_id not in node.network.peers
        assert swarm.trace == heard
        with pytest.raises(AciError):
            async for _ in stream:
                pass


async def test_crash_is_at_once(swarm: Swarm) -> None:
    consumer, provider = swarm.consumers[0], swarm.providers[0]
    with trio.CancelScope() as scope:
        scope.cancel()
        await swarm.crash(provider)
    assert not provider.is_up
    assert provider.node_id not in consumer.node.network.peers
    with pytest.raises(NodeDown):
        _ = provider.node


async def test_what_is_asked_through_a_node_that_stops_is_handed_back(swarm: Swarm) -> None:
    consumer, (provider, *_) = swarm.consumers[0], swarm.providers
    with pytest.raises(NodeDown):
        async with consumer.stream("Tell me everything", max_tokens=200) as stream:
            assert await anext(stream)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(swarm.stop, consumer)
                await trio.sleep_forever()
    assert [job.state for job in consumer.jobs] == [State.CANCELLED]
    await swarm.settle()
    assert [job.state for job in provider.jobs] == [State.CANCELLED]


async def test_last_breath_does_not_reach_the_address_cache(swarm: Swarm) -> None:
    consumer = swarm.consumers[0]
    cache = consumer.node.config.address_cache_path
    # It knows the others, and would write that in a moment, or when it leaves.
    assert not cache.exists()
    await swarm.crash(consumer)
    assert not cache.exists()
    await swarm.restart(consumer)
    await swarm.rendezvous()
    await swarm.stop(consumer)
    left = cache.read_bytes()
    await swarm.start(consumer)
    await swarm.advance(seconds=0.5)
    await swarm.crash(consumer)
    assert cache.read_bytes() == left
