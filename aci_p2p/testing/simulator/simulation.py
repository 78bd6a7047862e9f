"""One simulated world: nodes, what they do all day, what goes wrong, and the judgement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from aci_p2p.network.model import NetworkModel
from aci_p2p.protocol.consumer import JobRequest
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import Cancel, JobRecord, recovered
from aci_p2p.protocol.lifecycle import LIMITS, State
from aci_p2p.protocol.messages import Conversation, Turn
from aci_p2p.testing.simulator.adversaries import STRATEGIES, Attacker, Part
from aci_p2p.testing.simulator.faults import Faults
from aci_p2p.testing.simulator.gossip import Gossip
from aci_p2p.testing.simulator.invariants import InvariantBroken, Judge
from aci_p2p.testing.simulator.node import Reader, SimNode
from aci_p2p.testing.simulator.roles import Consumer, Outcome, Provider
from aci_p2p.testing.simulator.scenario import NODES_PER_MODEL, Fault, Scenario
from aci_p2p.testing.simulator.transport import Transport
from aci_p2p.testing.simulator.world import START_MS, World
from aci_p2p.testing.toy_model import ToyModel

HOUR_MS: Final = 3_600_000
"""Milliseconds."""
CALM_MS: Final = 180_000
"""After the faults have ended: longer than any state of a running job may last, milliseconds."""
PROBE_MS: Final = 120_000
"""Time in which every honest consumer's last job must be answered, milliseconds."""
MAX_TOKENS: Final = 64
"""Longest answer asked for."""
BID_WINDOW_MS: Final = 1_000
"""How long consumers wait for bids."""
MAX_PRICE: Final = 10**12
"""What consumers pay at most: more than any honest provider of these worlds asks."""
SLOTS: Final = 4
"""Jobs that a provider runs at once."""
PACE_MS: Final = (5, 40)
"""Milliseconds for each token, fastest and slowest provider."""
PRICE: Final = (1_000, 4_000)
"""Base units for each token, cheapest and dearest provider."""
"""Tokens of simulated models are cheap; only differences matter."""
LOOK_MS: Final = 60_000
"""How often the bounds of all queues are checked, milliseconds."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a world."""

    scenario: Scenario
    """What was simulated."""
    trace: str
    """Hash of everything that happened."""
    events: int
    """How much that was."""
    checks: int
    """Invariants checked."""
    outcomes: tuple[Outcome, ...]
    """The jobs of honest consumers, in the order of their ends."""
    fired: dict[str, int]
    """Faults, and how often each struck."""
    refused: dict[str, int]
    """Gossip that checks refused, by reason."""
    income: dict[int, int]
    """What honest providers have receipts for, base units, by node."""
    spending: int
    """What honest consumers have signed for, base units."""


@dataclass(frozen=True, slots=True)
class Gain:
    """What the attackers of one strategy have gained together."""

    strategy: str
    """Its name."""
    goal: str
    """What it wants."""
    nodes: int
    """Attackers that follow it."""
    gained: int
    """Base units: payments for answers that the true model does not give, and answers taken without paying."""
    pays: str
    """Why it still pays; empty: it must gain nothing."""


