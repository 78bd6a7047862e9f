"""The honest consumer of a simulated node, on the machine that real nodes run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from aci_p2p.database import StoreError
from aci_p2p.executor import Message, Sampling
from aci_p2p.protocol.consumer import ConsumerJob, Start
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import (
    AskForQuotes,
    BidSeen,
    Broadcast,
    Deliver,
    Effect,
    Failed,
    OpenStream,
    ReleaseQuotes,
)
from aci_p2p.protocol.lifecycle import Party
from aci_p2p.protocol.messages import Bid, Offer
from aci_p2p.protocol.publications import CapabilityRecord
from aci_p2p.protocol.reputation import Reputation
from aci_p2p.protocol.request import JobRequest, JobSecrets
from aci_p2p.protocol.round import BidArrived, QuoteRefused, QuotesAsked
from aci_p2p.protocol.selection import ExpectedCost, Knowledge, StakeTable
from aci_p2p.testing.simulator.asks import AskBoard
from aci_p2p.testing.simulator.directory import Directory
from aci_p2p.testing.simulator.driver import Driver
from aci_p2p.testing.simulator.gossip import Gossip
from aci_p2p.testing.simulator.invariants import Judge
from aci_p2p.testing.simulator.node import SimNode
from aci_p2p.testing.simulator.quoting import Quotes
from aci_p2p.testing.simulator.settling import Settler
from aci_p2p.testing.toy_model import ToyModel


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every role of a world needs."""

    gossip: Gossip
    """Offers and bids."""
    directory: Directory
    """Records of nodes."""
    asks: AskBoard | None
    """What providers ask for; None: they do not say, and every job is broadcast."""
    judge: Judge
    """Sees what nodes believe."""
    find: Callable[[NodeId], SimNode | None]
    """Who has an identity."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended for its consumer."""

    job_id: bytes
    """32 bytes."""
    consumer: int
    """Index of the consumer's node."""
    provider: NodeId | None
    """Who answered."""
    failure: str
    """Code of the error that ended it; empty: it was answered."""
    price: int
    """What it cost, base units."""
    started: int
    """When it was offered, Unix milliseconds of true time."""
    first_token_ms: int | None
    """Milliseconds to the first token."""
    duration_ms: int
    """Milliseconds to the end."""
    expected: str
    """The answer that the true model gives; empty where none came."""
    text: str
    """The answer that came."""
    tokens: int
    """Output tokens of it."""
    planned: int | None
    """Which of the scenario's planned jobs it was; None: none of them."""


class Consumer:
    """Offers jobs and sees them through."""

    job_type: type[ConsumerJob] = ConsumerJob
    """The machine of a job; attackers use their own."""

    def __init__(self, node: SimNode, around: Surroundings) -> None:
        """Does nothing until `offer`."""
        self.node = node
        """Where it runs."""
        self.around = around
        """What it does it in."""
        self.outcomes: list[Outcome] = []
        """Jobs that have ended."""
        self.settler = Settler(node, around.find)
        """Tells providers what it owes them."""
        self._reputation = Reputation(node.node_id, node.sealer.network)
        self._knowledge = Knowledge(StakeTable({}), self._reputation)

    def offer(self, request: JobRequest, model: ToyModel, planned: int | None = None) -> None:
        """Look the providers of a model up as `ACI.inference` does, then offer the job to all.

        `planned`: which of the scenario's planned jobs it is.
        """
        node, around = self.node, self.around

        def found(records: Sequence[Envelope[CapabilityRecord]]) -> None:
            for record in records:
                around.judge.heard(node, record)
            there = [record.sender for record in records if self._is_reachable(record.sender)]
            self.start(replace(request, expected_bidders=frozenset(there)), model, planned)

        around.directory.find(node, request.model_root, found)

    def _is_reachable(self, provider: NodeId) -> bool:
        node = self.around.find(provider)
        return node is not None and node.up and not self.node.transport.is_cut(self.node, node)

    def start(self, request: JobRequest, model: ToyModel, planned: int | None = None) -> None:
        """Offer a job; `model` is the true one, for judging the answer and nothing else."""
        node = self.node
        secrets = JobSecrets(node.entropy(), node.entropy())
        machine = self.job_type(node.sealer, request, secrets, ExpectedCost(), self._knowledge)
        driver = self.drive(machine, request, model)
        driver.planned = planned
        self.around.gossip.consumers[machine.job_id] = (node, driver.hear)
        self.around.judge.wanted(machine.job_id, request.terms)
        driver.tell(Start())

    def ended(self, job_id: bytes) -> None:
        """Learn from a job that has ended, and pay for it."""
        self.settler.wake()
        record = self.node.disk.jobs.get((job_id, Party.CONSUMER))
        if record is not None:
            self._reputation.note(record)

    def broadcast(self, offer: Envelope[Offer]) -> None:
        """Publish an offer."""
        self.around.gossip.offers.say(self.node, offer)

    def drive(self, machine: ConsumerJob, request: JobRequest, model: ToyModel) -> ConsumerDriver:
        """The driver of a job; attackers use their own."""
        return ConsumerDriver(self, machine, request, model)


