"""Random worlds, one for each seed: swarm testing.

Each world has a random subset of the faults and of the strategies, so that those that hide each other also meet alone.

Source: Groce et al., "Swarm Testing" (2012).
"""

from __future__ import annotations

from random import Random
from typing import Final

from aci_p2p.network.model import LAN, ROUGH, WIDE_AREA
from aci_p2p.testing.simulator.adversaries import STRATEGIES
from aci_p2p.testing.simulator.scenario import Fault, Scenario

NODES: Final = (6, 24)
"""Fewest and most nodes of a random world."""
HOURS: Final = (0.03, 0.08)
"""Shortest and longest time in which jobs are offered."""
FLOODS: Final = frozenset({"offer spam", "quote spam", "bid spam", "sybil bids"})
"""Strategies whose worlds take several times as long to run as others."""
FLOODED: Final = 0.3
"""Part of its time that a world with a flood has, so that floods do not take half the time of all worlds."""
INTERVAL_S: Final = (30, 120)
"""Least and greatest mean time between two jobs of one consumer, seconds."""
MAX_SLOTS: Final = 3
"""Most jobs that a provider of a random world runs at once: few, so that they run out."""
WINDOWS_MS: Final = (300, 1_000, 4_000)
"""How long consumers wait for bids, milliseconds."""
ADVERSARIES: Final = 0.2
"""Share of the nodes that cheat."""
MOST_STRATEGIES: Final = 4
"""Strategies in one world, at most."""


def random_scenario(seed: int) -> Scenario:
    """The world of a seed."""
    random = Random(f"scenario/{seed}")  # noqa: S311 - worlds, not secrets
    strategies = list(STRATEGIES)
    # Each has its turn, however few worlds there are.
    turn = strategies.pop(seed % len(strategies))
    nodes, hours = random.randint(*NODES), random.uniform(*HOURS)
    chosen = (turn, *random.sample(strategies, random.randrange(MOST_STRATEGIES)))
    return Scenario(
        seed=seed,
        nodes=nodes,
        hours=round(hours if FLOODS.isdisjoint(chosen) else hours * FLOODED, 3),
        adversaries=ADVERSARIES,
        strategies=tuple(sorted(chosen)),
        providers=random.choice((0.3, 0.5)),
        models=random.choice((1, 1, 2)),
        slots=random.randint(1, MAX_SLOTS),
        job_interval_s=random.randint(*INTERVAL_S),
        bid_window_ms=random.choice(WINDOWS_MS),
        faults=frozenset(fault for fault in Fault if random.random() < random.choice((0.2, 0.8))),
        network=random.choice((LAN, WIDE_AREA, ROUGH)),
        asks=random.choice((True, False)),
    )
