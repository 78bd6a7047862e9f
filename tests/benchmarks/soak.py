"""Whether nodes grow with time: a swarm with churn, whose memory, tasks, threads, descriptors and tables are sampled.

Residents stay; churners come and go, each an identity out of a pool: they join, look for the only provider, publish
offers, run a job now and then, and leave. A line is fitted to what comes after the warm-up, and growth beyond what is
allowed for its kind fails. Run: `.venv/bin/python -m tests.benchmarks.soak [--minutes 20] [--json]`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import random
import socket
import sys
import tempfile
import threading
from array import array
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import trio

from aci_p2p import ACI, NodeConfig, ProviderConfig, open_node
from aci_p2p.clock import system_clock
from aci_p2p.executor import ModelStore
from aci_p2p.network import NetworkConfig
from aci_p2p.node import Node
from aci_p2p.protocol.errors import AciError
from aci_p2p.tasks import open_background
from tests.executor.tiny import write_tiny_model
from tests.scenarios.messages import MODEL_ROOT, make_offer

RESIDENTS: Final = 6
"""Nodes that stay; the first provides."""
CHURNERS: Final = 3
"""Churners at once."""
POOL: Final = 12
"""Identities of churners: what nodes remember of others is full when all have been there."""
VISIT_S: Final = (2.0, 8.0)
"""Shortest and longest visit of a churner, seconds."""
OFFER_S: Final = 1.0
"""Seconds between two offers of a resident."""
SAMPLES: Final = 240
"""Samples in the whole time."""
WARM_UP: Final = 0.4
"""Share of the time that is not judged: tables fill, caches warm."""

ALLOWED: Final[Mapping[str, tuple[float, float]]] = {
    "memory MiB": (4.0, 0.02),
    "workers MiB": (4.0, 0.02),
    "tasks": (4.0, 0.02),
    "threads": (2.0, 0.0),
    "descriptors": (4.0, 0.02),
    "objects": (4_000.0, 0.02),
}
"""Growth that is noise: in all, and as a share of the mean; the larger of the two counts."""
ALLOWED_TABLE: Final = (32.0, 0.05)
"""The same for each table of the residents, entries."""

NOT_JUDGED: Final = frozenset({"Topic._refused", "_State.received"})
"""Shown only: what forgets nothing before it is full (MAX_REFUSED), and the bytes that wait for their readers at the
moment of a sample, which are as many as the machine is busy."""

_LIBC: Final = ctypes.CDLL("libc.so.6")


@dataclass(frozen=True)
class Series:
    """One quantity over time."""

    name: str
    """What it is."""
    first: float
    """Mean of the first tenth of what is judged."""
    last: float
    """Mean of the last tenth."""
    growth: float
    """Of the fitted line, over the time that is judged."""
    error: float
    """Standard error of the growth."""
    allowed: float
    """Growth that is noise."""

    @property
    def grows(self) -> bool:
        """Whether there is growth, beyond what is allowed and what chance explains."""
        return self.growth > self.allowed and self.growth > 3 * self.error


@dataclass(frozen=True)
class Soak:
    """The whole run."""

    minutes: float
    """How long it took."""
    visits: int
    """Churners that came and left."""
    jobs: int
    """Jobs that ended with an answer."""
    failed: int
    """Jobs and visits that ended with an error."""
    series: tuple[Series, ...]
    """What was sampled: the process first, then the tables that hold most."""
    machine: str
    """Where this was measured."""
    times: Sequence[float] = field(repr=False)
    """Of the samples, seconds."""
    samples: Mapping[str, Sequence[float]] = field(repr=False)
    """Everything that was sampled, in the order of `times`."""


class Samples:
    """What was sampled, in few bytes: the process that is measured holds it."""

    def __init__(self) -> None:
        self.times = array("d")
        """Of the samples, seconds."""
        self.columns: dict[str, array[float]] = {}
        """Each quantity in the order of `times`; 0 where there was none."""

    def add(self, now: float, sample: Mapping[str, float]) -> None:
        """Keep a sample."""
        for name in sample:
            self.columns.setdefault(name, array("d", bytes(8 * len(self.times))))
        for name, column in self.columns.items():
            column.append(sample.get(name, 0.0))
        self.times.append(now)


class Counts:
    """What has happened."""

    def __init__(self) -> None:
        self.visits = self.jobs = self.failed = 0


def allowance(name: str) -> tuple[float, float]:
    """Growth of a quantity that is noise, as in ALLOWED."""
    return (math.inf, 0.0) if name in NOT_JUDGED else ALLOWED.get(name, ALLOWED_TABLE)


def fit(name: str, times: Sequence[float], values: Sequence[float], allowed: tuple[float, float]) -> Series:
    """Fit a line to a quantity; `allowed` as in ALLOWED."""
    x, y = np.asarray(times, dtype=float), np.asarray(values, dtype=float)
    (slope, start), covariance = np.polyfit(x, y, 1, cov="unscaled")
    # Neighbouring samples are alike: as many independent ones are counted as the residuals' correlation leaves.
    residuals = y - (slope * x + start)
    spread = float(np.sum(residuals**2)) / max(1, len(y) - 2)
    lag = float(np.sum(residuals[1:] * residuals[:-1]) / max(1e-12, float(np.sum(residuals**2))))
    inflation = (1 + max(0.0, min(lag, 0.99))) / (1 - max(0.0, min(lag, 0.99)))
    span = float(x[-1] - x[0])
    tenth = max(1, len(y) // 10)
    return Series(
        name=name,
        first=float(y[:tenth].mean()),
        last=float(y[-tenth:].mean()),
        growth=float(slope) * span,
        error=float(np.sqrt(covariance[0][0] * spread * inflation)) * span,
        allowed=max(allowed[0], allowed[1] * float(y.mean())),
    )


def table_sizes(roots: Sequence[object]) -> Counter[str]:
    """Entries of all containers that our objects below `roots` hold, by class and attribute."""
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    waiting: deque[object] = deque(roots)
    while waiting:
        thing = waiting.popleft()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Mapping):
            waiting.extend(cast("Mapping[object, object]", thing).values())
        elif isinstance(thing, list | tuple | set | deque | frozenset):
            waiting.extend(cast("Collection[object]", thing))
        elif type(thing).__module__.startswith("aci_p2p"):
            for name, value in _attributes(thing):
                waiting.append(value)
                if isinstance(value, Mapping | list | set | deque | bytearray):
                    sizes[f"{type(thing).__name__}.{name}"] += len(cast("Collection[object]", value))
        elif callable(thing) and (owner := getattr(thing, "__self__", None)) is not None:
            waiting.append(owner)
    return sizes


def _attributes(thing: object) -> list[tuple[str, object]]:
    names = {name for kind in type(thing).__mro__ for name in cast("Sequence[str]", getattr(kind, "__slots__", ()))}
    found = [(name, getattr(thing, name)) for name in names if hasattr(thing, name) and not name.startswith("__")]
    return [*found, *cast("dict[str, object]", getattr(thing, "__dict__", {})).items()]


def sample(residents: Sequence[Node]) -> dict[str, float]:
    """Everything that must not grow, now."""
    gc.collect()
    # What the allocator has free goes back to the system first: it is not in use.
    _LIBC.malloc_trim(0)
    statistics = trio.lowlevel.current_statistics()
    process: dict[str, float] = {
        "memory MiB": _memory(os.getpid()),
        "workers MiB": sum(map(_memory, _children())),
        "tasks": statistics.tasks_living,
        "threads": threading.active_count(),
        "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "objects": len(gc.get_objects()),
    }
    return process | dict(table_sizes(residents))


def _memory(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def _children() -> list[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


async def main(seconds: float) -> Soak:
    """Run a swarm for so long."""
    counts, rng = Counts(), random.Random(1)  # noqa: S311 - the same visits in every run
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root = ModelStore(home / "models").add_directory(write_tiny_model(home / "tiny"), "rare").root
        residents: list[Node] = []
        for number in range(RESIDENTS):
            config = NodeConfig(
                home=home / f"resident-{number}",
                model_store=home / "models",
                bootstrap=tuple(node.addresses[0] for node in residents[-3:]),
                provider=ProviderConfig(models=("rare",)) if number == 0 else None,
            )
            residents.append(await stack.enter_async_context(open_node(config)))
        nursery = await stack.enter_async_context(open_background())
        for node in residents:
            nursery.start_soon(_publish, node)
        free = _free_ports(POOL)
        for _ in range(CHURNERS):
            nursery.start_soon(_churn, home, residents, free, rng, root.hex(), counts)
        samples = Samples()
        began = trio.current_time()
        while (now := trio.current_time() - began) < seconds:
            samples.add(now, sample(residents))
            await trio.sleep(seconds / SAMPLES)
    return _report(samples, counts)


def _free_ports(count: int) -> list[int]:
    """Ports that are free now: each churner has its own, as a daemon has."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


