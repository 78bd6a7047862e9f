"""The honest provider of a simulated node, on the machines that real nodes run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from aci_p2p.executor import FinishReason, Message, Sampling
from aci_p2p.protocol.admission import LEASE_MS
from aci_p2p.protocol.bidding import BidBook, Declined, Offering, Won
from aci_p2p.protocol.envelope import Envelope, kind_of
from aci_p2p.protocol.job import (
    Effect,
    FrameArrived,
    HoldGeneration,
    ResumeGeneration,
    StartGeneration,
    StopGeneration,
)
from aci_p2p.protocol.lifecycle import Party
from aci_p2p.protocol.messages import AbortCode, Finish, Kind, Offer
from aci_p2p.protocol.provider import GenerationEnded, GenerationFailed, Produced, ProviderJob, ProviderSecrets
from aci_p2p.protocol.publications import Ask, CapabilityRecord, Engine
from aci_p2p.protocol.validation import MessageRefused
from aci_p2p.testing.simulator.asks import Asking
from aci_p2p.testing.simulator.casting import INPUT_SHARE
from aci_p2p.testing.simulator.directory import Announcing
from aci_p2p.testing.simulator.driver import Driver
from aci_p2p.testing.simulator.node import SimNode
from aci_p2p.testing.simulator.roles import Surroundings
from aci_p2p.testing.simulator.settling import Till
from aci_p2p.testing.simulator.transport import End
from aci_p2p.testing.simulator.world import Timer
from aci_p2p.testing.toy_model import CONTEXT, END, Step, ToyModel

ENGINE: Final = Engine("aci-toy/1", "toy", "simulated", "none")
"""What simulated providers say runs their models."""
CHUNK_TOKENS: Final = 8
"""Tokens that a simulated provider sends at once."""
AWARD_WAIT_MS: Final = 5_000
"""How long a provider waits for the award on a stream, milliseconds, as real ones do (`provider.AWARD_WAIT_S`)."""
_FINISH: Final = {FinishReason.STOP: Finish.STOP, FinishReason.LENGTH: Finish.LENGTH}


class Provider:
    """Bids on offers and runs what it wins, on a toy model."""

    def __init__(
        self, node: SimNode, around: Surroundings, model: ToyModel, *, price: int, slots: int, pace_ms: int
    ) -> None:
        """`price`: base units for each output token; `pace_ms`: milliseconds for each token."""
        self.node = node
        """Where it runs."""
        self.around = around
        """What it does it in."""
        self.model = model
        """What it serves."""
        self.slots = slots
        """Jobs at once."""
        self.pace_ms = pace_ms
        """Milliseconds for each token."""
        self.offering = _offering(model, price)
        """What it serves, for how much."""
        self.book = BidBook(node.sealer, (self.offering,), slots)
        """Its bids."""
        self.running: dict[ProviderDriver, None] = {}
        """Its jobs, the oldest first."""
        self.stopped = False
        """Whether it has left the market in good order."""
        self.slowness = 1
        """How many times slower than it should be it computes."""
        self.fail_after: int | None = None
        """Tokens after which the executor dies; None: never."""
        self.announcing = Announcing(node, around.directory, self.capabilities)
        """What it publishes in the DHT."""
        self._till = Till(node)
        self._asking = Asking(node, around.asks, self.ask) if around.asks else None

        self.start()

    def reprice(self, price: int) -> None:
        """Ask another price for each output token, base units."""
        self.offering = _offering(self.model, price)
        self.book.offer((self.offering,), self.slots)

    def start(self) -> None:
        """Begin, or begin again after a crash."""
        self.book = BidBook(self.node.sealer, (self.offering,), self.slots)
        self.running.clear()

        self.stopped = False
        self.announcing.come_back()
        self.node.accepting = self.accept
        self.around.gossip.providers.setdefault(self.model.root, {})[self.node] = self.hear
        if self._asking:
            self._asking.start()

    def stop(self) -> None:
        """Leave the market: hear no more offers and take no more jobs."""
        self.stopped = True
        self.announcing.leave()
        self.node.accepting = None
        self.around.gossip.providers[self.model.root].pop(self.node, None)
        if self._asking:
            self._asking.stop()

    def capabilities(self) -> Sequence[CapabilityRecord]:
        """What is announced in the DHT."""
        offering = self.offering
        return (
            CapabilityRecord(
                model_root=offering.root,
                model_name=offering.name,
                context=offering.context,
                engine=ENGINE,
                input_token_price=offering.input_token_price,
                output_token_price=offering.output_token_price,
                slots=self.slots,
                addresses=(),
                free_slots=max(self.slots - len(self.running), 0),
                price_curve=(),
            ),
        )

    def ask(self) -> Ask:
        """What is asked for at the moment."""
        offering = self.offering
        return Ask(
            model_root=offering.root,
            model_name=offering.name,
            engine=ENGINE,
            context=offering.context,
            input_token_price=offering.input_token_price,
            output_token_price=offering.output_token_price,
            price_curve=(),
            slots=self.slots,
            free_slots=max(self.slots - len(self.running), 0),
            latency_ms=self.book.latency_ms,
            region="",
            addresses=(),
        )

    def changed(self) -> None:
        """A slot was taken, or is free again."""
        if self._asking:
            self._asking.changed()

    def hear(self, offer: Envelope[Offer]) -> None:
        """An offer has come over gossip."""
        self.around.judge.heard(self.node, offer)
        self.book.is_suspended = self.book.is_suspended and self.node.disk.is_full
        bid = self.book.bid(offer, self.node.clock, addresses=())
        if bid is not None:
            self.around.gossip.bids.say(self.node, bid)

    def accept(self, end: End) -> None:
        """A consumer has opened a stream: its first frame says what for, or it is closed."""
        patience = self.node.world.after(AWARD_WAIT_MS, end.close)

        def begin(frame: bytes) -> None:
            patience.cancel()
            try:
                kind = kind_of(frame)
            except MessageRefused:
                end.close()
                return
            if kind in {Kind.VOUCHER, Kind.RECEIPT}:
                self._till.serve(end, frame)
            elif kind is Kind.OFFER:
                self._quote(end, frame)
            else:
                self.award(end, frame)

        end.on_frame = begin

    def _quote(self, end: End, frame: bytes) -> None:
        """Answer an offer, and hold a slot until the award comes, or the lease is over."""
        node = self.node
        try:
            quoted = self.book.quote(frame, end.other.node_id, node.clock, addresses=())
        except MessageRefused:
            end.close()
            return
        if isinstance(quoted, Declined):
            end.send(node.sealer.seal(quoted.answer, node.clock).data)
            end.close()
            return

        def give_up(_detail: str = "") -> None:
            lease.cancel()
            self.book.take_back(quoted)
            end.close()

        def begin(frame: bytes) -> None:
            lease.cancel()
            self.award(end, frame)

        lease = node.world.after(LEASE_MS, give_up)
        end.on_frame, end.on_end = begin, give_up
        end.send(quoted.bid.data)

    def award(self, end: End, frame: bytes) -> None:
        """A consumer awards a bid on a stream."""
        node = self.node
        try:
            taken = self.book.take(frame, node.clock)
        except MessageRefused:
            end.close()
            return
        if isinstance(taken, Won):
            is_on_record = (taken.offer.body.job_id, Party.PROVIDER) in node.disk.jobs
            taken = self.book.confirm(taken, is_on_record=is_on_record)
        if isinstance(taken, Declined):
            end.send(node.sealer.seal(taken.answer, node.clock).data)
            end.close()
            return
        secrets = ProviderSecrets(nonce=node.entropy(), salt=node.entropy(), kem_seed=node.entropy())
        machine = ProviderJob(node.sealer, taken.offer, taken.bid, secrets)
        driver = self.drive(machine)
        driver.slot = self.book, taken
        driver.attach(end)
        self.around.judge.bounded(node, outstanding=len(self.book), running=len(self.running), slots=self.slots)
        driver.tell(FrameArrived(frame))

    def drive(self, machine: ProviderJob) -> ProviderDriver:
        """The driver of a job; attackers use their own."""
        return ProviderDriver(self, machine)

    def answer(self, run: StartGeneration) -> Sequence[Step]:
        """The answer to a job; attackers give another."""
        return run_model(self.model, run)


class ProviderDriver(Driver):
    """One job that a provider has won."""

    def __init__(self, provider: Provider, machine: ProviderJob) -> None:
        """Takes one of the provider's slots."""
        super().__init__(provider.node, machine, provider.around.judge)
        self.provider = provider
        """Whose job it is."""
        self.slot: tuple[BidBook, Won] | None = None
        """Where its slot is, and what it was taken for."""
        self._started = provider.node.world.now
        self._next: Timer | None = None
        self._is_held = False
        self._resume: Callable[[], None] = _nothing
        self._last_finish = FinishReason.STOP
        provider.running[self] = None
        provider.changed()

    def perform(self, effect: Effect) -> None:
        """Perform what a provider's job asks for."""
        match effect:
            case StartGeneration():
                steps = self.provider.answer(effect)
                self._started = self.node.world.now
                if len(effect.accepted) == effect.max_tokens:
                    self._last_finish = FinishReason.LENGTH
                self._produce(iter(steps), 0, len(prompt_of(self.provider.model, effect)))
            case HoldGeneration():
                self._is_held = True
            case ResumeGeneration():
                self._is_held = False
                resume, self._resume = self._resume, _nothing
                resume()
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
        if made == len(chunk):
            self.provider.book.measured(self.node.world.now - self._started)
        if chunk:
            text = "".join(step.text for step in chunk)
            self.tell(Produced(tuple(step.token for step in chunk), text, input_tokens))
        finish = chunk[-1].finish if chunk else self._last_finish
        if finish is None and self._is_held:
            self._resume = lambda: self._produce(steps, made, input_tokens)
        elif finish is None:
            self._produce(steps, made, input_tokens)
        else:
            self.tell(GenerationEnded(_FINISH[finish], input_tokens, ENGINE))

    def abandon(self) -> None:
        """Nothing more happens here, and the slot is free."""
        super().abandon()
        self.stop()
        self.provider.running.pop(self, None)
        if self.slot:
            book, won = self.slot
            book.release(won)
        self.provider.changed()

    def disk_full(self) -> None:
        """No bids before the disk takes what is written."""
        self.provider.book.is_suspended = True

    def stop(self) -> None:
        """Compute no more."""
        self._resume = _nothing
        if self._next:
            self._next.cancel()


def _offering(model: ToyModel, price: int) -> Offering:
    return Offering(model.name, model.root, CONTEXT, price // INPUT_SHARE, price)


def _nothing() -> None:
    """Nothing waits."""


def run_model(model: ToyModel, run: StartGeneration) -> list[Step]:
    """What a model gives for a job: nothing where all of the answer was there."""
    if END in run.accepted:
        return []
    sampling = Sampling(run.temperature_milli, run.seed if run.temperature_milli else b"")
    return list(model.answer(prompt_of(model, run), run.max_tokens, sampling, run.accepted))


def prompt_of(model: ToyModel, run: StartGeneration) -> tuple[int, ...]:
    """Token ids of a job's prompt."""
    return model.encode([Message(turn.role, turn.content) for turn in run.conversation.turns])
