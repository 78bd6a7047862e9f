"""Running the real command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An ACI home of its own."""
    return tmp_path / "home"


@pytest.fixture
def cli(home: Path) -> Cli:
    """Runs `aci-p2p` with arguments, in `home`; output is text, nothing is raised."""

    def run(
        *arguments: str, stdin: str = "", timeout: float = 50, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from aci_p2p.cli import main; main()", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, "ACI_HOME": str(home), "NO_COLOR": "1", **(env or {})},
        )

    return run


def one_line(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The error line of a command that must have failed with `code`, saying so in one line and no more."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("aci-p2p: ")
    return lines[0]
