"""Bugs planted into copies of the packages: the random worlds must find each of them, and nothing in the true ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.simulator.thorough import thorough

REPOSITORY = Path(__file__).parents[2]
PATCHES = sorted(Path(__file__).with_name("planted").glob("*.patch"))
HUNT = Path(__file__).with_name("hunt.py")
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


def hunt(package: Path, seeds: int) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(HUNT), "1", str(seeds), "1"]
    done = subprocess.run(command, env=environment, cwd=package.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["package"] == str(package)
    return found


def test_there_are_bugs_to_find() -> None:
    assert len(PATCHES) >= 10


@thorough
@pytest.mark.slow
@pytest.mark.simulation
@pytest.mark.timeout(600)
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_planted_bug_is_found(patch: Path, tmp_path: Path) -> None:
    package = copy_packages(tmp_path)
    # In no repository, or git would look for the files there.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    subprocess.run([GIT, "apply", str(patch)], cwd=package, env=environment, check=True)
    found = hunt(package, MOST_SEEDS)
    assert found["seed"] is not None, f"{patch.stem} is not found in {MOST_SEEDS} worlds"
    assert found["invariant"], found["why"]
    sys.stdout.write(f"{patch.stem}: world {found['seed']}: {found['why']}\n")


@thorough
@pytest.mark.slow
@pytest.mark.simulation
@pytest.mark.timeout(300)
def test_nothing_is_found_without_a_bug(tmp_path: Path) -> None:
    assert hunt(copy_packages(tmp_path), TRUE_SEEDS)["seed"] is None
