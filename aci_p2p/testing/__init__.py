"""Test benches for programs that use ACI: a swarm of real nodes in one process, and a simulator of thousands.

Importing this package is cheap: its parts are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aci_p2p.network.model import LAN, ROUGH, WIDE_AREA, Nat, NetworkModel, Place
    from aci_p2p.testing.rehearsal import open_scenario, run_scenario
    from aci_p2p.testing.running import run
    from aci_p2p.testing.simulator.invariant import InvariantBroken
    from aci_p2p.testing.simulator.scenario import PlannedJob, PlannedOutcome, Scenario
    from aci_p2p.testing.simulator.scenario_file import load_scenario
    from aci_p2p.testing.swarm import Swarm, open_swarm
    from aci_p2p.testing.swarm_node import NodeDown, SwarmNode
    from aci_p2p.testing.toy_model import ToyExecutor, ToyModel

_HOMES = {
    "aci_p2p.network.model": ("LAN", "ROUGH", "WIDE_AREA", "Nat", "NetworkModel", "Place"),
    "aci_p2p.testing.rehearsal": ("open_scenario", "run_scenario"),
    "aci_p2p.testing.running": ("run",),
    "aci_p2p.testing.simulator.invariant": ("InvariantBroken",),
    "aci_p2p.testing.simulator.scenario": ("PlannedJob", "PlannedOutcome", "Scenario"),
    "aci_p2p.testing.simulator.scenario_file": ("load_scenario",),
    "aci_p2p.testing.swarm": ("Swarm", "open_swarm"),
    "aci_p2p.testing.swarm_node": ("NodeDown", "SwarmNode"),
    "aci_p2p.testing.toy_model": ("ToyExecutor", "ToyModel"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LAN",
    "ROUGH",
    "WIDE_AREA",
    "InvariantBroken",
    "Nat",
    "NetworkModel",
    "NodeDown",
    "Place",
    "PlannedJob",
    "PlannedOutcome",
    "Scenario",
    "Swarm",
    "SwarmNode",
    "ToyExecutor",
    "ToyModel",
    "load_scenario",
    "open_scenario",
    "open_swarm",
    "run",
    "run_scenario",
]


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return __all__
