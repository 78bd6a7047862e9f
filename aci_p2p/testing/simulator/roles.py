"""The honest roles of a simulated node: consumer and provider, on the machines that real nodes run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from aci_p2p.executor import FinishReason, Message, Sampling
from aci_p2p.protocol.bidding import BidBook, Declined, Offering
from aci_p2p.protocol.consumer import BidArrived, ConsumerJob, JobRequest, JobSecrets, Start
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import (
    Broadcast,
    Deliver,
    Effect,
    Failed,
    FrameArrived,
    JobRecord,
    OpenStream,
    StartGeneration,
    StopGeneration,
)
from aci_p2p.protocol.messages import AbortCode, Bid, Engine, Finish, Offer
from aci_p2p.protocol.provider import GenerationEnded, GenerationFailed, Produced, ProviderJob, ProviderSecrets
from aci_p2p.protocol.selection import PriceThenLatency
from aci_p2p.protocol.validation import MessageRefused
from aci_p2p.testing.simulator.gossip import Gossip
from aci_p2p.testing.simulator.node import Driver, SimNode
from aci_p2p.testing.simulator.transport import End
from aci_p2p.testing.simulator.world import Timer
from aci_p2p.testing.toy_model import CONTEXT, Step, ToyModel

ENGINE: Final = Engine("aci-toy/1", "toy", "simulated", "none")
"""What simulated providers say runs their models."""
CHUNK_TOKENS: Final = 8
"""Tokens that a simulated provider sends at once."""
_FINISH: Final = {FinishReason.STOP: Finish.STOP, FinishReason.LENGTH: Finish.LENGTH}

Find = Callable[[NodeId], SimNode | None]
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
    """The answer that the true model gives."""
    text: str
    """The answer that came."""


class Consumer:
    """Offers jobs and sees them through."""

    def __init__(self, node: SimNode, gossip: Gossip, find: Find) -> None:
        self.node = node
        self.gossip = gossip
        self.find = find
        self.outcomes: list[Outcome] = []
        """Jobs that have ended."""
        self.stored: Callable[[SimNode, JobRecord], None] = _nothing
        """Called when a transition is on disk."""
        self.believes: Callable[[SimNode, Envelope[Bid]], None] = _nothing
        """Called with every bid that passed the checks."""

    def start(self, request: JobRequest, model: ToyModel) -> None:
        """Offer a job; `model` is the true one, for judging the answer and nothing else."""
        node = self.node
        secrets = JobSecrets(node.entropy(), node.entropy())
        machine = ConsumerJob(node.sealer, request, secrets, PriceThenLatency())
        driver = self.drive(machine, request, model)
        self.gossip.consumers[machine.job_id] = (node, driver.hear)
        driver.tell(Start())

    def drive(self, machine: ConsumerJob, request: JobRequest, model: ToyModel) -> ConsumerDriver:
        """The driver of a job; attackers use their own."""
        return ConsumerDriver(self, machine, request, model)


class ConsumerDriver(Driver):
    """One job of a consumer."""

    def __init__(self, consumer: Consumer, machine: ConsumerJob, request: JobRequest, model: ToyModel) -> None:
        super().__init__(consumer.node, machine)
        self._consumer = consumer
        self.job = machine
        self._started = consumer.node.world.now
        self._first: int | None = None
        self._text: list[str] = []
        self._failure = ""
        self._request = request
        self._model = model

    def hear(self, bid: Envelope[Bid]) -> None:
        """A bid has come over gossip."""
        if self.node.honest:
            self._consumer.believes(self.node, bid)
        self.tell(BidArrived(bid))

    def stored(self, record: JobRecord) -> None:
        self._consumer.stored(self.node, record)

    def perform(self, effect: Effect) -> None:
        match effect:
            case Broadcast(offer):
                self._consumer.gossip.offers.publish(self.node, offer.data)
            case OpenStream(provider, _):
                self._open(provider)
            case Deliver(_, text):
                if self._first is None:
                    self._first = self.node.world.now - self._started
                self._text.append(text)
            case Failed(error):
                self._failure = error.code
            case _:
                pass

    def _open(self, provider: NodeId) -> None:
        target = self._consumer.find(provider)
        if target is not None:
            self.attach(self.node.transport.dial(self.node, target))

    def _expected(self) -> str:
        request = self._request
        messages = [Message(turn.role, turn.content) for turn in request.conversation.turns]
        steps = self._model.answer(self._model.encode(messages), request.max_tokens, Sampling())
        return "".join(step.text for step in steps)

    def over(self) -> None:
        now = self.node.world.now
        self._consumer.gossip.consumers.pop(self.job.job_id, None)
        self._consumer.outcomes.append(
            Outcome(
                job_id=self.job.job_id,
                consumer=self.node.index,
                provider=None if self._failure else self.job.proof.sender,
                failure=self._failure,
                price=self.job.price,
                started=self._started,
                first_token_ms=self._first,
                duration_ms=now - self._started,
                expected=self._expected(),
                text="".join(self._text),
            )
        )


class Provider:
    """Bids on offers and runs what it wins, on a toy model."""

    def __init__(self, node: SimNode, gossip: Gossip, model: ToyModel, *, price: int, slots: int, pace_ms: int) -> None:
        """`price`: base units for each output token; `pace_ms`: milliseconds for each token."""
        self.node = node
        self.gossip = gossip
        self.model = model
        self.slots = slots
        self.pace_ms = pace_ms
        self.offering = Offering(model.name, model.root, CONTEXT, price // 4, price)
        self.book = BidBook(node.sealer, (self.offering,), slots)
        self.running: dict[ProviderDriver, None] = {}
        self.stopped = False
        """Whether it has left the market in good order."""
        self.slowness = 1
        """How many times slower than it should be it computes."""
        self.fail_after: int | None = None
        """Tokens after which the executor dies; None: never."""
        self.stored: Callable[[SimNode, JobRecord], None] = _nothing
        """Called when a transition is on disk."""
        self.start()

    def start(self) -> None:
        """Begin, or begin again after a crash."""
        self.book = BidBook(self.node.sealer, (self.offering,), self.slots)
        self.running.clear()
        self.stopped = False
        self.node.accepting = self.accept
        self.gossip.providers.setdefault(self.model.root, {})[self.node] = self.hear

    def stop(self) -> None:
        """Leave the market: hear no more offers and take no more jobs."""
        self.stopped = True
        self.node.accepting = None
        self.gossip.providers[self.model.root].pop(self.node, None)

    def hear(self, offer: Envelope[Offer]) -> None:
        """An offer has come over gossip."""
        bid = self.book.bid(offer, self.node.clock, running=len(self.running), addresses=())
        if bid is not None:
            self.gossip.bids.publish(self.node, bid.data)

    def accept(self, end: End) -> None:
        """A consumer has opened a job's stream: its first frame awards a bid."""
        end.on_frame = lambda frame: self._on_award(end, frame)

    def _on_award(self, end: End, frame: bytes) -> None:
        node = self.node
        try:
            taken = self.book.take(frame, node.clock, running=len(self.running))
        except MessageRefused:
            end.close()
            return
        if isinstance(taken, Declined):
            end.send(node.sealer.seal(taken.answer, node.clock).data)
            end.close()
            return
        machine = ProviderJob(
            node.sealer, taken.offer, taken.bid, ProviderSecrets(nonce=node.entropy(), salt=node.entropy())
        )
        driver = self.drive(machine)
        driver.attach(end)
        driver.tell(FrameArrived(frame))

    def drive(self, machine: ProviderJob) -> ProviderDriver:
        """The driver of a job; attackers use their own."""
        return ProviderDriver(self, machine)

    def answer(self, run: StartGeneration) -> Sequence[Step]:
        """The answer to a job; attackers give another."""
        sampling = Sampling(run.temperature_milli, run.seed if run.temperature_milli else b"")
        return list(self.model.answer(prompt_of(self.model, run), run.max_tokens, sampling))


