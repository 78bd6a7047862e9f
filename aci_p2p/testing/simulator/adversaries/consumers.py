"""Consumers that cheat their providers."""

# ruff: noqa: ARG002 - each strategy heeds what it needs

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Final

from aci_p2p.protocol.consumer import ConsumerJob
from aci_p2p.protocol.envelope import Envelope, kind_of, open_envelope
from aci_p2p.protocol.job import Effect, Send
from aci_p2p.protocol.messages import Conversation, Kind, Offer, Opening, Receipt, Turn
from aci_p2p.protocol.request import JobRequest
from aci_p2p.testing.simulator.adversaries.base import Attacker, Part
from aci_p2p.testing.simulator.node import NETWORK
from aci_p2p.testing.simulator.roles import Consumer, ConsumerDriver
from aci_p2p.testing.toy_model import ToyModel

FLOOD_MS: Final = 100
"""Milliseconds between two offers of a flood: more than a node may have live."""
ASK_MS: Final = 30_000
"""Milliseconds between two jobs of a consumer that cheats in them."""
SILENCE_MS: Final = 1_000
"""Milliseconds between two jobs of a consumer that holds slots."""


class _CheatingConsumer(Attacker):
    """Takes part as a consumer, and cheats in its jobs."""

    part = Part.CONSUMER
    interval_ms: ClassVar[int] = ASK_MS
    """Milliseconds between two of its jobs."""
    job_type: ClassVar[type[ConsumerJob]] = ConsumerJob
    """The machine of its jobs."""

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


class _Cheat(Consumer):
    def __init__(self, attacker: _CheatingConsumer, honest: Consumer) -> None:
        super().__init__(honest.node, honest.around)
        self.attacker = attacker
        self.job_type = attacker.job_type

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
    """Takes the whole answer, and signs no receipt for it."""

    name = "payment refusal"
    goal = "have answers without paying for them"
    pays = "a consumer risks nothing before there are vouchers for parts of an answer"

    def performs(self, driver: ConsumerDriver, effect: Effect) -> bool:
        """All but the payment."""
        if isinstance(effect, Send) and kind_of(effect.data) is Kind.RECEIPT:
            self.stolen += driver.job.price
            return False
        return True


class ForgedReceipt(_CheatingConsumer):
    """Takes the whole answer, and signs a receipt for a tenth of its price."""

    name = "forged receipt"
    goal = "have answers for less than was bid"
    pays = "a consumer risks nothing before there are vouchers for parts of an answer"

    def performs(self, driver: ConsumerDriver, effect: Effect) -> bool:
        """All, but for a tenth."""
        if isinstance(effect, Send) and kind_of(effect.data) is Kind.RECEIPT:
            true = open_envelope(effect.data, Receipt, network=NETWORK, now=None).body
            forged = self.node.sealer.seal(replace(true, price=true.price // 10), self.node.clock)
            if driver.end:
                driver.end.send(forged.data)
            self.stolen += true.price
            return False
        return True


class SilentWinner(_CheatingConsumer):
    """Awards its jobs, and never sends the prompt."""

    name = "award and silence"
    goal = "hold the slots of providers for nothing"
    interval_ms = SILENCE_MS
    harms = "each identity may hold its share of the slots for seconds, and identities cost nothing"

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
        """All but the award."""
        return not (isinstance(effect, Send) and kind_of(effect.data) is Kind.AWARD)
