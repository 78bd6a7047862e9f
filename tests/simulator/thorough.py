"""How thoroughly the simulator is run: `make test` takes a sample, `make test-simulation` everything."""

from __future__ import annotations

import os
from typing import Final

import pytest

SAMPLE: Final = 40
"""Random worlds of a quick run."""
SEEDS: Final = int(os.environ.get("ACI_SIMULATION_SEEDS") or SAMPLE)
"""Random worlds of this run."""

thorough = pytest.mark.skipif(
    "ACI_SIMULATION_SEEDS" not in os.environ, reason="takes minutes: make test-simulation sets ACI_SIMULATION_SEEDS"
)
