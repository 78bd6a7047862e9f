"""The default executor's speed, against transformers and the memory's bandwidth, and how it treats the event loop.

The default model, greedy, in the real worker process. Every round measures all of them, one after the other, so that
what else the machine does meets all alike; the figures are medians over the rounds. Run:
`.venv/bin/python tests/benchmarks/executor.py [--json] [--threads N] [--torch-python PYTHON]` (or `make bench`), where
PYTHON is an interpreter that has torch and transformers; without one, transformers is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import trio

from aci_p2p.config import default_home
from aci_p2p.executor import Executor, GenerationRequest, Message, ModelStore, open_process_executor
from aci_p2p.executor.process import default_threads
from aci_p2p.protocol.catalogue import CATALOGUE, DEFAULT_MODEL

ROUNDS = 5
TOKENS = 128
BATCH = 4
PROMPT = "Tell me a long story about a robot who learns to paint."
LONG_PROMPT = "Tell me about the history of the city of Rome, its emperors and its buildings. " * 32
"""About 550 tokens."""
TICK_S = 0.01
TICKS_S = 5.0
CANCELLATIONS = 10
WEIGHT_BYTES = 4
"""Of a weight in fp32; every weight is read once per token."""

READ = """
import sys, threading, time, numpy
threads = int(sys.argv[1])
parts = [numpy.ones((512 << 20) // 4 // threads, numpy.float32) for _ in range(threads)]
def read():
    started = time.perf_counter()
    workers = [threading.Thread(target=numpy.dot, args=(part, part)) for part in parts]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    return sum(part.nbytes for part in parts) / (time.perf_counter() - started)
for line in sys.stdin:
    print(max(read() for _ in range(5)), flush=True)
"""
"""Bytes per second that as many threads read from memory; BLAS itself has one thread."""
GENERATE = """
import sys, time, torch, transformers
directory, threads, prompt, tokens = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
torch.set_num_threads(threads)
tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
messages = [{"role": "user", "content": prompt}]
ids = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)])
for line in sys.stdin:
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    print((out.shape[1] - ids.shape[1]) / (time.perf_counter() - started), flush=True)
"""
"""Tokens per second of transformers' `generate`."""


@dataclass(frozen=True)
class Figures:
    """Medians over ROUNDS rounds unless they say otherwise."""

    tokens_per_second: float
    """One generation, from the request to its last token."""
    batch_tokens_per_second: float
    """BATCH generations at once, all their tokens."""
    prefill_tokens_per_second: float
    """Of a prompt of about 550 tokens, until the first token of the answer."""
    transformers_tokens_per_second: float | None
    """`generate` in fp32 on the same model with as many threads."""
    against_transformers: float | None
    """Median of the rounds' quotients."""
    bandwidth_gb_per_second: float
    """Read from memory by as many threads."""
    limit_tokens_per_second: float
    """That bandwidth over the bytes of the weights."""
    of_the_limit: float
    """Median of the rounds' quotients."""
    threads: int
    """Of all the above."""
    tick_idle_p99_ms: float
    """Delay of a 10 ms ticker in the node's event loop, 99th percentile, without a job."""
    tick_busy_p99_ms: float
    """The same while a long prompt and an answer are computed with the default number of threads."""
    tick_busy_max_ms: float
    """The longest delay then."""
    cancel_decode_ms: float
    """From leaving a generation to its end in the worker, median of CANCELLATIONS."""
    cancel_decode_max_ms: float
    """The longest of them."""
    cancel_prefill_ms: float
    """The same while a long prompt is computed."""
    cancel_prefill_max_ms: float
    """The longest of them."""
    default_threads: int
    """Of the delays and cancellations."""
    machine: str
    """Where this was measured."""


