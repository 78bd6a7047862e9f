"""Runs random worlds and says what came of them: `hunt.py FIRST LAST STEP`. One line of JSON at the end."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import aci_p2p
from aci_p2p.testing.simulator import InvariantBroken, Simulation, random_scenario


def hunt(seeds: range) -> dict[str, object]:
    """Run the worlds of some seeds until an invariant breaks."""
    fired: Counter[str] = Counter()
    died_at: Counter[str] = Counter()
    strategies: Counter[str] = Counter()
    for seed in seeds:
        simulation = Simulation(random_scenario(seed))
        strategies.update(attacker.name for attacker in simulation.attackers)
        try:
            result = simulation.run()
        except InvariantBroken as broken:
            return {"seed": seed, "broken": str(broken), "package": str(Path(aci_p2p.__file__).parent)}
        fired.update(result.fired)
        died_at.update(result.died_at)
    return {"seed": None, "fired": fired, "died_at": died_at, "strategies": strategies,
            "package": str(Path(aci_p2p.__file__).parent)}  # fmt: skip


if __name__ == "__main__":
    first, last, step = map(int, sys.argv[1:])
    sys.stdout.write(json.dumps(hunt(range(first, last + 1, step))) + "\n")
