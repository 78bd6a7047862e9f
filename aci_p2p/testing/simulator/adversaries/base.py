"""What attackers have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Final

from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.job import Effect, StartGeneration
from aci_p2p.protocol.messages import Bid, Offer
from aci_p2p.protocol.provider import ProviderJob
from aci_p2p.testing.simulator.node import SimNode
from aci_p2p.testing.simulator.serving import Provider, ProviderDriver
from aci_p2p.testing.simulator.transport import End
from aci_p2p.testing.toy_model import Step, ToyModel

if TYPE_CHECKING:
    from aci_p2p.testing.simulator.simulation import Simulation

SLOTS: Final = 64
"""Jobs that a cheating provider takes at once: it computes little."""
REACTION_MS: Final = 3_000
"""An eavesdropper answers one offer in so many milliseconds: its hands are full with each."""
VERIFICATION: Final = "nobody executes an answer again before proofs and disputes are built"
"""Why wrong answers are paid."""
LIES: Final = (
    "an answer whose proof does not fit ends its job: nobody can tell which of its tokens are true, to go on from"
)
"""Why a provider that proves what it did not send spoils its jobs."""


class Part(Enum):
    """In whose place an attacker takes part."""

    PROVIDER = "provider"
    CONSUMER = "consumer"
    ANY = "any"


class Attacker:
    """A cheating node; one class for each strategy."""

    part: ClassVar[Part] = Part.ANY
    """Which nodes can be cast as it."""
    name: ClassVar[str]
    """What it is called in tables and on the command line."""
    goal: ClassVar[str]
    """What it wants, in words."""
    pays: ClassVar[str] = ""
    """Why it still gains money: what is not built yet that will stop it. Empty: it gains nothing."""
    harms: ClassVar[str] = ""
    """Why it still spoils jobs of honest consumers. Empty: it spoils next to none."""

    def __init__(self, simulation: Simulation, node: SimNode) -> None:
        """Takes over `node`."""
        self.simulation = simulation
        """The world that it attacks."""
        self.world = simulation.world
        """Its clock and queue."""
        self.gossip = simulation.gossip
        """Offers and bids."""
        self.node = node
        """The node that cheats."""
        node.honest = False

    @property
    def stolen(self) -> int:
        """Base units' worth of answers that it had without paying."""
        return 0

    @classmethod
    def price(cls, honest: int) -> int:
        """What it asks for an output token in place of an honest provider that asks `honest`, base units."""
        return honest

    def begin(self) -> None:
        """Take up the attack."""
        raise NotImplementedError

    def every(self, interval_ms: int, act: Callable[[], None]) -> None:
        """Do something again and again while jobs are offered."""
        if self.world.now < self.simulation.ends_at:
            if self.node.up:
                act()
            self.world.after(interval_ms, self.every, interval_ms, act)


class Eavesdropper(Attacker):
    """Wants no jobs of its own, and reacts to what it hears."""

    def begin(self) -> None:
        """Leave the market, and listen."""
        self.simulation.consumers.pop(self.node.index, None)
        honest = self.simulation.providers.pop(self.node.index, None)
        if honest:
            honest.stop()
        self._ready_at = 0
        self.gossip.eavesdroppers.append((self.node, self._react, self.hears_bid))

    def _react(self, offer: Envelope[Offer]) -> None:
        if self.world.now >= self._ready_at:
            self._ready_at = self.world.now + REACTION_MS
            self.hears_offer(offer)

    def hears_offer(self, offer: Envelope[Offer]) -> None:
        """Somebody offers a job."""

    def hears_bid(self, bid: Envelope[Bid]) -> None:
        """Somebody bids."""

    def bid_for(self, offer: Envelope[Offer]) -> Bid:
        """A bid that nobody can beat."""
        return Bid(offer.body.job_id, offer.digest, offer.body.model_root, 0, 1, 1, (), "none", "")


class CheatingProvider(Attacker):
    """Takes part as a provider, cheaper than the honest ones, and cheats in its jobs."""

    part = Part.PROVIDER
    discount: ClassVar[int] = 2
    """It asks so many times less than the honest provider in its place."""

    @classmethod
    def price(cls, honest: int) -> int:
        """So much less that it wins."""
        return max(1, honest // cls.discount)

    def begin(self) -> None:
        """Take the honest provider's place."""
        honest = self.simulation.providers.pop(self.node.index)
        honest.stop()
        cheat = _Cheat(self, honest, self.price(honest.offering.output_token_price))
        self.simulation.replace_announcing(self.node, cheat.announcing)

    def answers(self, model: ToyModel, run: StartGeneration, honest: Sequence[Step]) -> Sequence[Step]:
        """The answer that is given; `honest` is the one that the model gives."""
        del model, run
        return honest

    def accepts(self, end: End) -> bool:
        """Whether a consumer's award is answered at all."""
        del end
        return True

    def performs(self, driver: ProviderDriver, effect: Effect) -> bool:
        """Whether an effect of a job's machine is performed as an honest node would."""
        del driver, effect
        return True


class _Cheat(Provider):
    def __init__(self, attacker: CheatingProvider, honest: Provider, price: int) -> None:
        self._attacker = attacker
        super().__init__(honest.node, honest.around, honest.model, price=price, slots=SLOTS, pace_ms=honest.pace_ms)

    def award(self, end: End, frame: bytes) -> None:
        if self._attacker.accepts(end):
            super().award(end, frame)

    def answer(self, run: StartGeneration) -> Sequence[Step]:
        return self._attacker.answers(self.model, run, super().answer(run))

    def drive(self, machine: ProviderJob) -> ProviderDriver:
        return _CheatDriver(self._attacker, self, machine)


class _CheatDriver(ProviderDriver):
    def __init__(self, attacker: CheatingProvider, provider: Provider, machine: ProviderJob) -> None:
        self._attacker = attacker
        super().__init__(provider, machine)

    def _perform(self, effect: Effect) -> None:
        if self._attacker.performs(self, effect):
            super()._perform(effect)
