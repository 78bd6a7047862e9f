"""An honest swarm under attack goes on: it delivers, stays small, and is rid of its attackers within half a minute.

The cases of `tests/network/test_attacks*.py`, which show what becomes of each attack at a single victim, and more, here
against ten nodes that broadcast offers meanwhile. Each runs in a process of its own, whose memory is measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from aci_p2p.network.libp2p import gossip, kademlia
from aci_p2p.network.libp2p.negotiation import encode_message
from tests.network.test_attacks import TCP_GARBAGE, YAMUX_GARBAGE, YAMUX_NONSENSE
from tests.network.test_attacks_dht import KAD_ANSWERS, KAD_GARBAGE
from tests.network.test_attacks_gossip import HARMLESS_GOSSIP, REJECTED_GOSSIP
from tests.scenarios import attackers, floods
from tests.scenarios.attackers import Arena, Attack
from tests.scenarios.honest import HonestSwarm, open_honest_swarm

pytestmark = [pytest.mark.scenario, pytest.mark.slow, pytest.mark.timeout(600)]

HONEST = 10
"""Nodes of the swarm."""
WINDOW_S = 1.5
"""Shortest time over which deliveries are counted, seconds: some 30 offers to nine nodes each."""
DELIVERED = 0.99
"""Share of the offers that must reach each of the other nodes, while the swarm is attacked."""
MEMORY_BYTES = 64 << 20
"""What all attacks together may add to the memory of a node."""

PLAINTEXT = [encode_message("/multistream/1.0.0") + encode_message("/plaintext/2.0.0")]
SAME_AGAIN = {"with an author", "with a bad key", "no number", "too large"}
"""Of bad gossip what is a message, and known when it comes again; `floods.INVALID_MESSAGES` has others each time."""
BAD_RPCS = [data for name, data in REJECTED_GOSSIP.items() if name not in SAME_AGAIN]

ATTACKS: dict[str, Attack] = {
    "garbage on TCP": attackers.tcp_garbage([*TCP_GARBAGE.values(), PLAINTEXT]),
    "connections reset at once": attackers.reset_connections,
    "300 silent connections": attackers.silent_connections,
    "slow-loris handshakes": attackers.slow_loris,
    "garbage on yamux": attackers.yamux_garbage(YAMUX_GARBAGE.values()),
    "nonsense on yamux": attackers.yamux_nonsense(YAMUX_NONSENSE.values()),
    "window overrun": attackers.window_overrun,
    "full windows": attackers.full_windows,
    "stream exhaustion": attackers.stream_exhaustion,
    "asks and does not read": attackers.asks_and_does_not_read,
    "undecided streams": attackers.undecided_streams,
    "failing handlers": attackers.failing_handlers,
    "bad identify answers": attackers.bad_identify_answers,
    "identify push of garbage": attackers.stream_nonsense("/ipfs/id/push/1.0.0", KAD_GARBAGE.values()),
    "ping of garbage": attackers.stream_nonsense("/ipfs/ping/1.0.0", [b"x" * 7]),
    "garbage on gossip": attackers.stream_garbage(gossip.PROTOCOL, BAD_RPCS),
    "invalid messages on gossip": attackers.stream_garbage(gossip.PROTOCOL, floods.INVALID_MESSAGES),
    "nonsense on gossip": attackers.stream_nonsense(gossip.PROTOCOL, HARMLESS_GOSSIP.values()),
    "lost in the middle of gossip": floods.lost_in_the_middle,
    "garbage on the DHT": attackers.stream_garbage(kademlia.PROTOCOL, KAD_GARBAGE.values()),
    "bad answers of the DHT": attackers.bad_answers(kademlia.PROTOCOL, KAD_ANSWERS.values()),
    "forged records": floods.record_forgery,
    "flood of forged records": floods.record_flood,
    "flood of forged offers": floods.flood(floods.forged),
    "flood of signed offers": floods.flood(floods.signed),
    # Nothing tells them from the offers of a busy market.
    "flood of offers by many": floods.flood(floods.signed_by_many, seconds=3),
    "clocks an hour slow": floods.flood(floods.an_hour_late, seconds=2),
    "clocks an hour fast": floods.flood(floods.an_hour_early, seconds=2),
}
TOGETHER = (
    "300 silent connections", "slow-loris handshakes", "window overrun", "stream exhaustion", "garbage on gossip",
    "forged records", "flood of forged offers",
)  # fmt: skip
"""Those that also come all at once: the others would wait for each other, in the one process of the attackers."""


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HonestSwarm]:
    """Honest nodes; all attacks are aimed at them in turn."""
    with open_honest_swarm(HONEST, tmp_path_factory.mktemp("swarm")) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def base(swarm: HonestSwarm) -> list[int]:
    """Memory of each node before any attack, bytes."""
    swarm.begin()
    trio.run(trio.sleep, WINDOW_S)
    assert swarm.end().delivered == 1
    return [node.memory() for node in swarm.nodes]


async def withstand(swarm: HonestSwarm, base: list[int], attacks: dict[str, Attack]) -> None:
    """Run attacks at once; the swarm delivers meanwhile, and stays small."""
    await trio.to_thread.run_sync(swarm.begin)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, WINDOW_S)
        for name, attack in attacks.items():
            nursery.start_soon(attack, Arena(name, swarm))
    window = await trio.to_thread.run_sync(swarm.end)
    assert window.delivered >= DELIVERED, window
    grown = [node.peak_memory() - before for node, before in zip(swarm.nodes, base, strict=True)]
    assert max(grown) <= MEMORY_BYTES


@pytest.mark.parametrize("name", ATTACKS)
async def test_one_attack(swarm: HonestSwarm, base: list[int], name: str) -> None:
    await withstand(swarm, base, {name: ATTACKS[name]})


async def test_several_attacks_at_once(swarm: HonestSwarm, base: list[int]) -> None:
    await withstand(swarm, base, {f"{name}, again": ATTACKS[name] for name in TOGETHER})
