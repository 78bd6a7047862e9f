"""What goes wrong in a simulated world, and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from aci_p2p.protocol.envelope import MAX_SKEW_MS
from aci_p2p.protocol.job import Cancel
from aci_p2p.testing.simulator.node import SimNode, WriteFate
from aci_p2p.testing.simulator.scenario import Fault

if TYPE_CHECKING:
    from aci_p2p.testing.simulator.serving import Provider
    from aci_p2p.testing.simulator.simulation import Simulation

STRIKES: Final = 12
"""How often each enabled fault strikes in one run, about."""
DOWN_MS: Final = (1_000, 60_000)
"""How long a node that died stays away, shortest and longest, milliseconds."""
CUT_MS: Final = (5_000, 60_000)
"""How long a partition lasts, milliseconds."""
CUT_SHARE: Final = (0.1, 0.5)
"""Share of the nodes on the smaller side of a partition, least and most."""
FULL_MS: Final = (5_000, 60_000)
"""How long a disk stays full, milliseconds."""
WRITE_CRASH: Final = 0.05
"""Share of the transactions at which the node dies, while CRASH_AT_WRITE is enabled."""
SLOWNESS: Final = 200
"""How many times slower a provider becomes."""
MAX_TOKENS_TO_FAIL: Final = 32
"""An executor dies before it has made so many tokens."""
SKEW_SHARE: Final = 3
"""Clocks are off by up to this part of what messages tolerate: two nodes may be off in opposite directions."""
HOUR_MS: Final = 3_600_000
"""How far a wrong clock is off, milliseconds."""


class Faults:
    """Strikes at random until `end`."""

    def __init__(self, simulation: Simulation) -> None:
        """Nothing goes wrong before `begin`."""
        self.fired: Counter[Fault] = Counter()
        """How often each fault struck."""
        self.died_at: Counter[str] = Counter()
        """Transactions at which nodes died while they wrote: role, and the last state."""
        self._simulation = simulation
        self._enabled = simulation.scenario.faults
        self._random = simulation.world.dice["faults"]
        self._over = False
        self._cut_off: dict[int, SimNode] = {}
        self._strikes: dict[Fault, Callable[[], bool]] = {
            Fault.CRASH: self._crash,
            Fault.DISK_FULL: self._fill_disk,
            Fault.PARTITION: self._partition,
            Fault.SKEW: self._skew,
            Fault.WRONG_CLOCK: self._wrong_clock,
            Fault.EXECUTOR: self._break_executor,
            Fault.SLOW: self._slow_down,
            Fault.CANCEL: self._cancel,
            Fault.LEAVE: self._leave,
        }

    def begin(self) -> None:
        """Plan when each fault strikes."""
        world = self._simulation.world
        span = self._simulation.ends_at - world.now
        for fault in self._strikes:
            if fault in self._enabled:
                for _ in range(STRIKES):
                    world.after(self._random.randrange(span), self._strike, fault)

    def _strike(self, fault: Fault) -> None:
        if not self._over and self._strikes[fault]():
            self.fired[fault] += 1

    def end(self) -> None:
        """Nothing goes wrong any more; what is broken is mended."""
        self._over = True
        simulation = self._simulation
        self.fired.update(simulation.gossip.disturbed)
        simulation.transport.model = replace(simulation.scenario.network, loss=0.0, duplication=0.0, reordering=0.0)
        simulation.transport.heal()
        simulation.gossip.healed()
        for node in simulation.nodes:
            node.skew_ms = 0
            node.disk.is_full = False
        for node in self._cut_off.values():
            # What a full disk cut off stays open in the database until the next start, as on a real node.
            simulation.crash(node)
        for node in simulation.nodes:
            simulation.restart(node)
        for provider in simulation.providers.values():
            provider.fail_after = None
            provider.slowness = 1
            if provider.stopped:
                provider.start()

    # Writing.

    def fate(self, node: SimNode, what: str) -> WriteFate:
        """What becomes of a transaction."""
        if node.disk.is_full:
            self.fired[Fault.DISK_FULL] += 1
            self._cut_off[node.index] = node
            return WriteFate.REFUSED
        if Fault.CRASH_AT_WRITE in self._enabled and not self._over and self._random.random() < WRITE_CRASH:
            self.fired[Fault.CRASH_AT_WRITE] += 1
            self.died_at[what] += 1
            return self._random.choice((WriteFate.LOST, WriteFate.LAST))
        return WriteFate.STORED

    def down(self, node: SimNode) -> None:
        """A node dies, and comes back after a while."""
        self._simulation.crash(node)
        self._later(DOWN_MS, lambda: self._simulation.restart(node))

    def _later(self, span_ms: tuple[int, int], act: Callable[[], None]) -> None:
        self._simulation.world.after(self._random.randint(*span_ms), act)

    # What strikes at random; each says whether it did.

    def _crash(self) -> bool:
        node = self._random.choice(self._simulation.nodes)
        if not node.up:
            return False
        self.down(node)
        return True

    def _fill_disk(self) -> bool:
        # Counted when it refuses something.
        disk = self._random.choice(self._simulation.nodes).disk
        disk.is_full = True

        def make_room() -> None:
            disk.is_full = False

        self._later(FULL_MS, make_room)
        return False

    def _partition(self) -> bool:
        simulation = self._simulation
        share = self._random.uniform(*CUT_SHARE)
        groups = {node.index: 1 for node in simulation.nodes if self._random.random() < share}
        simulation.transport.partition(groups)
        simulation.gossip.changed()
        self._later(CUT_MS, self._heal)
        return bool(groups)

    def _heal(self) -> None:
        self._simulation.transport.heal()
        self._simulation.gossip.healed()

    def _skew(self) -> bool:
        most = MAX_SKEW_MS // SKEW_SHARE
        self._random.choice(self._simulation.nodes).skew_ms = self._random.randint(-most, most)
        return True

    def _wrong_clock(self) -> bool:
        node = self._random.choice(self._simulation.nodes)
        node.skew_ms = self._random.choice((-HOUR_MS, HOUR_MS))

        def set_clock() -> None:
            node.skew_ms = 0

        self._later(DOWN_MS, set_clock)
        return True

    def _provider(self) -> Provider | None:
        providers = list(self._simulation.providers.values())
        return self._random.choice(providers) if providers else None

    def _break_executor(self) -> bool:
        provider = self._provider()
        if provider is None:
            return False
        is_broken = provider.fail_after is not None
        provider.fail_after = None if is_broken else self._random.randrange(MAX_TOKENS_TO_FAIL)
        return not is_broken

    def _slow_down(self) -> bool:
        provider = self._provider()
        if provider is None:
            return False
        provider.slowness = SLOWNESS if provider.slowness == 1 else 1
        return provider.slowness > 1

    def _cancel(self) -> bool:
        busy = [consumer.node for consumer in self._simulation.consumers.values() if consumer.node.drivers]
        if not busy:
            return False
        next(iter(self._random.choice(busy).drivers)).tell(Cancel())
        return True

    def _leave(self) -> bool:
        provider = self._provider()
        if provider is None:
            return False
        if not provider.node.up or provider.stopped:
            return False
        provider.stop()
        for driver in tuple(provider.running):
            driver.tell(Cancel())
        self._later(DOWN_MS, lambda: self._return(provider.node.index))
        return True

    def _return(self, index: int) -> None:
        provider = self._simulation.providers[index]
        if provider.node.up and provider.stopped:
            provider.start()
