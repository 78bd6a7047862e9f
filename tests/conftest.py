"""What every test shares: reproducible Hypothesis runs, a home of its own, and the gate before the default model."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.network.namespaces import Laboratory, open_laboratory, why_unavailable

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL_HOME = REPOSITORY / ".aci"
"""Where `make model` puts the default model."""

# The processes that tests start find compiled what others ran before, as on users' machines: a third of their start.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

settings.register_profile("default", derandomize=True, deadline=None)
settings.register_profile("deep", max_examples=10_000, deadline=None)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def aci_home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`ACI_HOME`: an empty folder, or where the default model is for tests marked `model`."""
    needs_model = request.node.get_closest_marker("model") is not None
    home = MODEL_HOME if needs_model else tmp_path / "aci-home"
    if needs_model and not (home / "models").is_dir():
        if os.environ.get("ACI_REQUIRE_MODEL"):
            pytest.fail("the default model is missing: make model")
        pytest.skip("the default model is missing: make model")
    monkeypatch.setenv("ACI_HOME", str(home))
    return home


@pytest.fixture
def laboratory() -> Generator[Laboratory]:
    """Network namespaces for tests marked `netns`."""
    if (reason := why_unavailable()) is not None:
        if os.environ.get("ACI_REQUIRE_NETNS"):
            pytest.fail(f"no network namespaces: {reason}")
        pytest.skip(f"no network namespaces: {reason}")
    with open_laboratory() as laboratory:
        yield laboratory