async def _publish(node: Node) -> None:
    """A resident broadcasts offers that nobody bids for, for ever."""
    number = 0
    while True:
        await node.asks.join(MODEL_ROOT)
        await node.market.publish_offer(make_offer(node._sealer, system_clock(), b"%d" % number))
        number += 1
        await trio.sleep(OFFER_S)


async def _churn(
    home: Path, residents: Sequence[Node], free: list[int], rng: random.Random, model: str, counts: Counts
) -> None:
    """One churner after the other, for ever."""
    while True:
        port = free.pop(rng.randrange(len(free)))
        bootstrap = tuple(rng.choice(residents).addresses[0] for _ in range(2))
        listen = NetworkConfig(listen=(f"/ip4/127.0.0.1/tcp/{port}",))
        config = NodeConfig(home=home / f"churner-{port}", p2p=listen, bootstrap=bootstrap)
        try:
            with trio.move_on_after(rng.uniform(*VISIT_S)):
                await _visit(config, model, counts, ask=rng.random() < 0.5)
        except AciError as error:
            counts.failed += 1
            sys.stderr.write(f"{error.message}\n")
        counts.visits += 1
        free.append(port)


async def _visit(config: NodeConfig, model: str, counts: Counts, *, ask: bool) -> None:
    async with open_node(config) as node:
        await node.announce()
        await node.find_providers(bytes.fromhex(model))
        if ask:
            async with ACI(node) as aci:
                await aci.inference(prompt="Hello!", model=model, max_tokens=8)
            counts.jobs += 1
        await _publish(node)


