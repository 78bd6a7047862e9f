"""The README's example of a test is run as it stands there, in a project of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aci_p2p.testing import open_swarm, run

README = Path(__file__).resolve().parents[2] / "README.md"
MAX_LINES = 10
MAX_CPU_S = 3.0
"""Processor seconds for the example, opening the swarm included: three times what it takes without coverage."""


def example() -> str:
    """The example's source."""
    (source,) = re.findall(
        r"```python\n(import trio\nfrom aci_p2p import ACI\n\n.*?)```", README.read_text(), re.DOTALL
    )
    assert len([line for line in source.splitlines() if line.strip()]) <= MAX_LINES
    return str(source)


def test_example_passes_and_a_day_takes_a_moment() -> None:
    names: dict[str, Any] = {}
    exec(compile(example(), "README.md", "exec"), names)  # noqa: S102 - it is ours
    began = time.process_time()
    run(partial(names["test_ask_twice"], open_swarm))
    assert time.process_time() - began < MAX_CPU_S


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a project with the plugin, whether that is installed or not."""
    command = [sys.executable, "-W", "error", "-m", "pytest", "-p", "no:aci-p2p", "-p", "aci_p2p.testing.plugin"]
    environment = {"PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments], cwd=folder, check=False, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip


@pytest.mark.slow
def test_example_passes_in_a_project_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "test_example.py").write_text(example())
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    done = pytest_in(tmp_path)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_marked_test_gets_a_swarm(tmp_path: Path) -> None:
    source = """
import pytest

@pytest.mark.trio
async def test_swarm(swarm):
    await swarm.advance(hours=1)
    assert len(swarm.providers) == 3
    with pytest.raises(Exception, match="is down"):
        await swarm.crash(swarm.consumers[0])
        await swarm.consumers[0].ask("Are you there?")
"""
    (tmp_path / "test_marked.py").write_text(source)
    done = pytest_in(tmp_path)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_plugin_costs_nothing_where_it_is_not_used() -> None:
    source = """
import contextlib, typing, importlib, pytest, sys
before = set(sys.modules)
import aci_p2p.testing.plugin
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", source], check=True, capture_output=True, text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.stdout.split() == ["aci_p2p", "aci_p2p.testing", "aci_p2p.testing.plugin"]
