"""Consumers that cheat their providers."""

# ruff: noqa: ARG002 - each strategy heeds what it needs

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Final

from aci_p2p.protocol.consumer import ConsumerJob
from aci_p2p.protocol.envelope import Envelope, kind_of, open_envelope
from aci_p2p.protocol.job import AskForQuotes, Effect, OpenStream, Payment, ReleaseQuotes, Send
from aci_p2p.protocol.lifecycle import Party
from aci_p2p.protocol.messages import Conversation, Kind, Offer, Opening, Receipt, Turn
from aci_p2p.protocol.request import JobRequest
from aci_p2p.protocol.terms import Price
from aci_p2p.testing.simulator.adversaries.base import Attacker, Part
from aci_p2p.testing.simulator.node import NETWORK
from aci_p2p.testing.simulator.roles import Consumer, ConsumerDriver
from aci_p2p.testing.toy_model import ToyModel

FLOOD_MS: Final = 100
"""Milliseconds between two offers of a flood: more than a node may have live."""
ASK_MS: Final = 30_000
"""Milliseconds between two jobs of a consumer that cheats in them."""
ESCROW: Final = (
    "some tokens come before they are paid for, and nobody holds a consumer's money yet: escrow on chain will"
)
"""Why a consumer that does not pay has the first tokens of its answers for nothing."""
SILENCE_MS: Final = 1_000
"""Milliseconds between two jobs of a consumer that holds slots."""


class _CheatingConsumer(Attacker):
    """Takes part as a consumer, and cheats in its jobs."""

    part = Part.CONSUMER
    interval_ms: ClassVar[int] = ASK_MS
    """Milliseconds between two of its jobs."""
    job_type: ClassVar[type[ConsumerJob]] = ConsumerJob
    """The machine of its jobs."""
    settles: ClassVar[bool] = True
    """Whether it means to pay what it owes."""

    @property
    def stolen(self) -> int:
        """What was worked for it, and not paid."""
        if self.settles:
            return 0
        worked: dict[bytes, int] = {}
        for payment in self.node.disk.payments.values():
            if payment.role is Party.CONSUMER:
                worked[payment.job_id] = worked.get(payment.job_id, 0) + payment.amount
        accounts = self.simulation.judge.accounts
        return sum(max(amount - accounts.held_for(job_id), 0) for job_id, amount in worked.items())

    def begin(self) -> None:
        """Take the honest consumer's place."""
        honest = self.simulation.consumers.pop(self.node.index)
        self._consumer = _Cheat(self, honest)
        self.every(self.interval_ms, self._ask)

    def _ask(self) -> None:
        self._consumer.start(*self.simulation.question(self.node))

    def performs(self, driver: ConsumerDriver, effect: Effect) -> bool:
        """Whether an effect of a job's machine is performed as an honest node would."""
        del driver, effect
        return True

    def settle(self, consumer: Consumer) -> None:
        """A job has ended: pay for it, or not."""
        if self.settles:
            consumer.settler.wake()


class _Cheat(Consumer):
    def __init__(self, attacker: _CheatingConsumer, honest: Consumer) -> None:
        super().__init__(honest.node, honest.around)
        self.attacker = attacker
        self.job_type = attacker.job_type

    def ended(self, job_id: bytes) -> None:
        del job_id
        self.attacker.settle(self)

    def broadcast(self, offer: Envelope[Offer]) -> None:
        self.around.gossip.offers.publish(self.node, offer.data)

    def drive(self, machine: ConsumerJob, request: JobRequest, model: ToyModel) -> ConsumerDriver:
        return _CheatDriver(self.attacker, self, machine, request, model)


class _CheatDriver(ConsumerDriver):
    def __init__(
        self,
        attacker: _CheatingConsumer,
        consumer: Consumer,
        machine: ConsumerJob,
        request: JobRequest,
        model: ToyModel,
    ) -> None:
        super().__init__(consumer, machine, request, model)
        self._attacker = attacker

    def _perform(self, effect: Effect) -> None:
        if self._attacker.performs(self, effect):
            super()._perform(effect)


class PaymentRefusal(_CheatingConsumer):
    """Takes what comes of an answer, and pays for none of it."""

    name = "payment refusal"
    goal = "have answers without paying for them"
    pays = ESCROW
    settles = False

    def performs(self, driver: ConsumerDriver, effect: Effect) -> bool:
        """All but the payment."""
        return not (isinstance(effect, Send) and kind_of(effect.data) is Kind.VOUCHER)


