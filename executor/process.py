"""The default executor: the numpy reference in a worker process, behind the `Executor` interface.

A worker that dies fails the jobs that it had; the next job starts another. Nothing that a worker does or sends can
raise into the node's tasks or hold up its event loop.
"""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

import trio

from aci_p2p.executor.api import (
    PROFILE,
    EngineDescription,
    Executor,
    ExecutorFailed,
    ExecutorStatistics,
    FinishReason,
    ForwardResult,
    Generation,
    GenerationRequest,
    Message,
    ModelInfo,
    PromptTooLong,
    TokenChunk,
)
from aci_p2p.executor.connection import WorkerJob, WorkerProcess
from aci_p2p.executor.frames import (
    CONVERSATION_BYTES_MAX,
    MESSAGES_MAX,
    TOKEN_BYTES,
    TOKENS_MAX,
    Accepted,
    Chunk,
    Credit,
    Encode,
    Encoded,
    Ending,
    Forward,
    Generate,
    Load,
    Loaded,
    Logits,
    Start,
    Turn,
)
from aci_p2p.executor.store import ModelStore
from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.tasks import open_background
from aci_p2p.version import VERSION

MAX_BATCH: Final = 4
"""Generations computed in one step. On a CPU four have nearly twice the speed of one; more only wait for each other."""
JOBS_MAX: Final = 64
"""Jobs that a worker has at once; further ones wait for a place before they are sent."""
CREDIT: Final = 64
"""Chunks of one generation that may be on their way to a slow reader; then its computation pauses."""
FORWARD_BYTES_MAX: Final = 1 << 30
"""Bytes of logits that one forward pass may return: 5,400 rows of a vocabulary of 49,152."""

_FINISH = {Ending.NONE: None, Ending.STOP: FinishReason.STOP, Ending.LENGTH: FinishReason.LENGTH}
_CREDIT_BATCH = CREDIT // 4
"""Chunks taken before credit for them is sent."""