class Simulation:
    """A world in progress."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.world = World(scenario.seed)
        self.network = _disturbed(scenario.network, scenario.faults)
        self.transport = Transport(self.world, self.network)
        self.judge = Judge(self._is_honest)
        dice, reader = self.world.dice, Reader()
        self.nodes = [
            SimNode(self.world, self.transport, index, self.network.place(dice["places"]), self.judge.said, reader)
            for index in range(scenario.nodes)
        ]
        self.by_id: dict[NodeId, SimNode] = {node.node_id: node for node in self.nodes}
        self.gossip = Gossip(self.transport, self.nodes)
        models = scenario.models or max(1, scenario.nodes // NODES_PER_MODEL)
        self.models = [ToyModel(f"toy-{number}") for number in range(models)]
        self.consumers: dict[int, Consumer] = {}
        self.providers: dict[int, Provider] = {}
        self.ends_at = START_MS + round(scenario.hours * HOUR_MS)
        self._cast()
        self.attackers = self._corrupt()
        self.faults = Faults(self)

    def _is_honest(self, identity: NodeId) -> bool:
        node = self.by_id.get(identity)
        return node is not None and node.honest

    def _cast(self) -> None:
        """Give the nodes their roles."""
        random = self.world.dice["roles"]
        count = max(1, round(self.scenario.providers * self.scenario.nodes))
        for node in self.nodes[:count]:
            provider = Provider(
                node,
                self.gossip,
                self.models[node.index % len(self.models)],
                price=random.randint(*PRICE),
                slots=SLOTS,
                pace_ms=random.randint(*PACE_MS),
            )
            provider.stored = self._stored
            self.providers[node.index] = provider
        for node in self.nodes[count:]:
            consumer = Consumer(node, self.gossip, self.by_id.get)
            consumer.stored = self._stored
            consumer.believes = self.judge.heard
            self.consumers[node.index] = consumer

    def _corrupt(self) -> list[Attacker]:
        """Turn a share of the nodes into attackers, each with one strategy."""
        random = self.world.dice["attackers"]
        count = round(self.scenario.adversaries * len(self.nodes))
        names = self.scenario.strategies or tuple(STRATEGIES)
        strategies = [STRATEGIES[name] for name in names]
        attackers: list[Attacker] = []
        for node in random.sample(self.nodes, count):
            part = Part.PROVIDER if node.index in self.providers else Part.CONSUMER
            fitting = [strategy for strategy in strategies if strategy.part in {part, Part.ANY}]
            if fitting:
                attackers.append(random.choice(fitting)(self, node))
        for attacker in attackers:
            attacker.begin()
        return attackers

    def _stored(self, node: SimNode, record: JobRecord) -> None:
        if node.honest:
            self.judge.stored(node, record)
        self.faults.stored(node, record)

    def run(self, progress: Callable[[float], None] = lambda _share: None) -> Result:
        """Run the world to its end. Raises InvariantBroken."""
        world = self.world
        for consumer in self.consumers.values():
            self._next_job(consumer)
        self.faults.begin()
        end = self.ends_at + CALM_MS + PROBE_MS
        while world.now < self.ends_at:
            self._look(min(world.now + LOOK_MS, self.ends_at))
            progress((world.now - START_MS) / (end - START_MS))
        self.faults.end()
        self._look(self.ends_at + CALM_MS)
        self._all_over()
        self._probe()
        progress(1.0)
        return self.result()

    def _look(self, until: int) -> None:
        self.world.run_until(until)
        for index, provider in self.providers.items():
            self.judge.bounded(self.nodes[index], len(provider.book), len(provider.running), provider.slots)

    def _next_job(self, consumer: Consumer) -> None:
        wait = self.world.dice["workload"].expovariate(1 / (1_000 * self.scenario.job_interval_s))
        if self.world.now + wait < self.ends_at:
            self.world.after(round(wait), self._start_job, consumer)

    def _start_job(self, consumer: Consumer) -> None:
        self._next_job(consumer)
        if consumer.node.up:
            self.offer(consumer)

    def offer(self, consumer: Consumer) -> None:
        """Let a consumer ask a model something."""
        random = self.world.dice["questions"]
        model = random.choice(self.models)
        conversation = Conversation((Turn("user", f"question {random.randrange(1 << 32)}"),))
        request = JobRequest(
            model_root=model.root,
            conversation=conversation,
            max_tokens=random.randint(1, MAX_TOKENS),
            temperature_milli=0,
            max_price=MAX_PRICE,
            max_latency_ms=60_000,
            bid_window_ms=BID_WINDOW_MS,
            expected_bidders=frozenset(),
        )
        consumer.start(request, model)

    def _all_over(self) -> None:
        """Safety's other half: nothing that was begun is left hanging once the world is calm."""
        for node in self.nodes:
            for driver in node.drivers:
                msg = f"a job of node {node.index} still runs {CALM_MS // 1000} s after the last fault"
                if node.honest:
                    raise InvariantBroken("every job ends", f"{msg}: {driver}")
            for record in node.disk.jobs.values():
                if node.honest and record.state in LIMITS and record.state is not State.PENDING:
                    msg = f"job {record.job_id.hex()[:8]} of node {node.index} is {record.state.value} for ever"
                    raise InvariantBroken("every job ends", msg)

    def _probe(self) -> None:
        """Liveness: once the world is calm, every honest consumer is answered."""
        before = len(self.outcomes())
        asked = 0
        for consumer in self.consumers.values():
            if consumer.node.honest:
                # One after the other, so that slots are free.
                self.world.after(asked * PROBE_MS // (2 * len(self.consumers)), self.offer, consumer)
                asked += 1
        self._look(self.world.now + PROBE_MS)
        outcomes = self.outcomes()[before:]
        failed = [outcome for outcome in outcomes if outcome.failure]
        if len(outcomes) < asked or failed:
            why = Counter(outcome.failure for outcome in failed)
            msg = f"{len(outcomes) - len(failed)} of {asked} consumers were answered in a calm network: {dict(why)}"
            raise InvariantBroken("the market recovers", msg)

    def outcomes(self) -> list[Outcome]:
        """The jobs of honest consumers so far, in the order of their ends."""
        ended = [one for consumer in self.consumers.values() if consumer.node.honest for one in consumer.outcomes]
        return sorted(ended, key=lambda one: (one.started + one.duration_ms, one.consumer))

    def gains(self) -> list[Gain]:
        """What cheating has brought, by strategy."""
        unearned: Counter[NodeId] = Counter()
        for outcome in self.outcomes():
            if outcome.provider and outcome.text != outcome.expected:
                unearned[outcome.provider] += outcome.price
        gains: dict[str, Gain] = {}
        for attacker in self.attackers:
            gained = unearned[attacker.node.node_id] + attacker.stolen
            known = gains.get(attacker.name) or Gain(attacker.name, attacker.goal, 0, 0, attacker.pays)
            gains[attacker.name] = replace(known, nodes=known.nodes + 1, gained=known.gained + gained)
        return [gains[name] for name in sorted(gains)]

    def result(self) -> Result:
        """What has come of the world so far."""
        return Result(
            scenario=self.scenario,
            trace=self.world.trace,
            events=self.world.events,
            checks=self.judge.checks,
            outcomes=tuple(self.outcomes()),
            fired={fault.value: self.faults.fired[fault] for fault in Fault if self.faults.fired[fault]},
            refused=dict(self.gossip.refused),
            income=self.judge.income(),
            spending=self.judge.spending(),
        )

    def crash(self, node: SimNode) -> None:
        """Kill a node."""
        node.crash()
        provider = self.providers.get(node.index)
        if provider:
            provider.running.clear()
        self.gossip.changed()

    def restart(self, node: SimNode) -> None:
        """Start a node that was killed: what its disk holds is ended or settled, as after a real start."""
        if node.up:
            return
        node.start()
        for record in tuple(node.disk.jobs.values()):
            changed = recovered(record, node.clock)
            if changed:
                node.disk.put(changed)
                self._stored(node, changed)
        if node.index in self.providers:
            self.providers[node.index].start()
        self.gossip.changed()

    def cancel(self, consumer: Consumer) -> bool:
        """Let the user of a consumer give up a job; False when none runs."""
        for driver in consumer.node.drivers:
            driver.tell(Cancel())
            return True
        return False


def _disturbed(network: NetworkModel, faults: frozenset[Fault]) -> NetworkModel:
    """The network with what the scenario adds to it."""
    if Fault.LOSS in faults:
        network = replace(network, loss=max(network.loss, 0.1))
    if Fault.DUPLICATION in faults:
        network = replace(network, duplication=max(network.duplication, 0.1))
    if Fault.REORDERING in faults:
        network = replace(network, reordering=max(network.reordering, 0.1))
    return network
