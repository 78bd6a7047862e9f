"""Bugs planted into copies of the packages: the random worlds must find each of them, and nothing in the true ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.simulator.conftest import PROCESSES, Tell, selected

REPOSITORY = Path(__file__).parents[2]
PATCHES = sorted(Path(__file__).with_name("planted").glob("*.patch"))
HUNT = Path(__file__).with_name("hunt.py")
EARLY = Path(__file__).with_name("planted") / "accept-before-storing.patch"
"""A bug that the first world finds."""
MOST_SEEDS = 200
TRUE_SEEDS = 6
"""Worlds in which the true packages are tried here; `test_seeds` tries hundreds."""
GIT = shutil.which("git") or "git"
ROOMS = ("protocol", "gossip", "dht", "executor")


def copy_packages(folder: Path) -> Path:
    """A copy as it would be installed: the rooms within the package."""
    package = folder / "aci_p2p"
    ignored = shutil.ignore_patterns("__pycache__", *ROOMS)
    shutil.copytree(REPOSITORY / "aci_p2p", package, ignore=ignored)
    for room in ROOMS:
        shutil.copytree(REPOSITORY / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def hunt_planted(patch: Path, folder: Path) -> dict[str, Any]:
    """Look for a bug in a copy of the packages."""
    return hunt(plant(patch, folder), MOST_SEEDS)


def hunt(package: Path, seeds: int) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(HUNT), "1", str(seeds), "1"]
    done = subprocess.run(command, env=environment, cwd=package.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["package"] == str(package)
    return found


def plant(patch: Path, folder: Path) -> Path:
    """A copy of the packages with a bug."""
    package = copy_packages(folder)
    # In no repository, or git would look for the files there.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run([GIT, "apply", str(patch)], cwd=package, env=environment, check=True)
    return package


def simulate(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `aci-p2p simulate` of a copy, in the folder that holds it."""
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", "from aci_p2p.cli import main; main()", "simulate", *arguments]
    return subprocess.run(command, env=environment, cwd=package.parent, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def hunts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Generator[dict[Path, Future[dict[str, Any]]]]:
    """The hunts for all bugs that are asked for, as many at once as there are processes."""
    folder = tmp_path_factory.mktemp("planted")
    with ThreadPoolExecutor(PROCESSES) as pool:
        yield {patch: pool.submit(hunt_planted, patch, folder / patch.stem) for patch in selected(request, "patch")}
        pool.shutdown(cancel_futures=True)


def test_there_are_bugs_to_find() -> None:
    assert len(PATCHES) >= 10


def test_every_bug_can_be_planted(tmp_path: Path) -> None:
    package = copy_packages(tmp_path)
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    for patch in PATCHES:
        subprocess.run([GIT, "apply", "--check", str(patch)], cwd=package, env=environment, check=True)


@pytest.mark.slow
@pytest.mark.simulation
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_planted_bug_is_found(patch: Path, hunts: dict[Path, Future[dict[str, Any]]], tell: Tell) -> None:
    found = hunts[patch].result()
    assert found["seed"] is not None, f"{patch.stem} is not found in {MOST_SEEDS} worlds"
    assert found["invariant"], found["why"]
    tell(f"planted bug {patch.stem}: found in world {found['seed']}: {found['why']}")


@pytest.mark.slow
def test_a_world_that_fails_is_kept_and_fails_again(tmp_path: Path) -> None:
    package = plant(EARLY, tmp_path)
    seeds = tmp_path / "tests" / "seeds"
    seeds.mkdir(parents=True)
    failed = simulate(package, "--random", "1")
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert "stored before it is said" in line
    assert line.endswith("see it again with: aci-p2p simulate --random 1 (kept as tests/seeds/random-1.json)")
    again, kept = simulate(package, "--random", "1"), simulate(package, "--scenario", "tests/seeds/random-1.json")
    assert again.stderr == failed.stderr
    assert kept.returncode == 1
    assert kept.stderr.split(";")[0] == line.split(";")[0]
    # Without the bug it passes.
    repaired = simulate(REPOSITORY / "aci_p2p", "--scenario", str(seeds / "random-1.json"))
    assert repaired.returncode == 0, repaired.stderr
    assert repaired.stdout.splitlines()[-1].startswith("trace ")


@pytest.mark.slow
@pytest.mark.simulation
@pytest.mark.timeout(300)
def test_nothing_is_found_without_a_bug(tmp_path: Path) -> None:
    assert hunt(copy_packages(tmp_path), TRUE_SEEDS)["seed"] is None
