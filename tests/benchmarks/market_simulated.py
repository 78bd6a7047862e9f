"""How long awards take in simulated worlds, for `market.py`.

In every round some providers are dead and some are flaky, and consumers do not know it yet: their asks and records are
still there, and so are the connections to them. Disks and processors take no time here; loopback shows what they take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from aci_p2p.network.model import NetworkModel
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import JobRecord
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.testing.simulator.node import SimNode
from aci_p2p.testing.simulator.roles import Consumer
from aci_p2p.testing.simulator.scenario import Scenario
from aci_p2p.testing.simulator.simulation import Simulation
from aci_p2p.testing.simulator.transport import DIAL_MS, HANDSHAKE_TRIPS, UNANSWERED, End, Endpoint, Transport
from aci_p2p.testing.simulator.world import World

DEAD: Final = 0.05
"""Share of the providers that are dead: nobody answers what is sent to them."""
FLAKY: Final = 0.03
"""Share of those that are flaky: half of the streams to them break."""
BREAK_MS: Final = 500
"""Within so many milliseconds: some before the quote, some behind the award."""
MEDIAN_MS: Final = 40
"""One way between two nodes, median, milliseconds."""
DEVIATION: Final = 0.5
"""Of the latencies' logarithm: a tenth of the pairs is nearer than 21 ms, a tenth farther than 76 ms."""
REGIONS: Final = 16
"""Any two of them have a latency of their own."""
CONSUMERS: Final = 20
"""Nodes that ask, in turn."""
ROUND_JOBS: Final = 40
"""Jobs of a round, all of them while the asks of the dead live."""
GAP_MS: Final = 500
"""From one job to the next, milliseconds."""
REST_MS: Final = 30_000
"""Twice after the jobs of a round: they end, then those that were dead are known again, milliseconds."""
WARM_UP_MS: Final = 120_000
"""Before the first round: asks are in the books, records in the DHT, milliseconds."""


@dataclass(frozen=True, slots=True)
class Awards:
    """Of all jobs of one path and size, milliseconds."""

    jobs: int
    """Jobs that were offered."""
    award: list[float]
    """From the offer to the first award; fewer than the jobs where some had none."""
    accept: list[float]
    """From the offer to the first acceptance, so that a silent winner counts."""


def wide_area() -> NetworkModel:
    """Latencies around MEDIAN_MS."""
    random = Random(1)  # noqa: S311 - is to repeat
    rows = [[0] * REGIONS for _ in range(REGIONS)]
    for here in range(REGIONS):
        for there in range(here, REGIONS):
            rows[here][there] = rows[there][here] = round(MEDIAN_MS * random.lognormvariate(0, DEVIATION))
    return NetworkModel(one_way_ms=tuple(tuple(row) for row in rows))


class _Connections(Transport):
    """Streams over connections that are kept, some of them to the dead and the flaky."""

    def __init__(self, world: World, model: NetworkModel) -> None:
        super().__init__(world, model)
        self.dead: set[int] = set()
        self.flaky: set[int] = set()
        self._dice = world.dice["flaky"]
        self._connected: set[frozenset[int]] = set()

    def handshake_trips(self, source: Endpoint, target: Endpoint) -> int:
        """Only the first stream has to make the connection; no later one waits for its protocol."""
        pair = frozenset((source.index, target.index))
        if pair in self._connected:
            return 0
        self._connected.add(pair)
        return HANDSHAKE_TRIPS

    def dial(self, source: Endpoint, target: Endpoint) -> End:
        """The dead do not even refuse."""
        if target.index in self.dead:
            near = End(self, source, target)
            self.world.after(DIAL_MS, near.lose, UNANSWERED)
            return near
        near = super().dial(source, target)
        if target.index in self.flaky and self._dice.random() < 0.5:
            self.world.after(self._dice.randint(0, BREAK_MS), _break, near)
        return near


def _break(near: End) -> None:
    far = near.peer
    near.lose("the connection was lost")
    if far is not None:
        far.lose("the connection was lost")


class _Asker(Consumer):
    """A consumer whose keep-alive has not noticed yet who is dead."""

    def _is_reachable(self, provider: NodeId) -> bool:
        return self.around.find(provider) is not None


class _Market(Simulation):
    """A world in rounds, that notes when its jobs move."""

    transport_type = _Connections

    def __init__(self, scenario: Scenario) -> None:
        self.moved: dict[bytes, dict[State, int]] = {}
        """When each job of a consumer came to a state first, Unix milliseconds."""
        super().__init__(scenario)
        assert isinstance(self.transport, _Connections)
        self._links = self.transport
        for index in self.consumers:
            self.consumers[index] = _Asker(self.nodes[index], self.around)

    def stored(self, node: SimNode, record: JobRecord) -> None:
        """Note the time."""
        super().stored(node, record)
        if record.role is Party.CONSUMER:
            self.moved.setdefault(record.job_id, {}).setdefault(record.state, self.world.now)

    def hold_round(self, jobs: int) -> None:
        """Let some providers die, offer jobs, and bring the dead back."""
        world, random = self.world, self.world.dice["rounds"]
        drawn = {index: random.random() for index in self.providers}
        self._links.dead = {index for index, chance in drawn.items() if chance < DEAD}
        self._links.flaky = {index for index, chance in drawn.items() if DEAD <= chance < DEAD + FLAKY}
        for index in self._links.dead:
            self.crash(self.nodes[index])
        consumers = list(self.consumers.values())
        for number in range(jobs):
            world.after(number * GAP_MS, self._offer, consumers[number % len(consumers)])
        world.run_until(world.now + jobs * GAP_MS + REST_MS)
        dead, self._links.dead, self._links.flaky = self._links.dead, set(), set()
        for index in dead:
            self.restart(self.nodes[index])
        world.run_until(world.now + REST_MS)

    def _offer(self, consumer: Consumer) -> None:
        request, model = self.question(consumer.node)
        consumer.offer(request, model)


def measure(
    providers: int, *, asks: bool, rounds: int, jobs: int = ROUND_JOBS, progress: Callable[[int], None] = lambda _: None
) -> Awards:
    """The awards of `rounds` rounds, after one that makes connections. `progress` hears of each round that is over."""
    nodes = providers + CONSUMERS
    scenario = Scenario(nodes=nodes, providers=providers / nodes, models=1, asks=asks, network=wide_area())
    market = _Market(scenario)
    market.world.run_until(market.world.now + WARM_UP_MS)
    market.hold_round(jobs)
    market.moved.clear()
    for number in range(rounds):
        market.hold_round(jobs)
        progress(number + 1)
    moved = market.moved.values()
    return Awards(
        jobs=len(moved),
        award=[float(at[State.AWARDED] - at[State.OFFERED]) for at in moved if State.AWARDED in at],
        accept=[float(at[State.ACCEPTED] - at[State.OFFERED]) for at in moved if State.ACCEPTED in at],
    )