class ConsumerDriver(Driver):
    """One job of a consumer."""

    def __init__(self, consumer: Consumer, machine: ConsumerJob, request: JobRequest, model: ToyModel) -> None:
        """`model` is the true one."""
        super().__init__(consumer.node, machine, consumer.around.judge)
        self.job = machine
        """The machine."""
        self.planned: int | None = None
        """Which of the scenario's planned jobs it is."""
        self._consumer = consumer
        self._started = consumer.node.world.now
        self._first: int | None = None
        self._text: list[str] = []
        self._tokens = 0
        self._failure = ""
        self._request = request
        self._model = model
        self._quotes = Quotes(self.node, consumer.around.find, self._hear_quote)

    def hear(self, bid: Envelope[Bid]) -> None:
        """A bid has come over gossip."""
        self._consumer.around.judge.heard(self.node, bid)
        self.tell(BidArrived(bid))

    def _hear_quote(self, event: QuotesAsked | QuoteRefused | BidArrived) -> None:
        if isinstance(event, BidArrived):
            self._consumer.around.judge.heard(self.node, event.bid)
        self.tell(event)

    def perform(self, effect: Effect) -> None:
        """Perform what a consumer's job asks for."""
        around = self._consumer.around
        match effect:
            case AskForQuotes(offer, exclude):
                self._ask(offer, exclude)
            case ReleaseQuotes():
                self._quotes.release()
            case Broadcast(offer):
                around.judge.published(self.node, offer)
                self._consumer.broadcast(offer)
            case BidSeen(bid):
                around.judge.weighed(self.node, self.job.job_id, bid)
            case OpenStream(provider, _):
                self._open(provider)
            case Deliver(tokens, text):
                if self._first is None:
                    self._first = self.node.world.now - self._started
                self._text.append(text)
                self._tokens += len(tokens)
            case Failed(error):
                self._failure = error.code
            case _:
                pass

    def _ask(self, offer: Envelope[Offer], exclude: Collection[NodeId]) -> None:
        around = self._consumer.around
        around.judge.published(self.node, offer)
        asks = around.asks.best(self.node, offer, exclude) if around.asks else []
        for ask in asks:
            around.judge.heard(self.node, ask)
        self._quotes.ask(offer, asks)

    def _open(self, provider: NodeId) -> None:
        quoted, target = self._quotes.award(provider), self._consumer.around.find(provider)
        if quoted is not None:
            self.attach(quoted)
        elif target is not None:
            self.attach(self.node.transport.dial(self.node, target))

    def _expected(self) -> str:
        request = self._request
        messages = [Message(turn.role, turn.content) for turn in request.conversation.turns]
        steps = self._model.answer(self._model.encode(messages), request.max_tokens, Sampling())
        return "".join(step.text for step in steps)

    def abandon(self) -> None:
        """Nothing more happens here, and bids for it concern nobody."""
        super().abandon()
        self._consumer.around.gossip.consumers.pop(self.job.job_id, None)
        if not self.node.up:
            self._quotes.abandon()

    def over(self) -> None:
        """The job has ended: note how."""
        self._quotes.release()
        self._consumer.ended(self.job.job_id)
        text, expected = "".join(self._text), ""
        if not self._failure:
            expected = self._expected()
            self._consumer.around.judge.answered(self.node, self.job.job_id, text, expected)
        self._consumer.outcomes.append(
            Outcome(
                job_id=self.job.job_id,
                consumer=self.node.index,
                provider=None if self._failure else self.job.proof.sender,
                failure=self._failure,
                price=self.job.price,
                started=self._started,
                first_token_ms=self._first,
                duration_ms=self.node.world.now - self._started,
                expected=expected,
                text=text,
                tokens=self._tokens,
                planned=self.planned,
            )
        )

    def disk_full(self) -> None:
        """The user is told."""
        self._failure = StoreError.code
        self.over()
