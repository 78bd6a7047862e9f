"""What an attack brings and what it spoils, against the same world in which nobody cheats."""

from __future__ import annotations

from dataclasses import dataclass

from aci_p2p.testing.simulator.adversaries import STRATEGIES, Part
from aci_p2p.testing.simulator.roles import Outcome
from aci_p2p.testing.simulator.scenario import Scenario
from aci_p2p.testing.simulator.simulation import Simulation


@dataclass(frozen=True, slots=True)
class Measurement:
    """One world with its attackers, compared with the same one without."""

    nodes: int
    """Attackers."""
    unearned: int
    """What they were paid for answers that the true model does not give, and the worth of answers that they had without
    paying, base units."""
    income: int
    """What honest consumers paid them in all, base units."""
    honest_income: int
    """What those consumers paid the same nodes while these were honest, base units."""
    jobs: int
    """Jobs of the consumers that are honest in both worlds."""
    spoiled: int
    """How many more of them failed with the attackers there; below 0: fewer."""

    @property
    def profit(self) -> int:
        """What cheating brought more than honesty would have, base units; answers had for nothing included."""
        return max(self.unearned, self.income - self.honest_income)

    @property
    def harm(self) -> float:
        """Share of the honest jobs that were spoiled."""
        return self.spoiled / max(self.jobs, 1)


def trial(name: str) -> Scenario:
    """A small market, a fifth of which follows one strategy: the world in which attacks are compared."""
    providers = 0.5 if STRATEGIES[name].part is Part.PROVIDER else 0.3
    return Scenario(
        seed=6,
        nodes=24,
        hours=0.15,
        providers=providers,
        adversaries=0.2,
        strategies=(name,),
        models=1,
        job_interval_s=45,
        bid_window_ms=2_000,
    )


def measure(scenario: Scenario) -> Measurement:
    """Run a world with its attackers and without. Raises InvariantBroken."""
    attacked = Simulation(scenario)
    peaceful = Simulation(scenario, disarmed=True)
    attacked.run()
    peaceful.run()
    suspects = {node.index for node, _ in attacked.suspects}
    names = [node.node_id for node, _ in attacked.suspects]
    income = sum(attacked.judge.accounts.paid_to().get(name, 0) for name in names)
    # What attackers among the consumers would have paid does not count on either side.
    honest_income = sum(
        amount
        for outcome in peaceful.outcomes()
        for name, amount in peaceful.judge.accounts.promised_for(outcome.job_id).items()
        if name in names and outcome.consumer not in suspects
    )
    with_them, without_them = (_of_honest(world.outcomes(), suspects) for world in (attacked, peaceful))
    failures = [sum(bool(outcome.failure) for outcome in outcomes) for outcomes in (with_them, without_them)]
    return Measurement(
        nodes=len(suspects),
        unearned=sum(gain.unearned for gain in attacked.gains()),
        income=income,
        honest_income=honest_income,
        jobs=len(without_them),
        spoiled=failures[0] - failures[1],
    )


def _of_honest(outcomes: list[Outcome], suspects: set[int]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.consumer not in suspects]
