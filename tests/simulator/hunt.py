"""Runs random worlds and says what came of them: `hunt.py FIRST LAST STEP`. One line of JSON at the end."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

import aci_p2p
from aci_p2p.testing.simulator import InvariantBroken, Simulation, random_scenario


def hunt(seeds: range) -> dict[str, object]:
    """Run the worlds of some seeds until an invariant breaks, or a world itself does."""
    fired: Counter[str] = Counter()
    died_at: Counter[str] = Counter()
    strategies: Counter[str] = Counter()
    package = str(Path(aci_p2p.__file__).parent)
    for seed in seeds:
        try:
            simulation = Simulation(random_scenario(seed))
            strategies.update(attacker.name for attacker in simulation.attackers)
            result = simulation.run()
        except InvariantBroken as broken:
            return {"package": package, "seed": seed, "invariant": broken.invariant, "why": str(broken)}
        except Exception as error:  # noqa: BLE001 - its seed is what matters
            return {"package": package, "seed": seed, "invariant": None, "why": repr(error)}
        fired.update(result.fired)
        died_at.update(result.died_at)
    return {
        "package": package,
        "seed": None,
        "cpu_s": time.process_time(),
        "fired": fired,
        "died_at": died_at,
        "strategies": strategies,
    }


if __name__ == "__main__":
    first, last, step = map(int, sys.argv[1:])
    sys.stdout.write(json.dumps(hunt(range(first, last + 1, step))) + "\n")
