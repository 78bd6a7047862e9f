"""What attackers have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Final

from aci_p2p.protocol.job import Effect, StartGeneration
from aci_p2p.protocol.provider import ProviderJob
from aci_p2p.testing.simulator.node import SimNode
from aci_p2p.testing.simulator.roles import Provider, ProviderDriver
from aci_p2p.testing.simulator.transport import End
from aci_p2p.testing.toy_model import Step, ToyModel

if TYPE_CHECKING:
    from aci_p2p.testing.simulator.simulation import Simulation

SLOTS: Final = 64
"""Jobs that a cheating provider takes at once: it computes little."""


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
    """Why it still gains: what is not built yet that will stop it. Empty: it must gain nothing."""

    def __init__(self, simulation: Simulation, node: SimNode) -> None:
        """Takes over `node`."""
        self.simulation = simulation
        self.world = simulation.world
        self.gossip = simulation.gossip
        self.node = node
        self.stolen = 0
        """Base units' worth of answers that it had without paying."""
        node.honest = False

    def begin(self) -> None:
        """Take up the attack."""
        raise NotImplementedError

    def every(self, interval_ms: int, act: Callable[[], None]) -> None:
        """Do something again and again while jobs are offered."""
        if self.world.now < self.simulation.ends_at:
            if self.node.up:
                act()
            self.world.after(interval_ms, self.every, interval_ms, act)


class CheatingProvider(Attacker):
    """Takes part as a provider, cheaper than the honest ones, and cheats in its jobs."""

    part = Part.PROVIDER
    discount: ClassVar[int] = 2
    """It asks so many times less than the honest provider in its place."""

    def begin(self) -> None:
        honest = self.simulation.providers.pop(self.node.index)
        honest.stop()
        price = max(1, honest.offering.output_token_price // self.discount)
        _Cheat(self, honest, price)

    def answers(self, model: ToyModel, run: StartGeneration, honest: Sequence[Step]) -> Sequence[Step]:
        """The answer that is given; `honest` is the one that the model gives."""
        del model, run
        return honest

    def accepts(self, end: End) -> bool:
        """Whether a consumer's stream is served at all."""
        del end
        return True

    def performs(self, driver: ProviderDriver, effect: Effect) -> bool:
        """Whether an effect of a job's machine is performed as an honest node would."""
        del driver, effect
        return True


class _Cheat(Provider):
    def __init__(self, attacker: CheatingProvider, honest: Provider, price: int) -> None:
        self._attacker = attacker
        super().__init__(honest.node, honest.gossip, honest.model, price=price, slots=SLOTS, pace_ms=honest.pace_ms)

    def accept(self, end: End) -> None:
        if self._attacker.accepts(end):
            super().accept(end)

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
