"""A market of thousands of nodes in one process, from one seed."""

from aci_p2p.testing.simulator.adversaries import STRATEGIES, Attacker
from aci_p2p.testing.simulator.invariants import InvariantBroken
from aci_p2p.testing.simulator.report import Summary, page, summarise
from aci_p2p.testing.simulator.roles import Outcome
from aci_p2p.testing.simulator.scenario import Fault, Scenario
from aci_p2p.testing.simulator.simulation import Gain, Result, Simulation

__all__ = [
    "STRATEGIES",
    "Attacker",
    "Fault",
    "Gain",
    "InvariantBroken",
    "Outcome",
    "Result",
    "Scenario",
    "Simulation",
    "Summary",
    "page",
    "summarise",
]
