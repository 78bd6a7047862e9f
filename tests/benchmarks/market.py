"""The market: how long awards take, how many jobs a second go through, and what gossip costs. Run:
`.venv/bin/python tests/benchmarks/market.py [--only standing,broadcast,jobs,gossip] [--json]` (or `make bench`).

Awards are timed from the stored offer to the stored award, and to the stored acceptance: in the simulator, with dead
and flaky providers and latencies between continents, and between real nodes on loopback. Jobs a second are those of one
consumer and one provider on one core, with an executor that does next to nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from aci_p2p.protocol.bidding import MAX_PER_CONSUMER
from tests.benchmarks import market_gossip, market_simulated
from tests.benchmarks.market_loopback import Throughput, count_jobs, measure_awards
from tests.benchmarks.market_simulated import DEAD, FLAKY, MEDIAN_MS, Awards

STANDING, BROADCAST, JOBS, GOSSIP = "standing", "broadcast", "jobs", "gossip"
PARTS: Final = (STANDING, BROADCAST, JOBS, GOSSIP)
ROUNDS: Final = {10: 20, 100: 10, 1_000: 4}
"""Rounds of 40 jobs, by the number of providers: the more of them, the more of each kind in a round."""
LOOPBACK: Final = 10
"""Providers on loopback."""
LOOPBACK_JOBS: Final = MAX_PER_CONSUMER - LOOPBACK
"""Jobs among them, behind one for each: providers bid for no more of a consumer's offers at once."""
JOBS_S: Final = 10.0
"""For which jobs are offered as fast as they end, seconds."""

Table = dict[str, dict[str, float]]
"""Figures by size."""


def awards(*, asks: bool) -> Table:
    """One path's figures, by the number of providers."""
    table: Table = {}
    for size, rounds in ROUNDS.items():
        name = f"{'standing' if asks else 'broadcast'}, {size} simulated providers: round"
        measured = market_simulated.measure(size, asks=asks, rounds=rounds, progress=partial(_progress, name))
        table[str(size)] = _figures(measured)
    _progress(f"{LOOPBACK} providers on loopback: jobs", LOOPBACK_JOBS)
    table[f"{LOOPBACK} on loopback"] = _figures(
        trio.run(partial(measure_awards, LOOPBACK, asks=asks, jobs=LOOPBACK_JOBS))
    )
    return table


def _figures(measured: Awards) -> dict[str, float]:
    return {
        "p50_ms": _quantile(measured.award, 50),
        "p99_ms": _quantile(measured.award, 99),
        "accept_p50_ms": _quantile(measured.accept, 50),
        "accept_p99_ms": _quantile(measured.accept, 99),
        "jobs": measured.jobs,
        "not_awarded": measured.jobs - len(measured.award),
        "not_accepted": measured.jobs - len(measured.accept),
    }


def _quantile(values: Sequence[float], percent: int) -> float:
    return round(sorted(values)[min(len(values) - 1, len(values) * percent // 100)], 1) if values else float("nan")


def _progress(what: str, count: int) -> None:
    print(f"\r\033[K{what} {count}", end="", file=sys.stderr, flush=True)


def describe(done: Throughput) -> str:
    """What limits jobs a second, in words."""
    return (
        f"{done.jobs / done.wall_s:.0f} jobs/s on the wall, {done.jobs / done.processor_s:.0f} per second of processor "
        f"time, {1_000 * done.processor_s / done.jobs:.1f} ms of it for each job at both nodes together; the core is "
        f"{done.processor_s / done.wall_s:.0%} busy; {done.commits / done.jobs:.1f} durable commits for each job"
    )


def measure(parts: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The figures of some parts, and what is to be said of them."""
    report: dict[str, Any] = {}
    said = [f"simulated: {DEAD:.0%} dead, {FLAKY:.0%} flaky, {MEDIAN_MS} ms one way (median)"]
    for path in (STANDING, BROADCAST):
        if path in parts:
            report[path] = awards(asks=path == STANDING)
    if JOBS in parts:
        _progress("jobs on one core, seconds:", round(JOBS_S))
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            done = pool.submit(count_jobs, JOBS_S).result()
        report["jobs_per_second"] = round(done.jobs / done.wall_s, 1)
        said.append(f"one core: {describe(done)}")
    if GOSSIP in parts:
        report[GOSSIP] = {}
        for size in market_gossip.SIZES:
            _progress("gossip, nodes:", size)
            report[GOSSIP][str(size)] = asdict(market_gossip.cost(size))
    print("\r\033[K", end="", file=sys.stderr)
    return report, said


def print_tables(report: dict[str, Any]) -> None:
    """As Markdown."""
    for path in (STANDING, BROADCAST):
        if path in report:
            print(f"\n| {path}: providers | {' | '.join(next(iter(report[path].values())))} |\n|---|{'--:|' * 7}")
            for size, figures in report[path].items():
                print(f"| {size} | {' | '.join(f'{value:g}' for value in figures.values())} |")
    if GOSSIP in report:
        print("\n| nodes | providers of a model | its asks/s | asks, B/s | broadcasts, B/s | with more models, B/s |")
        print("|--:|--:|--:|--:|--:|--:|")
        for size, figures in report[GOSSIP].items():
            print(f"| {int(size):,} | {' | '.join(f'{value:,}' for value in figures.values())} |")
    print()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    parts = options.only.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--only takes some of {','.join(PARTS)}")
    load = os.getloadavg()[0]
    report, said = measure(parts)
    device = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_tables(report)
    for line in (*said, f"device: {device}, load {load:.1f} before"):
        print(line, file=sys.stderr if options.json else sys.stdout)


if __name__ == "__main__":
    main()