class ProviderDriver(Driver):
    """One job that a provider has won."""

    def __init__(self, provider: Provider, machine: ProviderJob) -> None:
        super().__init__(provider.node, machine)
        self.provider = provider
        self._next: Timer | None = None
        provider.running[self] = None

    def stored(self, record: JobRecord) -> None:
        self.provider.stored(self.node, record)

    def perform(self, effect: Effect) -> None:
        match effect:
            case StartGeneration():
                steps = self.provider.answer(effect)
                self._produce(iter(steps), 0, len(prompt_of(self.provider.model, effect)))
            case StopGeneration():
                self.stop()
            case _:
                pass

    def _produce(self, steps: Iterator[Step], made: int, input_tokens: int) -> None:
        """Make the next chunk of the answer after the time that it takes."""
        chunk: list[Step] = []
        for step in steps:
            chunk.append(step)
            if len(chunk) == CHUNK_TOKENS:
                break
        self._next = self.node.world.after(
            len(chunk) * self.provider.pace_ms * self.provider.slowness + 1,
            self._made,
            chunk,
            steps,
            made + len(chunk),
            input_tokens,
        )

    def _made(self, chunk: list[Step], steps: Iterator[Step], made: int, input_tokens: int) -> None:
        dies = self.provider.fail_after
        if dies is not None and made >= dies:
            self.tell(GenerationFailed(AbortCode.EXECUTOR_FAILED, "the computation failed"))
            return
        if chunk:
            self.tell(Produced(tuple(step.token for step in chunk), "".join(step.text for step in chunk)))
        finish = chunk[-1].finish if chunk else FinishReason.STOP
        if finish is None:
            self._produce(steps, made, input_tokens)
        else:
            self.tell(GenerationEnded(_FINISH[finish], input_tokens, ENGINE))

    def abandon(self) -> None:
        super().abandon()
        self.stop()
        self.provider.running.pop(self, None)

    def stop(self) -> None:
        """Compute no more."""
        if self._next:
            self._next.cancel()


def prompt_of(model: ToyModel, run: StartGeneration) -> tuple[int, ...]:
    """Token ids of a job's prompt."""
    return model.encode([Message(turn.role, turn.content) for turn in run.conversation.turns])


def _nothing(_node: SimNode, _what: object) -> None:
    """Nobody watches."""
