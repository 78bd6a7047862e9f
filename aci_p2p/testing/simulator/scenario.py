"""What is simulated: how many nodes, for how long, with which faults and attackers. A seed fixes the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from aci_p2p.network.model import NetworkModel
from aci_p2p.protocol.errors import LocalError

MAX_NODES: Final = 100_000
"""Nodes of one world; each takes some kilobytes."""
NODES_PER_MODEL: Final = 25
"""Nodes for each model of a world that does not say: some seven providers each, as of a common model."""


class Fault(StrEnum):
    """What can go wrong without anybody's ill will."""

    CRASH = "crash"
    """A node dies at any moment, and comes back with its disk."""
    CRASH_AT_WRITE = "crash at write"
    """A node dies just after a transition reached its disk and before anything was sent of it."""
    PARTITION = "partition"
    """The network falls into two parts for a while."""
    SKEW = "skew"
    """A clock is off, within what messages tolerate."""
    WRONG_CLOCK = "wrong clock"
    """A clock is off by an hour for a while."""
    LOSS = "loss"
    """Gossip is lost on its way."""
    DUPLICATION = "duplication"
    """Gossip arrives twice."""
    REORDERING = "reordering"
    """Gossip overtakes gossip."""
    EXECUTOR = "executor"
    """A provider's executor dies in the middle of answers."""
    SLOW = "slow"
    """A provider computes far slower than it promised."""
    CANCEL = "cancel"
    """A user gives a job up."""
    LEAVE = "leave"
    """A provider stops in good order, and hands its jobs back."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One world."""

    seed: int = 1
    """Fixes everything that is left to chance."""
    nodes: int = 100
    """Nodes, attackers included."""
    hours: float = 1.0
    """Simulated time in which jobs are offered."""
    adversaries: float = 0.0
    """Share of the nodes that cheat."""
    strategies: tuple[str, ...] = ()
    """Names of what the cheats do (`adversaries.STRATEGIES`); none: everything."""
    providers: float = 0.3
    """Share of the nodes that serve a model."""
    models: int = 0
    """Models, of which each provider serves one; 0: one for NODES_PER_MODEL nodes."""
    job_interval_s: float = 300.0
    """Mean time between two jobs of one consumer, seconds."""
    faults: frozenset[Fault] = frozenset()
    """What goes wrong."""
    network: NetworkModel = field(default_factory=NetworkModel)
    """Latency and bandwidth; LOSS, DUPLICATION and REORDERING add to it."""

    def __post_init__(self) -> None:
        """Raises LocalError for a world that cannot be."""
        if not 2 <= self.nodes <= MAX_NODES:
            msg = f"a world has 2 to {MAX_NODES} nodes, not {self.nodes}"
            raise LocalError(msg)
        if self.hours <= 0 or self.job_interval_s <= 0 or self.models < 0:
            msg = "hours and intervals are more than nothing, models not fewer"
            raise LocalError(msg)
        if not (0 <= self.adversaries < 1 and 0 < self.providers < 1):
            msg = "shares are between 0 and 1"
            raise LocalError(msg)
