"""What a simulated world looked like: figures for tables, and a page with pictures."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from aci_p2p.protocol.pricing import ONE_ACI
from aci_p2p.testing.simulator.roles import Outcome
from aci_p2p.testing.simulator.simulation import Result
from aci_p2p.testing.simulator.world import START_MS

BUCKETS: Final = 60
"""Points of a curve."""
WIDTH: Final = 760
"""Pixels of a picture."""
HEIGHT: Final = 220
"""Pixels of a picture."""
LEGEND: Final = 60
"""Pixels for one name."""
COLOURS: Final = ("#1463b8", "#c4561a")
"""Of the curves of a picture."""
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

    def curve(value: Callable[[Outcome], int], percent: int) -> list[float | None]:
        buckets: list[list[int]] = [[] for _ in range(BUCKETS)]
        for one in answered:
            buckets[bucket(one)].append(value(one))
        return [float(_percentile(values, percent)) if values else None for values in buckets]

    spent, failed = [0.0] * BUCKETS, [0.0] * BUCKETS
    for one in result.outcomes:
        spent[bucket(one)] += one.price / ONE_ACI
        failed[bucket(one)] += bool(one.failure)
    total = list(accumulate(spent))
    minutes = span / 60_000
    summary, scenario = summarise(result), result.scenario
    pictures = (
        _picture("Offer to receipt, ms", {"median": curve(_duration, 50), "p99": curve(_duration, 99)}, minutes),
        _picture("Signed receipts, ACI", {"total": total}, minutes),
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
        f"text{{font:12px system-ui}}.l0{{stroke:{COLOURS[0]}}}.l1{{stroke:{COLOURS[1]}}}"
        "path{fill:none;stroke-width:1.6}</style>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(facts)}</p>{''.join(pictures)}\n"
    )


def _duration(outcome: Outcome) -> int:
    return outcome.duration_ms


def _picture(title: str, curves: Mapping[str, Sequence[float | None]], minutes: float) -> str:
    """A line chart as SVG; a curve has a gap where there is no value."""
    values = [value for curve in curves.values() for value in curve if value is not None]
    top = max(values, default=0.0) or 1.0
    inner_width, inner_height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def line(curve: Sequence[float | None]) -> str:
        steps: list[str] = []
        for index, value in enumerate(curve):
            if value is not None:
                x = MARGIN + inner_width * index / (BUCKETS - 1)
                y = HEIGHT - MARGIN - inner_height * value / top
                is_first = not index or curve[index - 1] is None
                steps.append(f"{'M' if is_first else 'L'}{x:.1f},{y:.1f}")
        return " ".join(steps)

    paths = "".join(f'<path class="l{number}" d="{line(curve)}"/>' for number, curve in enumerate(curves.values()))
    names = "".join(
        f'<text x="{WIDTH - MARGIN - LEGEND * (len(curves) - number)}" y="20" fill="{COLOURS[number]}">'
        f"{html.escape(name)}</text>"
        for number, name in enumerate(curves)
        if len(curves) > 1
    )
    base = HEIGHT - MARGIN
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'<text x="{MARGIN}" y="20">{html.escape(title)}, at most {_figure(top)}</text>{names}'
        f'<path stroke="#999" d="M{MARGIN},{MARGIN} L{MARGIN},{base} L{WIDTH - MARGIN},{base}"/>'
        f'<text x="4" y="{base}">0</text>'
        f'<text x="{WIDTH - MARGIN - LEGEND}" y="{HEIGHT - 24}">{minutes:.0f} min</text>{paths}</svg>'
    )


def _figure(value: float) -> str:
    """A number for people: whole if it is large, three digits if it is small."""
    return f"{value:,.0f}" if value >= 1 else f"{value:.3g}"
