"""A market of thousands of nodes in one process, from one seed."""

from aci_p2p.testing.simulator.adversaries import STRATEGIES, UNBUILT, Attacker, UnbuiltAttack
from aci_p2p.testing.simulator.invariant import Invariant, InvariantBroken
from aci_p2p.testing.simulator.measuring import Measurement, measure, trial
from aci_p2p.testing.simulator.report import Summary, page, summarise
from aci_p2p.testing.simulator.roles import Outcome
from aci_p2p.testing.simulator.sampling import random_scenario
from aci_p2p.testing.simulator.scenario import Fault, PlannedJob, PlannedOutcome, Scenario
from aci_p2p.testing.simulator.scenario_file import BadScenario, dump_scenario, load_scenario
from aci_p2p.testing.simulator.simulation import Gain, Result, Simulation

__all__ = [
    "STRATEGIES",
    "UNBUILT",
    "Attacker",
    "BadScenario",
    "Fault",
    "Gain",
    "Invariant",
    "InvariantBroken",
    "Measurement",
    "Outcome",
    "PlannedJob",
    "PlannedOutcome",
    "Result",
    "Scenario",
    "Simulation",
    "Summary",
    "UnbuiltAttack",
    "dump_scenario",
    "load_scenario",
    "measure",
    "page",
    "random_scenario",
    "summarise",
    "trial",
]
