"""What is simulated: how many nodes, for how long, with which faults and attackers. A seed fixes the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Self

from aci_p2p.network.model import NetworkModel
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.market import MAX_BID_WINDOW_MS
from aci_p2p.protocol.messages import MAX_TOKENS
from aci_p2p.protocol.publications import MAX_SLOTS

MIN_NODES: Final = 2
"""One that asks and one that answers."""
MAX_NODES: Final = 100_000
"""Nodes of one world; each takes some kilobytes."""
NODES_PER_MODEL: Final = 25
"""Nodes for each model of a world that does not say: some seven providers each, as of a common model."""
MAX_HOURS: Final = 24 * 366
"""Longest simulated time: a year."""
HOUR_S: Final = 3_600
"""Seconds."""
MAX_PROMPT: Final = 1_024
"""Characters of a planned prompt: toy models read one token a byte, and have 4,096."""
MAX_PRICE: Final = 10**12
"""What consumers pay at most where nothing else is said, base units: more than any honest provider asks."""
MAX_LATENCY_MS: Final = 600_000
"""Longest promise that consumers take: more than any provider of these worlds makes, however slow it has become."""


class Fault(StrEnum):
    """What can go wrong without anybody's ill will."""

    CRASH = "crash"
    """A node dies at any moment, and comes back with its disk."""
    CRASH_AT_WRITE = "crash at write"
    """A node dies when a transition was about to reach its disk, or just has, and before anything was sent of it."""
    DISK_FULL = "disk full"
    """A disk takes nothing more for a while."""
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
class PlannedJob:
    """One job that is offered at a fixed time, in place of random ones."""

    consumer: int
    """Which of the consumers asks; the first is 0."""
    at_s: float
    """Seconds after the beginning."""
    prompt: str
    """What it asks."""
    max_tokens: int = 64
    """Most output tokens."""
    max_price: int = MAX_PRICE
    """Most to pay for the whole job, base units."""
    model: int = 0
    """Which model it asks; the first is 0, and nobody serves those behind the scenario's last."""

    def __post_init__(self) -> None:
        """Raises LocalError for a job that cannot be."""
        if self.consumer < 0 or self.at_s < 0 or not 1 <= self.max_tokens <= MAX_TOKENS:
            msg = "a planned job has a consumer, a time and a number of tokens, none below zero"
            raise LocalError(msg)
        if self.max_price < 0 or self.model < 0:
            msg = "a planned job has a price and a model, none below zero"
            raise LocalError(msg)
        if not (self.prompt.strip() and len(self.prompt) <= MAX_PROMPT):
            msg = f"a planned prompt has 1 to {MAX_PROMPT} characters, and not only blanks"
            raise LocalError(msg)


@dataclass(frozen=True, slots=True)
class PlannedOutcome:
    """What came of a planned job: the same in the simulator and among real nodes. Times are no part of it."""

    provider: int | None
    """Which of the providers answered; the first is 0. None: nobody did."""
    text: str
    """Its answer; empty without one."""
    tokens: int
    """Output tokens that it has."""
    price: int
    """What it cost, base units."""
    error: str
    """Code of the error that ended the job; empty: it was answered."""

    @classmethod
    def failed(cls, error: str) -> Self:
        """A job that ended with the code of an error."""
        return cls(provider=None, text="", tokens=0, price=0, error=error)


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
    slots: int = 4
    """Jobs that a provider runs at once."""
    job_interval_s: float = 300.0
    """Mean time between two jobs of one consumer, seconds."""
    bid_window_ms: int = 1_000
    """How long consumers wait for bids, milliseconds."""
    prices: tuple[int, ...] = ()
    """Base units that the providers ask for an output token, in their order; none, or too few: drawn by lot."""
    asks: bool = True
    """Whether providers publish standing asks, and consumers ask the best for quotes; else every job is broadcast."""
    jobs: tuple[PlannedJob, ...] = ()
    """Jobs at fixed times, in place of random ones and of the probe at the end; none: random ones."""
    faults: frozenset[Fault] = frozenset()
    """What goes wrong."""
    network: NetworkModel = field(default_factory=NetworkModel)
    """Latency and bandwidth; LOSS, DUPLICATION and REORDERING add to it."""

    def __post_init__(self) -> None:
        """Raises LocalError for a world that cannot be."""
        if not MIN_NODES <= self.nodes <= MAX_NODES:
            msg = f"a world has {MIN_NODES} to {MAX_NODES} nodes, not {self.nodes}"
            raise LocalError(msg)
        if not (0 < self.hours <= MAX_HOURS and self.job_interval_s > 0 and self.models >= 0):
            msg = f"a world lasts up to {MAX_HOURS} hours, and intervals are more than nothing, models not fewer"
            raise LocalError(msg)
        if not (0 <= self.adversaries < 1 and 0 < self.providers < 1):
            msg = "shares are between 0 and 1"
            raise LocalError(msg)
        if not (1 <= self.slots <= MAX_SLOTS and 1 <= self.bid_window_ms <= MAX_BID_WINDOW_MS):
            msg = f"slots are 1 to {MAX_SLOTS}, and bids are awaited for 1 to {MAX_BID_WINDOW_MS} ms"
            raise LocalError(msg)
        if any(price <= 0 for price in self.prices):
            msg = "prices are more than nothing"
            raise LocalError(msg)
        if any(job.consumer >= self.nodes - self.provider_count for job in self.jobs):
            msg = f"planned jobs are of the {self.nodes - self.provider_count} consumers, the first of which is 0"
            raise LocalError(msg)
        if any(job.at_s > self.hours * HOUR_S for job in self.jobs):
            msg = f"planned jobs are asked within the {self.hours:g} hours of the scenario"
            raise LocalError(msg)

    @property
    def provider_count(self) -> int:
        """How many nodes serve a model; the others consume."""
        return min(max(1, round(self.providers * self.nodes)), self.nodes - 1)

    @property
    def model_count(self) -> int:
        """How many models are served; each by one provider at least."""
        return min(self.models or max(1, self.nodes // NODES_PER_MODEL), self.provider_count)
