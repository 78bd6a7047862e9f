"""What a simulated world looked like: figures for tables, and a page with pictures."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from aci_p2p.testing.simulator.roles import Outcome
from aci_p2p.testing.simulator.simulation import Result
from aci_p2p.testing.simulator.world import START_MS

BUCKETS: Final = 60
"""Points of a curve."""
WIDTH: Final = 760
"""Pixels of a picture."""
HEIGHT: Final = 220
"""Pixels of a picture."""
MARGIN: Final = 48
"""Pixels around the curves."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The jobs of a world in figures."""

    jobs: int
    """Jobs of honest consumers that ended."""
    answered: int
    """Those that were answered."""
    failures: dict[str, int]
    """The others, by the code of their error."""
    wrong: int
    """Answers that the true model does not give."""
    first_token_ms: tuple[int, int]
    """Milliseconds from offer to first token: median and 99th percentile."""
    duration_ms: tuple[int, int]
    """Milliseconds from offer to receipt: median and 99th percentile."""
    spent: int
    """What honest consumers signed for, base units."""


def summarise(result: Result) -> Summary:
    """Count a world's jobs."""
    answered = [outcome for outcome in result.outcomes if not outcome.failure]
    first = [outcome.first_token_ms for outcome in answered if outcome.first_token_ms is not None]
    return Summary(
        jobs=len(result.outcomes),
        answered=len(answered),
        failures=dict(Counter(outcome.failure for outcome in result.outcomes if outcome.failure).most_common()),
        wrong=sum(outcome.text != outcome.expected for outcome in answered),
        first_token_ms=(_percentile(first, 50), _percentile(first, 99)),
        duration_ms=(
            _percentile([outcome.duration_ms for outcome in answered], 50),
            _percentile([outcome.duration_ms for outcome in answered], 99),
        ),
        spent=result.spending,
    )


def _percentile(values: Sequence[int], percent: int) -> int:
    if not values:
        return 0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def page(result: Result) -> str:
    """An HTML page with latency and money over time."""
    span = max((outcome.started + outcome.duration_ms for outcome in result.outcomes), default=START_MS + 1) - START_MS
    answered = [outcome for outcome in result.outcomes if not outcome.failure]

    def bucket(outcome: Outcome) -> int:
        return min(BUCKETS - 1, (outcome.started - START_MS) * BUCKETS // max(span, 1))

    def curve(value: Callable[[Outcome], int], percent: int) -> list[float]:
        return [
            float(_percentile([value(one) for one in answered if bucket(one) == index], percent))
            for index in range(BUCKETS)
        ]

    spent: list[float] = []
    total = 0.0
    for index in range(BUCKETS):
        total += sum(one.price for one in answered if bucket(one) == index)
        spent.append(total)
    failed = [
        float(sum(bool(one.failure) for one in result.outcomes if bucket(one) == index)) for index in range(BUCKETS)
    ]
    minutes = span / 60_000
    summary, scenario = summarise(result), result.scenario
    pictures = (
        _picture("Offer to receipt, ms", {"median": curve(_duration, 50), "p99": curve(_duration, 99)}, minutes),
        _picture("Signed receipts, base units", {"total": spent}, minutes),
        _picture("Jobs that failed", {"failed": failed}, minutes),
    )
    title = f"{scenario.nodes} nodes, {scenario.hours:g} h, seed {scenario.seed}"
    facts = (
        f"{summary.answered} of {summary.jobs} jobs answered, {summary.wrong} wrongly; {result.events} events; "
        f"{result.checks} checks; trace {result.trace}"
    )
    return (
        "<!doctype html><meta charset=utf-8>"
        f"<title>{html.escape(title)}</title>"
        "<style>body{font:15px system-ui;margin:2em auto;max-width:800px}svg{display:block;margin:1.5em 0}"
        "text{font:12px system-ui}.l0{stroke:#1463b8}.l1{stroke:#c4561a}path{fill:none;stroke-width:1.6}</style>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(facts)}</p>{''.join(pictures)}\n"
    )


def _duration(outcome: Outcome) -> int:
    return outcome.duration_ms


def _picture(title: str, curves: dict[str, list[float]], minutes: float) -> str:
    """A line chart as SVG."""
    top = max((max(curve) for curve in curves.values()), default=0.0) or 1.0
    inner_width, inner_height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def point(index: int, value: float) -> str:
        x = MARGIN + inner_width * index / (BUCKETS - 1)
        return f"{x:.1f},{HEIGHT - MARGIN - inner_height * value / top:.1f}"

    paths = "".join(
        f'<path class="l{number}" d="M{" L".join(point(index, value) for index, value in enumerate(curve))}"/>'
        for number, curve in enumerate(curves.values())
    )
    names = "".join(
        f'<text x="{WIDTH - MARGIN - 60 * (len(curves) - number)}" y="20" fill="{("#1463b8", "#c4561a")[number]}">'
        f"{html.escape(name)}</text>"
        for number, name in enumerate(curves)
        if len(curves) > 1
    )
    base = HEIGHT - MARGIN
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'<text x="{MARGIN}" y="20">{html.escape(title)}</text>{names}'
        f'<path stroke="#999" d="M{MARGIN},{MARGIN} L{MARGIN},{base} L{WIDTH - MARGIN},{base}"/>'
        f'<text x="4" y="{MARGIN + 4}">{top:.3g}</text><text x="4" y="{base}">0</text>'
        f'<text x="{WIDTH - MARGIN - 40}" y="{HEIGHT - 24}">{minutes:.0f} min</text>{paths}</svg>'
    )
