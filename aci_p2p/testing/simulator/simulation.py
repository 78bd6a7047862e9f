"""One simulated world: nodes, what they do all day, what goes wrong, and the judgement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from aci_p2p.network.model import NetworkModel
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import WAITING, JobRecord, Payment, recovered, timed_out
from aci_p2p.protocol.lifecycle import LIMITS
from aci_p2p.protocol.messages import Conversation, Turn
from aci_p2p.protocol.publications import CapabilityRecord
from aci_p2p.protocol.request import JobRequest
from aci_p2p.protocol.terms import ANY_PROVIDER
from aci_p2p.testing.simulator.adversaries import STRATEGIES, Attacker, Part
from aci_p2p.testing.simulator.asks import AskBoard
from aci_p2p.testing.simulator.casting import cast, toy_model
from aci_p2p.testing.simulator.directory import Announcing, Directory
from aci_p2p.testing.simulator.faults import Faults
from aci_p2p.testing.simulator.gossip import Gossip
from aci_p2p.testing.simulator.invariant import Invariant, fail
from aci_p2p.testing.simulator.invariants import Judge
from aci_p2p.testing.simulator.node import Reader, SimNode, WriteFate
from aci_p2p.testing.simulator.roles import Consumer, Outcome, Surroundings
from aci_p2p.testing.simulator.scenario import MAX_LATENCY_MS, MAX_PRICE, Fault, PlannedJob, PlannedOutcome, Scenario
from aci_p2p.testing.simulator.serving import Provider
from aci_p2p.testing.simulator.settling import ANSWER_MS, LAST_RETRY_MS
from aci_p2p.testing.simulator.transport import Transport
from aci_p2p.testing.simulator.world import START_MS, World
from aci_p2p.testing.toy_model import ToyModel

MS_PER_S: Final = 1_000
HOUR_MS: Final = 3_600_000
"""Milliseconds."""
CALM_MS: Final = 180_000
"""After the faults have ended: longer than any state of a running job may last, milliseconds."""
PROBE_MS: Final = 120_000
"""Time in which every honest consumer's last job must be answered, milliseconds."""
PROBE_WINDOW_MS: Final = 5_000
"""How long these last jobs wait for bids: longer than gossip takes in any of these networks, milliseconds."""
MAX_PROVIDERS: Final = 3
"""Providers that may begin a job, one after the other."""
MAX_TOKENS: Final = 64
"""Longest answer asked for at random."""
TERMS: Final = replace(ANY_PROVIDER, latency_value=20_000, retry_cost=50_000)
"""A second, and a failure, cost as much as some tokens: who is slow or fails loses jobs to who is dearer."""
NEVER_ENDED: Final = "never_ended"
"""Code of a planned job whose consumer cheated, or died before its end."""
LOOK_MS: Final = 60_000
"""How often the bounds of all queues are checked, milliseconds."""
RETRY_MS: Final = 10_000
"""After how long a node that could not start is started again, milliseconds."""


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
    planned: tuple[PlannedOutcome, ...]
    """What came of the planned jobs, in their order."""
    fired: dict[str, int]
    """Faults, and how often each struck."""
    died_at: dict[str, int]
    """Transitions at which nodes died while they wrote: role and state."""
    refused: dict[str, int]
    """Gossip that checks refused, by reason."""
    unread: int
    """Gossip of flooders that nobody looked at."""
    lookups: int
    """Searches for providers."""
    found: int
    """Providers that they found, together."""
    income: dict[int, int]
    """What honest providers hold of what was promised them, base units, by node."""
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
    income: int
    """What honest consumers paid them, base units."""
    unearned: int
    """Of it for answers that the true model does not give, and the worth of answers taken without paying."""
    undefended: str
    """Why it still pays or harms; empty: it does not."""


