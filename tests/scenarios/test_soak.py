"""The soak's judgement, and a short run of it."""

from __future__ import annotations

import pytest

from aci_p2p.network.delivery import SeenCache
from tests.benchmarks.soak import ALLOWED, Samples, allowance, fit, main, plot, table_sizes

TIMES = [float(second) for second in range(100)]
NOISE = [float((second * 7919) % 11) for second in range(100)]


def test_growth_is_told_from_noise() -> None:
    assert not fit("level", TIMES, [50 + noise for noise in NOISE], (4.0, 0.0)).grows
    leak = fit("leak", TIMES, [50 + noise + second / 10 for second, noise in enumerate(NOISE)], (4.0, 0.0))
    assert leak.grows
    assert leak.growth == pytest.approx(9.9, abs=2)
    assert not fit("a table that fills", TIMES, TIMES, allowance("Topic._refused")).grows
    assert fit("another table", TIMES, TIMES, allowance("Topic._remembered")).grows
    assert not fit("allowed", TIMES, [50 + second / 50 for second in TIMES], (4.0, 0.0)).grows
    assert not fit("in proportion", TIMES, [1e4 + second for second in range(100)], (4.0, 0.02)).grows
    # A line through noise is none, however much it rises.
    assert not fit("by chance", TIMES[:6], [50.0, 90.0, 10.0, 70.0, 30.0, 99.0], (4.0, 0.0)).grows


def test_tables_are_counted() -> None:
    seen = [SeenCache(), SeenCache()]
    seen[0].add(b"a", 0.0)
    seen[1].add(b"b", 0.0)
    seen[1].add(b"c", 0.0)
    assert table_sizes(seen)["SeenCache._expiry"] == 3
    assert table_sizes([seen[0], seen[0]])["SeenCache._expiry"] == 1


def test_samples_have_their_columns() -> None:
    samples = Samples()
    samples.add(0.5, {"first": 1.0})
    samples.add(1.5, {"second": 2.0})
    assert list(samples.times) == [0.5, 1.5]
    assert [(name, list(column)) for name, column in samples.columns.items()] == [
        ("first", [1.0, 0.0]),
        ("second", [0.0, 2.0]),
    ]


def test_a_plot_shows_least_and_greatest() -> None:
    assert plot([0.0, 1.0], [1.0, 3.0], height=2) == [f"{3:>12.1f} | #", f"{1:>12.1f} |##"]


@pytest.mark.scenario
@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_short_soak() -> None:
    soak = await main(20.0)
    assert soak.visits > 0
    named = {series.name: series for series in soak.series}
    assert set(ALLOWED) <= set(named)
    assert named["Connections._of_peer"].last > 0
    # Half a minute says nothing of memory, but tasks, threads and descriptors have found their level.
    assert not [name for name in ("tasks", "threads", "descriptors") if named[name].grows]
