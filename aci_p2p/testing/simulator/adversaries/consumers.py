"""Consumers that cheat their providers."""

from __future__ import annotations

from aci_p2p.protocol.consumer import ConsumerJob, JobRequest
from aci_p2p.protocol.envelope import kind_of
from aci_p2p.protocol.job import Effect, Send
from aci_p2p.protocol.messages import Kind
from aci_p2p.testing.simulator.adversaries.base import Attacker, Part
from aci_p2p.testing.simulator.roles import Consumer, ConsumerDriver
from aci_p2p.testing.toy_model import ToyModel

FLOOD_MS = 20
"""Milliseconds between two offers of a flood: fifty a second, where honest consumers make one in minutes."""
ASK_MS = 30_000
"""Milliseconds between two jobs of a consumer that cheats in them."""


class _CheatingConsumer(Attacker):
    """Takes part as a consumer, and cheats in its jobs."""

    part = Part.CONSUMER
    interval_ms = ASK_MS

    def begin(self) -> None:
        honest = self.simulation.consumers.pop(self.node.index)
        self._consumer = _Cheat(self, honest)
        self.every(self.interval_ms, self._ask)

    def _ask(self) -> None:
        self.simulation.offer(self._consumer)

    def performs(self, driver: ConsumerDriver, effect: Effect) -> bool:
        """Whether an effect of a job's machine is performed as an honest node would."""
        del driver, effect
        return True


class _Cheat(Consumer):
    def __init__(self, attacker: _CheatingConsumer, honest: Consumer) -> None:
        super().__init__(honest.node, honest.gossip, honest.find)
        self.attacker = attacker

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
        if isinstance(effect, Send) and kind_of(effect.data) is Kind.RECEIPT:
            self.stolen += driver.job.price
            return False
        return True


class SilentWinner(_CheatingConsumer):
    """Awards its jobs, and never sends the prompt."""

    name = "award and silence"
    goal = "hold the slots of providers for nothing"
    interval_ms = 1_000
    pays = "slots are not shared out by consumer yet"

    def performs(self, driver: ConsumerDriver, effect: Effect) -> bool:
        return not (isinstance(effect, Send) and kind_of(effect.data) is Kind.INPUT)


class OfferSpam(_CheatingConsumer):
    """Offers fifty jobs a second, and awards none."""

    name = "offer spam"
    goal = "keep providers busy with bidding, and bury honest offers"
    interval_ms = FLOOD_MS

    def performs(self, driver: ConsumerDriver, effect: Effect) -> bool:
        return not (isinstance(effect, Send) and kind_of(effect.data) is Kind.AWARD)