class Simulation:
    """A world in progress."""

    transport_type: type[Transport] = Transport
    """What carries streams; benchmarks use their own."""

    def __init__(self, scenario: Scenario, *, disarmed: bool = False) -> None:
        """`disarmed`: those who would cheat ask the same prices and are honest, for comparison."""
        self.scenario = scenario
        """What is simulated."""
        self.world = World(scenario.seed)
        """Clock, queue and trace."""
        self.transport = self.transport_type(self.world, _disturbed(scenario.network, scenario.faults))
        """Streams."""
        self.judge = Judge(self._is_honest)
        """Watches honest nodes."""
        dice, reader = self.world.dice, Reader()
        self.nodes = [
            SimNode(self.world, self.transport, index, scenario.network.place(dice["places"]), self, reader)
            for index in range(scenario.nodes)
        ]
        """All nodes, providers first."""
        self.by_id = {node.node_id: node for node in self.nodes}
        """The same by their identities."""
        self.gossip = Gossip(self.transport, self.nodes)
        """Offers and bids."""
        self.directory = Directory(self.transport, self.nodes)
        """The DHT."""
        self.models = [toy_model(number) for number in range(scenario.model_count)]
        """What is served."""
        self.consumers: dict[int, Consumer] = {}
        """Honest consumers, by the numbers of their nodes."""
        self.providers: dict[int, Provider] = {}
        """Honest providers, by the numbers of their nodes."""
        self.ends_at = START_MS + round(scenario.hours * HOUR_MS)
        """When the last random job is offered, Unix milliseconds."""
        board = AskBoard(self.gossip) if scenario.asks else None
        self.around = Surroundings(self.gossip, self.directory, board, self.judge, self.by_id.get)
        """What roles are made of."""
        self._retired = False
        self._announcing: dict[int, Announcing] = {}
        self._cast()
        self.suspects = self._suspect()
        """Nodes that cheat, and what they would do."""
        self.faults = Faults(self)
        """What goes wrong."""
        self.attackers: list[Attacker] = []
        """Those that do it."""
        if disarmed:
            for node, strategy in self.suspects:
                if (provider := self.providers.get(node.index)) is not None:
                    provider.reprice(strategy.price(provider.offering.output_token_price))
        else:
            self.attackers = [strategy(self, node) for node, strategy in self.suspects]
            for attacker in self.attackers:
                attacker.begin()

    # What the world sees of its nodes (`node.Watch`).

    def signed(self, envelope: Envelope[Any]) -> None:
        """A node has signed a message."""
        self.judge.signed(envelope)

    def fate(self, node: SimNode, what: str) -> WriteFate:
        """A node is about to store something."""
        return self.faults.fate(node, what)

    def stored(self, node: SimNode, record: JobRecord) -> None:
        """A transition is on a node's disk."""
        self.judge.stored(node, record)

    def promised(self, node: SimNode, payment: Payment) -> None:
        """What is paid for a job is on a node's disk."""
        self.judge.promised(node, payment)

    def dies(self, node: SimNode) -> None:
        """A node dies while it writes."""
        self.faults.down(node)

    # Who is who.

    def _is_honest(self, identity: NodeId) -> bool:
        node = self.by_id.get(identity)
        return node is not None and node.honest

    def _cast(self) -> None:
        """Give the nodes their roles."""
        scenario = self.scenario
        for node, serving in zip(self.nodes, cast(scenario), strict=False):
            provider = Provider(
                node,
                self.around,
                self.models[serving.model],
                price=serving.price,
                slots=scenario.slots,
                pace_ms=serving.pace_ms,
            )
            self.providers[node.index] = provider
            self._announcing[node.index] = provider.announcing
        for node in self.nodes[scenario.provider_count :]:
            self.consumers[node.index] = Consumer(node, self.around)
            self._announcing[node.index] = Announcing(node, self.directory, _nothing)
        for announcing in self._announcing.values():
            announcing.begin()

    def _suspect(self) -> list[tuple[SimNode, type[Attacker]]]:
        """Choose a share of the nodes as attackers, each with one strategy."""
        random = self.world.dice["attackers"]
        count = round(self.scenario.adversaries * len(self.nodes))
        names = self.scenario.strategies or tuple(STRATEGIES)
        # Dealt like cards, so that few cheats still do as many different things as there are.
        deck = random.sample([STRATEGIES[name] for name in names], len(names))
        suspects: list[tuple[SimNode, type[Attacker]]] = []
        for node in random.sample(self.nodes, count):
            part = Part.PROVIDER if node.index in self.providers else Part.CONSUMER
            strategy = next((one for one in deck if one.part in {part, Part.ANY}), None)
            if strategy is not None:
                deck.remove(strategy)
                deck.append(strategy)
                suspects.append((node, strategy))
        return suspects

    def replace_announcing(self, node: SimNode, announcing: Announcing) -> None:
        """Let a node publish other records from now on."""
        self._announcing[node.index] = announcing
        announcing.begin()

    # What happens.

    def run(self, progress: Callable[[float], None] = lambda _share: None) -> Result:
        """Run the world to its end. Raises InvariantBroken."""
        world = self.world
        for number, job in enumerate(self.scenario.jobs):
            world.after(round(job.at_s * MS_PER_S), self._ask, number, job)
        if not self.scenario.jobs:
            for consumer in self.consumers.values():
                self._next_job(consumer)
        self.faults.begin()
        world.after(HOUR_MS, self._settle)
        end = self.ends_at + CALM_MS + PROBE_MS
        while world.now < self.ends_at:
            self._look(min(world.now + LOOK_MS, self.ends_at))
            progress((world.now - START_MS) / (end - START_MS))
        self.faults.end()
        self._retire()
        self._look(self.ends_at + CALM_MS)
        self._all_over()
        if not self.scenario.jobs:
            self._probe()
        self._all_paid()
        progress(1.0)
        return self.result()

    def _look(self, until: int) -> None:
        self.world.run_until(until)
        for node in self.nodes:
            for driver in node.drivers:
                self.judge.timely(driver)
        for index, provider in self.providers.items():
            self.judge.bounded(
                self.nodes[index],
                outstanding=len(provider.book),
                running=len(provider.running),
                slots=provider.slots,
            )

    def _next_job(self, consumer: Consumer) -> None:
        random = self.world.dice[f"workload/{consumer.node.index}"]
        wait = random.expovariate(1 / (MS_PER_S * self.scenario.job_interval_s))
        if self.world.now + wait < self.ends_at:
            self.world.after(round(wait), self._start_job, consumer)

    def _start_job(self, consumer: Consumer) -> None:
        self._next_job(consumer)
        request, model = self.question(consumer.node)
        if consumer.node.up:
            consumer.offer(request, model)

    def question(self, node: SimNode) -> tuple[JobRequest, ToyModel]:
        """The next thing that a node's user wants to know, of which model; a stream of its own for each node."""
        random = self.world.dice[f"questions/{node.index}"]
        prompt = f"question {random.randrange(1 << 32)}"
        return self._request(prompt, random.randint(1, MAX_TOKENS), random.choice(self.models))

    def _ask(self, number: int, job: PlannedJob) -> None:
        consumer = self.consumers.get(self.scenario.provider_count + job.consumer)
        if consumer is not None and consumer.node.up:
            request, model = self._request(job.prompt, job.max_tokens, toy_model(job.model))
            # Whoever is cheapest has it, as when real nodes run the scenario.
            consumer.offer(replace(request, max_price=job.max_price, terms=ANY_PROVIDER), model, number)

    def _request(self, prompt: str, max_tokens: int, model: ToyModel) -> tuple[JobRequest, ToyModel]:
        request = JobRequest(
            model_root=model.root,
            conversation=Conversation((Turn("user", prompt),)),
            max_tokens=max_tokens,
            temperature_milli=0,
            max_price=MAX_PRICE,
            max_latency_ms=MAX_LATENCY_MS,
            bid_window_ms=self.scenario.bid_window_ms,
            expected_bidders=frozenset(),
            max_providers=MAX_PROVIDERS,
            terms=TERMS,
        )
        return request, model

    def _settle(self) -> None:
        """Every hour nodes finalise the jobs whose challenge windows are over."""
        for node in self.nodes:
            if node.up and not node.disk.is_full:
                self._change(node, timed_out)
        self.world.after(HOUR_MS, self._settle)

    def _change(self, node: SimNode, change: Callable[[JobRecord, int], JobRecord | None]) -> None:
        for record in tuple(node.disk.jobs.values()):
            if record.state in LIMITS and (changed := change(record, node.clock)) is not None:
                node.write((changed,), ())

    def crash(self, node: SimNode) -> None:
        """Kill a node."""
        if node.up:
            node.crash()
            self.gossip.changed()
            self.directory.changed()

    def restart(self, node: SimNode) -> None:
        """Start a node that was killed: what its disk holds is ended or settled, as after a real start."""
        if node.up or (self._retired and not node.honest):
            return
        if node.disk.is_full:
            self.world.after(RETRY_MS, self.restart, node)
            return
        node.start()
        node.close_payments()
        self._change(node, recovered)
        if node.index in self.providers:
            self.providers[node.index].start()
        if node.index in self.consumers:
            self.consumers[node.index].settler.restarted()
        self._announcing[node.index].restarted()
        self.gossip.restarted(node)
        self.directory.restarted(node)

    # What came of it.

    def _retire(self) -> None:
        """The cheats leave for good: what they have done to the others must not outlast them."""
        self._retired = True
        for attacker in self.attackers:
            self.crash(attacker.node)

    def _all_over(self) -> None:
        """Safety's other half: nothing that was begun is left hanging once the world is calm."""
        for node in self.nodes:
            for driver in node.drivers:
                msg = f"a job of node {node.index} still runs {CALM_MS // 1000} s after the last fault"
                if node.honest:
                    fail(Invariant.ENDS, f"{msg}: {driver}")
            for record in node.disk.jobs.values():
                if node.honest and record.state in LIMITS and record.state not in WAITING:
                    msg = f"job {record.job_id.hex()[:8]} of node {node.index} is {record.state.value} for ever"
                    fail(Invariant.ENDS, msg)

    def _probe(self) -> None:
        """Liveness: once the world is calm and the cheats are gone, every honest consumer is answered."""
        served = {provider.model.name for provider in self.providers.values()}
        before = len(self.outcomes())
        asked = 0
        for consumer in self.consumers.values():
            question, model = self.question(consumer.node)
            request = replace(question, bid_window_ms=PROBE_WINDOW_MS)
            if model.name in served:
                # One after the other, so that slots are free.
                delay = asked * PROBE_MS // (2 * len(self.consumers))
                self.world.after(delay, consumer.offer, request, model)
                asked += 1
        self._look(self.world.now + PROBE_MS)
        outcomes = self.outcomes()[before:]
        failed = [outcome for outcome in outcomes if outcome.failure]
        if len(outcomes) < asked or failed:
            why = Counter(outcome.failure for outcome in failed)
            msg = f"{len(outcomes) - len(failed)} of {asked} consumers were answered in a calm network: {dict(why)}"
            fail(Invariant.RECOVERS, msg)

    def _all_paid(self) -> None:
        """Every honest provider holds what it is owed, a try after the longest wait included."""
        accounts = self.judge.accounts
        if accounts.owed(self.world.now):
            self._look(self.world.now + LAST_RETRY_MS + ANSWER_MS)
        if owed := accounts.owed(self.world.now):
            fail(Invariant.DEBTS, "; ".join(owed))

    def outcomes(self) -> list[Outcome]:
        """The jobs of honest consumers so far, in the order of their ends."""
        ended = [one for consumer in self.consumers.values() if consumer.node.honest for one in consumer.outcomes]
        return sorted(ended, key=lambda one: (one.started + one.duration_ms, one.consumer))

    def _planned(self) -> tuple[PlannedOutcome, ...]:
        """What came of the planned jobs so far."""
        planned = [PlannedOutcome.failed(NEVER_ENDED)] * len(self.scenario.jobs)
        for one in self.outcomes():
            if one.planned is None:
                continue
            if one.provider is None:
                planned[one.planned] = PlannedOutcome.failed(one.failure)
            else:
                provider = self.by_id[one.provider].index
                planned[one.planned] = PlannedOutcome(provider, one.text, one.tokens, one.price, "")
        return tuple(planned)

    def gains(self) -> list[Gain]:
        """What cheating has brought, by strategy."""
        unearned: Counter[NodeId] = Counter()
        for outcome in self.outcomes():
            if not outcome.failure and outcome.text != outcome.expected:
                unearned.update(self.judge.accounts.promised_for(outcome.job_id))
        paid = self.judge.accounts.paid_to()
        gains: dict[str, Gain] = {}
        for attacker in self.attackers:
            identity = attacker.node.node_id
            why = attacker.pays or attacker.harms
            known = gains.get(attacker.name) or Gain(attacker.name, attacker.goal, 0, 0, 0, why)
            gains[attacker.name] = replace(
                known,
                nodes=known.nodes + 1,
                income=known.income + paid.get(identity, 0),
                unearned=known.unearned + unearned[identity] + attacker.stolen,
            )
        return [gains[name] for name in sorted(gains)]

    def result(self) -> Result:
        """What has come of the world so far."""
        return Result(
            scenario=self.scenario,
            trace=self.world.trace,
            events=self.world.events,
            checks=self.judge.checks,
            outcomes=tuple(self.outcomes()),
            planned=self._planned(),
            fired={fault.value: self.faults.fired[fault] for fault in Fault if self.faults.fired[fault]},
            died_at=dict(sorted(self.faults.died_at.items())),
            refused=dict(sorted(self.gossip.refused.items())),
            unread=self.gossip.unread,
            lookups=self.directory.lookups,
            found=self.directory.found,
            income={self.by_id[name].index: held for name, held in self.judge.accounts.income().items()},
            spending=sum(self.judge.accounts.paid_to().values()),
        )


def _nothing() -> Sequence[CapabilityRecord]:
    """What a consumer serves."""
    return ()


def _disturbed(network: NetworkModel, faults: frozenset[Fault]) -> NetworkModel:
    """The network with what the scenario adds to it."""
    if Fault.LOSS in faults:
        network = replace(network, loss=max(network.loss, 0.1))
    if Fault.DUPLICATION in faults:
        network = replace(network, duplication=max(network.duplication, 0.1))
    if Fault.REORDERING in faults:
        network = replace(network, reordering=max(network.reordering, 0.1))
    return network