def default_threads() -> int:
    """One less than the cores that this process may use, at least 1: a core remains for the event loop."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)


@asynccontextmanager
async def open_process_executor(
    store: ModelStore, *, threads: int | None = None, max_batch: int = MAX_BATCH
) -> AsyncGenerator[Executor]:
    """The numpy reference in a process of its own, which the first job starts and the end of the block ends.

    `threads` compute (default: one less than there are cores), at most `max_batch` generations in one step. Models are
    verified and loaded by the first job that needs them. Leaving the block fails the jobs still running with
    ExecutorFailed.
    """
    async with open_background() as nursery:
        executor = _ProcessExecutor(store, nursery, threads or default_threads(), max_batch)
        try:
            yield executor
        finally:
            executor.close()


class _ProcessExecutor(Executor):
    """Hands jobs to a worker and replaces it when it is dead."""

    def __init__(self, store: ModelStore, nursery: trio.Nursery, threads: int, max_batch: int) -> None:
        self._store = store
        self._nursery = nursery
        self._threads = threads
        self._max_batch = max_batch
        self._places = trio.Semaphore(JOBS_MAX)
        self._starting = trio.Lock()
        self._worker: WorkerProcess | None = None
        self._vocabularies: dict[str, int] = {}
        self._produced_by_dead = 0
        self._restarts = 0
        self._closed = False

    def close(self) -> None:
        """Refuse further jobs."""
        self._closed = True

    async def load(self, model: str) -> ModelInfo:
        async with self._job(lambda number: Load(number, model), capacity=2) as job:
            match await job.next():
                case Loaded() as loaded:
                    self._vocabularies[model] = loaded.vocabulary
                    return ModelInfo(model, loaded.root, loaded.context, loaded.vocabulary)
                case reply:
                    raise _out_of_turn(reply)

    def generate(self, model: str, request: GenerationRequest) -> AbstractAsyncContextManager[Generation]:
        return self._generate(model, request)

    @asynccontextmanager
    async def _generate(self, model: str, request: GenerationRequest) -> AsyncGenerator[Generation]:
        turns = _turns(request.messages)
        sampling, max_tokens, count = request.sampling, request.max_tokens, len(request.accepted)
        if max_tokens < max(count, 1):
            msg = f"cannot generate {max_tokens} tokens{f', of which {count} are there' if count else ''}"
            raise LocalError(msg)
        accepted = _packed(request.accepted)

        def start(number: int) -> Start:
            temperature, seed = sampling.temperature_milli, sampling.seed
            return Generate(number, model, turns, max_tokens, temperature, seed, CREDIT, accepted)

        # Besides the chunks: Accepted and Ended or Failed.
        async with self._job(start, capacity=CREDIT + 2) as job:
            match await job.next():
                case Accepted(input_tokens=input_tokens):
                    yield _ProcessGeneration(job, input_tokens)
                case reply:
                    raise _out_of_turn(reply)

    async def encode(self, model: str, messages: Sequence[Message]) -> tuple[int, ...]:
        turns = _turns(messages)
        async with self._job(lambda number: Encode(number, model, turns), capacity=2) as job:
            match await job.next():
                case Encoded(tokens=tokens) if len(tokens) % TOKEN_BYTES == 0:
                    return struct.unpack(f"<{len(tokens) // TOKEN_BYTES}I", tokens)
                case reply:
                    raise _out_of_turn(reply)

    async def forward(self, model: str, tokens: Sequence[int], *, start: int = 0) -> ForwardResult:
        import numpy as np  # noqa: PLC0415 - only who checks a result has use for it

        rows = len(tokens) - start
        if start < 0 or rows < 1:
            msg = f"cannot compute logits from token {start} of {len(tokens)}"
            raise LocalError(msg)
        data = _packed(tokens)
        vocabulary = self._vocabularies.get(model) or (await self.load(model)).vocabulary
        row_bytes = vocabulary * np.dtype(np.float32).itemsize
        if rows * row_bytes > FORWARD_BYTES_MAX:
            msg = f"the logits of {rows} tokens are more than {FORWARD_BYTES_MAX >> 20} MiB"
            raise LocalError(msg, hint="check fewer tokens at once")
        logits = np.empty((rows, vocabulary), np.float32)
        # A frame holds one row at least; rows of one step end with a frame.
        async with self._job(lambda number: Forward(number, model, data, start), capacity=rows + 1) as job:
            done = 0
            while done < rows:
                match await job.next():
                    case Logits(rows=part) if len(part) in range(row_bytes, row_bytes * (rows - done) + 1, row_bytes):
                        values = np.frombuffer(part, "<f4").reshape(-1, vocabulary)
                        logits[done : done + len(values)] = values
                        done += len(values)
                    case reply:
                        raise _out_of_turn(reply)
        return ForwardResult(logits)

    def describe(self, model: str) -> EngineDescription:
        """The same for every model: all are computed in fp32, whatever they are stored in."""
        del model
        return EngineDescription(f"aci-numpy/{VERSION}", PROFILE, f"cpu {platform.machine()}", "none")

    def statistics(self) -> ExecutorStatistics:
        worker = self._worker
        jobs = list(worker.jobs.values()) if worker else []
        return ExecutorStatistics(
            running=sum(job.begun for job in jobs),
            waiting=sum(job.accepted and not job.begun for job in jobs),
            produced=self._produced_by_dead + (worker.produced if worker else 0),
            restarts=self._restarts,
        )

    @asynccontextmanager
    async def _job(self, start: Callable[[int], Start], capacity: int) -> AsyncGenerator[WorkerJob]:
        """A job within the block; leaving it gives the job up."""
        await self._places.acquire()
        try:
            worker = await self._live_worker()
            job = worker.start(start, capacity, self._places.release)
        except BaseException:
            self._places.release()
            raise
        try:
            yield job
        finally:
            worker.abandon(job)

    async def _live_worker(self) -> WorkerProcess:
        """The worker, started if there is none or it is dead. Raises ExecutorFailed."""
        async with self._starting:
            if self._closed:
                msg = "the executor was closed"
                raise ExecutorFailed(msg)
            if self._worker is None or not self._worker.alive:
                worker = WorkerProcess(self._store.path, threads=self._threads, max_batch=self._max_batch)
                try:
                    await self._nursery.start(worker.run)
                except OSError as error:
                    msg = f"the worker process cannot be started: {error.strerror}"
                    raise ExecutorFailed(msg) from None
                if self._worker is not None:
                    self._restarts += 1
                    self._produced_by_dead += self._worker.produced
                self._worker = worker
            return self._worker


class _ProcessGeneration(Generation):
    """One generation, with credit sent for the chunks taken."""

    def __init__(self, job: WorkerJob, input_tokens: int) -> None:
        self._job = job
        self._input_tokens = input_tokens
        self._taken = 0
        self._finished = False

    @property
    def input_tokens(self) -> int:
        return self._input_tokens

    async def __anext__(self) -> TokenChunk:
        if self._finished:
            raise StopAsyncIteration
        try:
            chunk = await self._job.next()
            if not isinstance(chunk, Chunk):
                raise _out_of_turn(chunk)
        except AciError:
            self._finished = True
            raise
        self._finished = chunk.ending is not Ending.NONE
        self._taken += 1
        if self._taken == _CREDIT_BATCH and not self._finished:
            self._job.post(Credit(self._job.number, self._taken))
            self._taken = 0
        return TokenChunk(chunk.index, chunk.tokens, chunk.text, _FINISH[chunk.ending])


def _turns(messages: Sequence[Message]) -> tuple[Turn, ...]:
    """Raises PromptTooLong when the conversation is too long to be sent to a worker."""
    size = sum(len(message.content.encode("utf-8", "replace")) for message in messages)
    if size > CONVERSATION_BYTES_MAX or len(messages) > MESSAGES_MAX:
        msg = f"a conversation of {len(messages)} messages and {size} bytes is too long"
        raise PromptTooLong(msg)
    return tuple(Turn(message.role, message.content) for message in messages)


def _packed(tokens: Sequence[int]) -> bytes:
    """Token ids as frames hold them. Raises LocalError when they do not fit there."""
    if len(tokens) > TOKENS_MAX or not all(0 <= token < 1 << 32 for token in tokens):
        msg = f"cannot compute with these {len(tokens)} token ids"
        raise LocalError(msg)
    return struct.pack(f"<{len(tokens)}I", *tokens)


def _out_of_turn(reply: object) -> ExecutorFailed:
    return ExecutorFailed(f"the worker process answered with {type(reply).__name__} out of turn")
