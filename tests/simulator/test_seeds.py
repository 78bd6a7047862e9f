"""Hundreds of random worlds with faults and a fifth of attackers: nothing breaks, and each fault strikes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from aci_p2p.protocol.errors import LocalError
from aci_p2p.testing.simulator import (
    STRATEGIES,
    Fault,
    Simulation,
    dump_scenario,
    load_scenario,
    random_scenario,
)
from aci_p2p.testing.simulator.sampling import FLOODED, FLOODS, HOURS
from tests.simulator.conftest import PROCESSES, Tell

SAMPLE = 16
"""Random worlds of `make test`."""
SEEDS = int(os.environ.get("ACI_SIMULATION_SEEDS") or SAMPLE)
"""Random worlds of `make test-simulation`, which sets it."""
HUNT = Path(__file__).with_name("hunt.py")
KEPT = Path(__file__).parents[1] / "seeds"
ENOUGH_FOR_COVERAGE = 200
"""Worlds after which each fault and each strategy must have had its turn."""

WRITES = {
    "consumer offered", "consumer awarded", "consumer streaming", "consumer committed",
    "consumer pending", "consumer expired", "consumer rejected", "consumer cancelled", "consumer provider_fault",
    "consumer settled", "provider accepted", "provider streaming", "provider unpaid", "provider committed",
    "provider revealed", "provider pending", "provider cancelled", "provider provider_fault", "provider consumer_fault",
}  # fmt: skip
"""Every transaction that a job makes, by its last transition: those in between are never alone on a disk; and what is
stored when a provider has answered that it holds what it is owed."""


def start(first: int, last: int, step: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(HUNT), str(first), str(last), str(step)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def keep(seed: int) -> Path:
    path = KEPT / f"random-{seed}.json"
    path.write_text(dump_scenario(random_scenario(seed)))
    return path


def add(found: list[dict[str, Any]], name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in found:
        total.update(one[name])
    return total


def run_worlds(seeds: int) -> list[dict[str, Any]]:
    """Run the worlds of so many seeds, which must not break anything."""
    hunts = [start(first, seeds, PROCESSES) for first in range(1, PROCESSES + 1)]
    found: list[dict[str, Any]] = []
    for hunt in hunts:
        output, _ = hunt.communicate()
        assert hunt.returncode == 0
        found.append(json.loads(output))
    for one in found:
        if one["seed"] is not None:
            path = keep(one["seed"])
            pytest.fail(f"{one['why']}\nsee it again: aci-p2p simulate --random {one['seed']}\nkept as {path}")
    return found


@pytest.mark.slow
def test_a_sample_of_random_worlds() -> None:
    assert add(run_worlds(SAMPLE), "fired")


@pytest.mark.slow
@pytest.mark.simulation
@pytest.mark.timeout(1800)
def test_random_worlds(tell: Tell) -> None:
    began = time.monotonic()
    found = run_worlds(SEEDS)
    fired, died_at, strategies = (add(found, name) for name in ("fired", "died_at", "strategies"))
    cpu_s = sum(one["cpu_s"] for one in found)
    tell(f"{SEEDS} random worlds in {time.monotonic() - began:.0f} s, {cpu_s:.0f} s of processor time; nothing broke")
    for title, counts in (("faults", fired), ("deaths while writing", died_at), ("attackers", strategies)):
        tell(f"{title}: {', '.join(f'{name} {count}' for name, count in sorted(counts.items()))}")
    assert set(died_at) <= WRITES
    if SEEDS >= ENOUGH_FOR_COVERAGE:
        assert set(fired) == {fault.value for fault in Fault}
        assert set(died_at) == WRITES
        assert set(strategies) == set(STRATEGIES)


@pytest.mark.parametrize("path", sorted(KEPT.glob("*.json")), ids=lambda path: path.stem)
def test_worlds_that_failed_once(path: Path) -> None:
    Simulation(load_scenario(path)).run()


def test_floods_are_short() -> None:
    longest = {True: 0.0, False: 0.0}
    for seed in range(1, 200):
        scenario = random_scenario(seed)
        floods = not FLOODS.isdisjoint(scenario.strategies)
        longest[floods] = max(longest[floods], scenario.hours)
    assert set(STRATEGIES) >= FLOODS
    assert 0 < longest[True] <= HOURS[1] * FLOODED < HOURS[0] < longest[False] <= HOURS[1]


def test_a_kept_world_is_the_same_world(tmp_path: Path) -> None:
    path = tmp_path / "world.json"
    for seed in range(1, 50):
        scenario = random_scenario(seed)
        path.write_text(dump_scenario(scenario))
        assert load_scenario(path) == scenario


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.json", "{", "Expecting"),
        ("a.toml", "nodes = ", "Invalid value"),
        ("a.toml", "nods = 3", "nothing about nods"),
        ("a.toml", "nodes = true", "nodes is a int"),
        ("a.toml", "nodes = 1", "2 to"),
        ("a.toml", "nodes = [3]", "not supported"),
        ("a.toml", "hours = nan", "hours"),
        ("a.toml", 'faults = ["flood"]', "flood"),
        ("a.toml", 'faults = "crash"', "no list"),
        ("a.toml", "jobs = [1]", "no table"),
        ("a.toml", 'jobs = [{consumer = 200, at_s = 0, prompt = "x"}]', "first of which is 0"),
        ("a.toml", "network = 3", "no table"),
        ("a.toml", "[network]\nloss = 2", "probabilities"),
        ("a.toml", 'strategies = ["magic"]', "no strategy is called magic"),
        ("a.json", "[]", "no table"),
    ],
)
def test_files_that_are_no_scenario(tmp_path: Path, name: str, text: str, problem: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(LocalError, match=problem):
        load_scenario(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="No such file"):
        load_scenario(tmp_path / "none.toml")
