"""The benchmark of the market runs, at its smallest."""

from __future__ import annotations

import json
from functools import partial

import pytest
import trio

from aci_p2p.protocol.pacing import ASKS_PER_SECOND, RENEW_MS
from tests.benchmarks import market, market_gossip, market_loopback
from tests.benchmarks.market_loopback import measure_jobs
from tests.benchmarks.market_simulated import MEDIAN_MS, measure


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two providers, a few jobs."""
    monkeypatch.setattr(market, "ROUNDS", {2: 1})
    monkeypatch.setattr(market, "LOOPBACK", 2)
    monkeypatch.setattr(market, "LOOPBACK_JOBS", 2)
    monkeypatch.setattr(market_gossip, "SIZES", (1_000,))


@pytest.mark.usefixtures("small")
def test_the_report_has_each_part(capsys: pytest.CaptureFixture[str]) -> None:
    market.main(["--only", "standing,broadcast,gossip", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["standing", "broadcast", "gossip"]
    for path in ("standing", "broadcast"):
        assert list(report[path]) == ["2", "2 on loopback"]
        assert all(0 < figures["p50_ms"] <= figures["p99_ms"] for figures in report[path].values())
    assert report["gossip"]["1000"]["asks_bytes"] > 0


def test_jobs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(market_loopback, "AT_ONCE", 2)
    done = trio.run(partial(measure_jobs, 0.1))
    assert done.jobs >= 2
    assert done.commits > done.jobs


def test_an_award_takes_a_round_trip_at_least() -> None:
    awards = measure(3, asks=True, rounds=1, jobs=5)
    assert awards.jobs == len(awards.award) == 5
    assert min(awards.award) > MEDIAN_MS / 2
    assert awards == measure(3, asks=True, rounds=1, jobs=5)


def test_asks_are_bounded() -> None:
    assert market_gossip.asks_per_second(5) == pytest.approx(5_000 / RENEW_MS, rel=0.1)
    assert market_gossip.asks_per_second(100) < 1.25 * ASKS_PER_SECOND