class Helper:
    """A program that measures once for every line that it is sent."""

    def __init__(self, python: str, program: str, *arguments: str) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [python, "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )

    def measure(self) -> float:
        """One measurement."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def end(self) -> None:
        """End the program."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def helper(python: str, program: str, *arguments: str) -> Generator[Helper]:
    """A program running within the block."""
    started = Helper(python, program, *arguments)
    try:
        yield started
    finally:
        started.end()


async def main(threads: int, torch_python: str | None) -> Figures:
    """Measure."""
    store = ModelStore(default_home() / "models")
    directory = str(store.open(DEFAULT_MODEL).directory)
    rounds: list[Round] = []
    with helper(sys.executable, READ, str(threads)) as reading:
        torch_arguments = (directory, str(threads), PROMPT, str(TOKENS))
        torch = Helper(torch_python, GENERATE, *torch_arguments) if torch_python else None
        try:
            async with open_process_executor(store, threads=threads, max_batch=BATCH) as executor:
                await one_round(executor, reading, torch)
                for number in range(ROUNDS):
                    print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
                    rounds.append(await one_round(executor, reading, torch))
        finally:
            if torch is not None:
                torch.end()
    weights = CATALOGUE[DEFAULT_MODEL].parameters * WEIGHT_BYTES
    idle = await ticks(trio.sleep, TICKS_S)
    async with open_process_executor(store) as executor:
        await executor.load(DEFAULT_MODEL)
        busy = await ticks(answer, executor, LONG_PROMPT, TOKENS)
        decode = [await cancellation(executor, PROMPT, 0.5) for _ in range(CANCELLATIONS)]
        prefill = [await cancellation(executor, LONG_PROMPT, 0.1 + 0.02 * turn) for turn in range(CANCELLATIONS)]
    versus = [taken.single / taken.torch for taken in rounds if taken.torch]
    return Figures(
        tokens_per_second=median(taken.single for taken in rounds),
        batch_tokens_per_second=median(taken.batch for taken in rounds),
        prefill_tokens_per_second=median(taken.prefill for taken in rounds),
        transformers_tokens_per_second=median(taken.torch for taken in rounds if taken.torch) if versus else None,
        against_transformers=median(versus, 2) if versus else None,
        bandwidth_gb_per_second=median(taken.bandwidth / 1e9 for taken in rounds),
        limit_tokens_per_second=median(taken.bandwidth / weights for taken in rounds),
        of_the_limit=median((taken.single * weights / taken.bandwidth for taken in rounds), 2),
        threads=threads,
        tick_idle_p99_ms=milliseconds(percentile(idle, 99)),
        tick_busy_p99_ms=milliseconds(percentile(busy, 99)),
        tick_busy_max_ms=milliseconds(max(busy)),
        cancel_decode_ms=milliseconds(statistics.median(decode)),
        cancel_decode_max_ms=milliseconds(max(decode)),
        cancel_prefill_ms=milliseconds(statistics.median(prefill)),
        cancel_prefill_max_ms=milliseconds(max(prefill)),
        default_threads=default_threads(),
        machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    )


@dataclass(frozen=True)
class Round:
    """What one round measured."""

    single: float
    """Tokens per second."""
    batch: float
    """Tokens per second of all together."""
    prefill: float
    """Prompt tokens per second."""
    torch: float | None
    """Tokens per second of transformers."""
    bandwidth: float
    """Bytes per second."""


async def one_round(executor: Executor, reading: Helper, torch: Helper | None) -> Round:
    """Measure each once."""
    bandwidth = reading.measure()
    single = await speed(executor, 1)
    versus = torch.measure() if torch else None
    batch = await speed(executor, BATCH)
    prompt = len(await executor.encode(DEFAULT_MODEL, [Message("user", LONG_PROMPT)]))
    started = time.perf_counter()
    await answer(executor, LONG_PROMPT, 1)
    return Round(single, batch, prompt / (time.perf_counter() - started), versus, bandwidth)


async def speed(executor: Executor, at_once: int) -> float:
    """Tokens per second of generations that begin together."""
    produced = executor.statistics().produced
    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(answer, executor, PROMPT, TOKENS)
    return (executor.statistics().produced - produced) / (time.perf_counter() - started)


async def answer(executor: Executor, prompt: str, tokens: int) -> None:
    """One generation to its end."""
    async with executor.generate(DEFAULT_MODEL, GenerationRequest([Message("user", prompt)], tokens)) as chunks:
        async for _ in chunks:
            pass


async def cancellation(executor: Executor, prompt: str, wait: float) -> float:
    """Seconds from leaving a generation after `wait` seconds to its end in the worker."""
    async with executor.generate(DEFAULT_MODEL, GenerationRequest([Message("user", prompt)], 2000)) as chunks:
        with trio.move_on_after(wait):
            async for _ in chunks:
                pass
        assert executor.statistics().running == 1
        left = time.perf_counter()
    while executor.statistics().running:  # noqa: ASYNC110 - a counter, not an event
        await trio.sleep(0.0005)
    return time.perf_counter() - left


async def ticks(work: Callable[..., Awaitable[None]], *arguments: Any) -> list[float]:  # noqa: ANN401 - the work's
    """Seconds by which the ticks of a ticker are late while `work` runs."""
    late: list[float] = []

    async def tick() -> None:
        due = trio.current_time() + TICK_S
        while True:
            await trio.sleep_until(due)
            now = trio.current_time()
            late.append(now - due)
            due = max(due + TICK_S, now)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        await work(*arguments)
        nursery.cancel_scope.cancel()
    return late


def median(values: Iterable[float], digits: int = 1) -> float:
    """Rounded."""
    return round(statistics.median(values), digits)


def milliseconds(seconds: float) -> float:
    """Rounded."""
    return round(1000 * seconds, 2)


def percentile(values: Sequence[float], percent: int) -> float:
    """Of at least two values."""
    return statistics.quantiles(values, n=100)[percent - 1]


def has_torch(python: str) -> bool:
    """Whether an interpreter has torch and transformers."""
    return (
        subprocess.run([python, "-c", "import torch, transformers"], check=False, capture_output=True).returncode == 0
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--threads", type=int, default=2, help="of the executor, transformers and the bandwidth alike")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch and transformers")
    options = parser.parse_args()
    figures = asdict(trio.run(main, options.threads, options.torch_python if has_torch(options.torch_python) else None))
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<32}{value}")
