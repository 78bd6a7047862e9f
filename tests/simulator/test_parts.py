"""The parts of a simulated world, each for itself."""

from __future__ import annotations

import pytest

from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.messages import Bid, Offer
from aci_p2p.testing.simulator import Scenario, Simulation
from aci_p2p.testing.simulator.adversaries.keepers import Eclipse
from aci_p2p.testing.simulator.node import SimNode
from aci_p2p.testing.simulator.transport import DIAL_MS, KEEP_ALIVE_MS, End
from aci_p2p.testing.simulator.world import START_MS, World


@pytest.fixture
def simulation() -> Simulation:
    return Simulation(Scenario(nodes=24, models=1))


class Listener:
    """Accepts streams on a node, and keeps what comes."""

    def __init__(self, node: SimNode) -> None:
        self.frames: list[bytes] = []
        self.ended: list[str] = []
        self.ends: list[End] = []
        node.accepting = self.accept

    def accept(self, end: End) -> None:
        self.ends.append(end)
        self.listen(end)

    def listen(self, end: End) -> None:
        end.on_frame = self.frames.append
        end.on_end = self.ended.append


def test_events_of_one_moment_happen_in_their_order() -> None:
    world, seen = World(1), list[str]()
    world.after(10, seen.append, "late")
    world.after(5, seen.append, "first")
    world.after(5, seen.append, "second")
    world.at(0, seen.append, "now at the earliest")
    world.after(7, seen.append, "never").cancel()
    world.run_until(START_MS + 9)
    assert (seen, world.now, world.events) == (["now at the earliest", "first", "second"], START_MS + 9, 3)
    world.run_until(START_MS + 10)
    assert seen[-1] == "late"


def test_purposes_have_streams_of_their_own() -> None:
    one, other = World(1).dice, World(1).dice
    assert [one["a"].random(), one["b"].random()] != [one["b"].random(), one["a"].random()]
    other["b"].random()
    assert World(1).dice["a"].random() == other["a"].random()
    assert World(2).dice.secret("a") != one.secret("a")


def test_a_cut_holds_frames_back_and_a_long_one_ends_the_stream(simulation: Simulation) -> None:
    near, far = simulation.nodes[:2]
    there, here = Listener(far), Listener(near)
    end = near.transport.dial(near, far)
    here.listen(end)
    end.send(b"early")
    simulation.world.run_until(START_MS + 2_000)
    assert there.frames == [b"early"]
    near.transport.partition({near.index: 1})
    end.send(b"held")
    simulation.world.run_until(START_MS + 4_000)
    assert there.frames == [b"early"]
    near.transport.heal()
    simulation.world.run_until(START_MS + 5_000)
    assert there.frames == [b"early", b"held"]
    near.transport.partition({near.index: 1})
    simulation.world.run_until(simulation.world.now + KEEP_ALIVE_MS)
    assert here.ended == there.ended == ["the connection was lost"]
    again = near.transport.dial(near, far)
    here.listen(again)
    simulation.world.run_until(simulation.world.now + DIAL_MS)
    assert here.ended[-1] == "it does not answer"


def test_a_crash_ends_streams_and_restarting_brings_nothing_back(simulation: Simulation) -> None:
    near, far = simulation.nodes[:2]
    Listener(far)
    here = Listener(near)
    here.listen(near.transport.dial(near, far))
    simulation.world.run_until(START_MS + 2_000)
    simulation.crash(far)
    simulation.world.run_until(START_MS + 4_000)
    assert here.ended == ["the connection was lost"]
    simulation.restart(far)
    assert far.up
    assert not far.streams


def test_neighbours_do_not_read_what_a_flooder_sends(simulation: Simulation) -> None:
    flooder, honest = simulation.nodes[20], simulation.nodes[21]
    flooder.honest = False
    heard: list[Envelope[Offer]] = []
    simulation.gossip.eavesdroppers.append((simulation.nodes[0], heard.append, lambda _bid: None))
    for number in range(40):
        simulation.world.after(number, simulation.gossip.offers.publish, flooder, b"noise %d" % number)
    simulation.world.run_until(START_MS + 1_000)
    assert 18 * simulation.scenario.nodes > simulation.gossip.refused["not_canonical"] >= 18
    assert simulation.gossip.unread > simulation.gossip.refused["not_canonical"] / 2
    assert not heard
    simulation.gossip.bids.publish(honest, honest.sealer.seal(_bid(), honest.clock).data)
    assert simulation.gossip.refused["flooded"] == 0


def _bid() -> Bid:
    return Bid(bytes(32), bytes(32), bytes(32), 1, 1, 1, (), "none", "")


def test_providers_are_found_until_they_leave(simulation: Simulation) -> None:
    asker, root = simulation.nodes[-1], simulation.models[0].root
    simulation.world.run_until(START_MS + 20_000)
    found: list[int] = []
    simulation.directory.find(asker, root, lambda records: found.append(len(records)))
    simulation.world.run_until(START_MS + 22_000)
    simulation.providers[0].stop()
    simulation.world.run_until(START_MS + 30_000)
    simulation.directory.find(asker, root, lambda records: found.append(len(records)))
    simulation.world.run_until(START_MS + 32_000)
    assert found == [7, 6]


def test_an_eclipse_of_a_third_hides_nobody(simulation: Simulation) -> None:
    for node in simulation.nodes[8:16]:
        Eclipse(simulation, node).begin()
    simulation.world.run_until(START_MS + 20_000)
    found: list[int] = []
    for _ in range(2):
        simulation.directory.find(
            simulation.nodes[-1], simulation.models[0].root, lambda records: found.append(len(records))
        )
        simulation.world.run_until(simulation.world.now + 2_000)
    assert found == [7, 7]
