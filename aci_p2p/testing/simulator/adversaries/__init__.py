"""Attackers of the simulated market, by name."""

from aci_p2p.testing.simulator.adversaries.base import Attacker, Part
from aci_p2p.testing.simulator.adversaries.strategies import STRATEGIES
from aci_p2p.testing.simulator.adversaries.unbuilt import UNBUILT, UnbuiltAttack

__all__ = ["STRATEGIES", "UNBUILT", "Attacker", "Part", "UnbuiltAttack"]
