"""Who serves what, for how much and how fast, in a scenario: the same in the simulator and among real nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aci_p2p.testing.simulator.scenario import Scenario
from aci_p2p.testing.simulator.world import Dice
from aci_p2p.testing.toy_model import ToyModel

PACE_MS: Final = (1, 40)
"""Milliseconds for each token, fastest and slowest provider."""
PRICE: Final = (1_000, 4_000)
"""Base units for each token, cheapest and dearest provider; only differences matter."""
INPUT_SHARE: Final = 4
"""A token of the prompt costs this part of one of the answer."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What one provider serves."""

    model: int
    """Which of the scenario's models."""
    price: int
    """Base units for each output token."""
    pace_ms: int
    """Milliseconds for each output token."""


def cast(scenario: Scenario) -> list[Serving]:
    """What each provider of a scenario serves, in their order."""
    random = Dice(scenario.seed)["roles"]
    servings: list[Serving] = []
    for number in range(scenario.provider_count):
        drawn, pace_ms = random.randint(*PRICE), random.randint(*PACE_MS)
        price = scenario.prices[number] if number < len(scenario.prices) else drawn
        servings.append(Serving(number % scenario.model_count, price, pace_ms))
    return servings


def toy_model(number: int) -> ToyModel:
    """The n-th model of every scenario, served or not; the first is 0."""
    return ToyModel(f"toy-{number}" if number else "toy")
