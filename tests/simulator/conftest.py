"""What thorough runs found out is printed at their end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest

PROCESSES: Final = 2
"""What takes minutes is done in so many processes at once: cores of the smallest machine that it is for."""
Tell = Callable[[str], None]

_LINES = pytest.StashKey[list[str]]()


@pytest.fixture
def tell(pytestconfig: pytest.Config) -> Tell:
    """Adds lines to the summary of the run."""
    return pytestconfig.stash.setdefault(_LINES, []).append


def selected(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """The values of a parameter that the tests of this run have, each once."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    return list(
        dict.fromkeys(spec.params[parameter] for spec in specs if spec is not None and parameter in spec.params)
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print them."""
    lines = config.stash.get(_LINES, None) or []
    if lines:
        terminalreporter.section("simulation")
    for line in lines:
        terminalreporter.write_line(line)