class DoubleSpend(_CheatingConsumer):
    """Signs one voucher, and gives it to every provider of each of its jobs."""

    name = "double spend of a voucher"
    goal = "pay two providers with the same money"
    pays = ESCROW
    settles = False

    def begin(self) -> None:
        """Take the honest consumer's place."""
        self._spent = b""
        super().begin()

    def performs(self, driver: ConsumerDriver, effect: Effect) -> bool:
        """All, but with the voucher that was spent before."""
        if isinstance(effect, Send) and kind_of(effect.data) is Kind.VOUCHER:
            self._spent = self._spent or effect.data
            if driver.end:
                driver.end.send(self._spent)
            return False
        return True


class ForgedReceipt(_CheatingConsumer):
    """Pays by vouchers while the answer comes, and signs a receipt for a tenth of its price."""

    name = "forged receipt"
    goal = "have answers for less than was bid"
    pays = ESCROW
    settles = False

    def settle(self, consumer: Consumer) -> None:
        """For a tenth."""
        for payment in self.node.owed():
            if kind_of(payment.statement) is Kind.RECEIPT:
                forged = self._forged(payment)
                self.node.disk.payments[payment.job_id, payment.role, payment.peer] = forged
        consumer.settler.wake()

    def _forged(self, payment: Payment) -> Payment:
        true = open_envelope(payment.statement, Receipt, network=NETWORK, now=None).body
        shares = tuple(replace(share, charges=_tenth(share.charges)) for share in true.shares)
        forged = replace(true, shares=shares, price=sum(share.price for share in shares))
        return replace(payment, statement=self.node.sealer.seal(forged, self.node.clock).data)


def _tenth(charges: Price) -> Price:
    return Price(charges.compute // 10, charges.licence // 10, charges.verification // 10, charges.priority // 10)


class SilentWinner(_CheatingConsumer):
    """Awards its jobs, and never sends the prompt."""

    name = "award and silence"
    goal = "hold the slots of providers for nothing"
    interval_ms = SILENCE_MS
    harms = "slots are not shared out by consumer yet"

    def performs(self, driver: ConsumerDriver, effect: Effect) -> bool:
        """All but the prompt."""
        return not (isinstance(effect, Send) and kind_of(effect.data) is Kind.INPUT)


class _OtherPromptJob(ConsumerJob):
    def _opening(self) -> Opening:
        opening = super()._opening()
        longer = Conversation((*opening.conversation.turns, Turn("user", "and another, much longer question")))
        return replace(opening, conversation=longer)


class OtherPrompt(_CheatingConsumer):
    """Sends a longer prompt than the one that it offered and the bid was made for."""

    name = "other prompt"
    goal = "have a long prompt read for the price of a short one"
    job_type = _OtherPromptJob


class AwardTwice(_CheatingConsumer):
    """Sends each award a second time, on a stream of its own."""

    name = "replayed award"
    goal = "have a job run twice for one bid"

    def performs(self, driver: ConsumerDriver, effect: Effect) -> bool:
        """All, and the award again."""
        if isinstance(effect, Send) and kind_of(effect.data) is Kind.AWARD and driver.end:
            self.node.transport.dial(self.node, driver.end.other).send(effect.data)
        return True


class OfferSpam(_CheatingConsumer):
    """Offers ten jobs a second, and awards none."""

    name = "offer spam"
    goal = "keep providers busy with bidding, and bury honest offers"
    interval_ms = FLOOD_MS

    def performs(self, driver: ConsumerDriver, effect: Effect) -> bool:
        """All but the award; and nobody is asked alone."""
        is_award = isinstance(effect, Send) and kind_of(effect.data) is Kind.AWARD
        return not (is_award or isinstance(effect, AskForQuotes))


class QuoteSpam(_CheatingConsumer):
    """Asks for quotes each second, and awards none."""

    name = "quote spam"
    goal = "hold the slots of providers without a job"
    interval_ms = SILENCE_MS

    def performs(self, driver: ConsumerDriver, effect: Effect) -> bool:
        """All but the award."""
        is_award = isinstance(effect, Send) and kind_of(effect.data) is Kind.AWARD
        return not (is_award or isinstance(effect, OpenStream | ReleaseQuotes))