def _report(samples: Samples, counts: Counts) -> Soak:
    times, columns = samples.times, samples.columns
    start = int(len(times) * WARM_UP)
    series = [fit(name, times[start:], column[start:], allowance(name)) for name, column in columns.items()]
    process, tables = series[: len(ALLOWED)], sorted(series[len(ALLOWED) :], key=lambda one: -one.last)
    return Soak(
        minutes=times[-1] / 60,
        visits=counts.visits,
        jobs=counts.jobs,
        failed=counts.failed,
        series=(*process, *tables),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        times=times,
        samples=columns,
    )


def plot(times: Sequence[float], values: Sequence[float], *, width: int = 72, height: int = 8) -> list[str]:
    """A quantity over time in characters, from its least to its greatest value."""
    low, high = min(values), max(values)
    columns = np.array_split(np.asarray(values, dtype=float), min(width, len(values)))
    levels = [round((float(column.mean()) - low) / ((high - low) or 1.0) * (height - 1)) for column in columns]
    rows = ["".join("#" if level >= row else " " for level in levels) for row in range(height - 1, -1, -1)]
    return [f"{high:>12.1f} |{rows[0]}", *(f"{'':12} |{row}" for row in rows[1:-1]), f"{low:>12.1f} |{rows[-1]}"]


def describe(soak: Soak) -> str:
    """The table and the plots, for people."""
    lines = [
        f"{soak.minutes:.1f} minutes, {soak.visits} visits of {POOL} churners, {soak.jobs} jobs, {soak.failed} failed",
        f"{RESIDENTS} residents and {CHURNERS} churners in one process; {soak.machine}",
        "",
        f"{'after the warm-up':44} {'first':>10} {'last':>10} {'growth':>10} {'allowed':>10}",
    ]
    shown = [one for one in soak.series if one.last >= 1 or one.grows]
    lines += [
        f"{one.name:44} {one.first:10.1f} {one.last:10.1f} {one.growth:+10.1f} {one.allowed:10.1f}"
        + ("  GROWS" if one.grows else "")
        for one in shown
    ]
    for name in ALLOWED:
        lines += ["", f"{name} over {soak.minutes:.1f} minutes", *plot(soak.times, soak.samples[name])]
    return "\n".join(lines)


def _as_json(soak: Soak) -> dict[str, Any]:
    document = asdict(soak)
    del document["times"], document["samples"]
    for series in document["series"]:
        # JSON has no infinity.
        series["allowed"] = None if math.isinf(series["allowed"]) else series["allowed"]
    return document


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    soak = trio.run(main, arguments.minutes * 60)
    print(json.dumps(_as_json(soak), indent=2) if arguments.json else describe(soak))
    sys.exit(any(one.grows for one in soak.series))
