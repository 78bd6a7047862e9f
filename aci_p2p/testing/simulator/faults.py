"""What goes wrong in a simulated world, and when."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from aci_p2p.protocol.envelope import MAX_SKEW_MS
from aci_p2p.protocol.job import Cancel, JobRecord
from aci_p2p.testing.simulator.node import SimNode
from aci_p2p.testing.simulator.scenario import Fault

if TYPE_CHECKING:
    from aci_p2p.testing.simulator.simulation import Simulation

STRIKES: Final = 12
"""How often each enabled fault strikes in one run, about."""
DOWN_MS: Final = (1_000, 60_000)
"""How long a node that died stays away, shortest and longest, milliseconds."""
CUT_MS: Final = (5_000, 60_000)
"""How long a partition lasts, milliseconds."""
WRITE_CRASH: Final = 0.05
"""Share of the transitions after which the node dies, while CRASH_AT_WRITE is enabled."""
SLOWNESS: Final = 200
"""How many times slower a provider becomes."""
HOUR_MS: Final = 3_600_000
"""How far a wrong clock is off, milliseconds."""


class Faults:
    """Strikes at random until `end`."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._enabled = simulation.scenario.faults
        self._random = simulation.world.dice["faults"]
        self._over = False
        self.fired: Counter[Fault] = Counter()
        """How often each fault struck."""

    def begin(self) -> None:
        """Plan when each fault strikes."""
        simulation = self._simulation
        span = simulation.ends_at - simulation.world.now
        for fault in Fault:
            if fault in self._enabled and fault in _STRIKES:
                for _ in range(STRIKES):
                    simulation.world.after(self._random.randrange(span), self._strike, fault)

    def _strike(self, fault: Fault) -> None:
        if not self._over:
            _STRIKES[fault](self)

    def end(self) -> None:
        """Nothing goes wrong any more; what is broken is mended."""
        self._over = True
        simulation = self._simulation
        simulation.transport.model = simulation.scenario.network
        simulation.transport.heal()
        simulation.gossip.healed()
        for node in simulation.nodes:
            node.skew_ms = 0
            simulation.restart(node)
        for provider in simulation.providers.values():
            provider.fail_after = None
            provider.slowness = 1
            if provider.stopped:
                provider.start()

    def stored(self, node: SimNode, record: JobRecord) -> None:
        """A transition is on disk."""
        if Fault.CRASH_AT_WRITE in self._enabled and not self._over and self._random.random() < WRITE_CRASH:
            self.fired[Fault.CRASH_AT_WRITE] += 1
            self._down(node)

    def _down(self, node: SimNode) -> None:
        self._simulation.crash(node)
        self._simulation.world.after(self._random.randint(*DOWN_MS), self._simulation.restart, node)

    def _crash(self) -> None:
        node = self._random.choice(self._simulation.nodes)
        if node.up:
            self.fired[Fault.CRASH] += 1
            self._down(node)

    def _partition(self) -> None:
        simulation = self._simulation
        self.fired[Fault.PARTITION] += 1
        share = self._random.uniform(0.1, 0.5)
        groups = {node.index: 1 for node in simulation.nodes if self._random.random() < share}
        simulation.transport.partition(groups)
        simulation.gossip.changed()
        simulation.world.after(self._random.randint(*CUT_MS), self._heal)

    def _heal(self) -> None:
        self._simulation.transport.heal()
        self._simulation.gossip.healed()

    def _skew(self) -> None:
        self.fired[Fault.SKEW] += 1
        self._random.choice(self._simulation.nodes).skew_ms = self._random.randint(-MAX_SKEW_MS // 3, MAX_SKEW_MS // 3)

    def _wrong_clock(self) -> None:
        self.fired[Fault.WRONG_CLOCK] += 1
        node = self._random.choice(self._simulation.nodes)
        node.skew_ms = self._random.choice((-HOUR_MS, HOUR_MS))
        self._simulation.world.after(self._random.randint(*DOWN_MS), self._set_clock, node)

    def _set_clock(self, node: SimNode) -> None:
        node.skew_ms = 0

    def _executor(self) -> None:
        self.fired[Fault.EXECUTOR] += 1
        provider = self._random.choice(list(self._simulation.providers.values()))
        provider.fail_after = None if provider.fail_after is not None else self._random.randrange(32)

    def _slow(self) -> None:
        self.fired[Fault.SLOW] += 1
        provider = self._random.choice(list(self._simulation.providers.values()))
        provider.slowness = SLOWNESS if provider.slowness == 1 else 1

    def _cancel(self) -> None:
        busy = [node for node in self._simulation.nodes if node.index in self._simulation.consumers and node.drivers]
        if busy:
            self.fired[Fault.CANCEL] += 1
            next(iter(self._random.choice(busy).drivers)).tell(Cancel())

    def _leave(self) -> None:
        provider = self._random.choice(list(self._simulation.providers.values()))
        if provider.node.up and not provider.stopped:
            self.fired[Fault.LEAVE] += 1
            provider.stop()
            for driver in tuple(provider.running):
                driver.tell(Cancel())
            self._simulation.world.after(self._random.randint(*DOWN_MS), self._return, provider.node.index)

    def _return(self, index: int) -> None:
        provider = self._simulation.providers[index]
        if provider.node.up:
            provider.start()


_STRIKES: Final = {
    Fault.CRASH: Faults._crash,
    Fault.PARTITION: Faults._partition,
    Fault.SKEW: Faults._skew,
    Fault.WRONG_CLOCK: Faults._wrong_clock,
    Fault.EXECUTOR: Faults._executor,
    Fault.SLOW: Faults._slow,
    Fault.CANCEL: Faults._cancel,
    Fault.LEAVE: Faults._leave,
}
