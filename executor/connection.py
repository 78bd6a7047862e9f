"""The node's end of one worker process: its life, its jobs and the pipes between (frames.py)."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from aci_p2p.executor.api import ExecutorFailed, ModelUnavailable, PromptTooLong, TemplateRefused, WeightsMismatch
from aci_p2p.executor.frames import (
    Accepted,
    Begun,
    Cancel,
    Chunk,
    Encoded,
    Ended,
    Failed,
    FrameReader,
    Loaded,
    Logits,
    Reply,
    Request,
    Start,
    encode_frame,
)
from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.protocol.text import printable
from aci_p2p.protocol.wire import Malformed

NICENESS: Final = 10
"""Scheduling priority of the worker: the node's event loop goes first."""
STDERR_BYTES: Final = 4096
"""Of what the worker wrote to standard error, for the message about its death."""
EXIT_S: Final = 0.5
"""Seconds that a worker has to end after its input did; it takes about 10 ms."""

_BOOT = f"import os; os.nice({NICENESS}); from aci_p2p.executor import worker; worker.main()"
"""The priority is set before anything starts threads, which inherit it."""
_THREAD_COUNTS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""Read by BLAS libraries when they are loaded: 1, as the worker shares products among threads itself (parallel.py)."""
_ERRORS: Final[dict[str, type[AciError]]] = {
    kind.code: kind for kind in (ModelUnavailable, PromptTooLong, TemplateRefused, ExecutorFailed, LocalError)
}
"""What a failed job raises, by code; another code is the worker's own fault."""


@dataclass(slots=True, eq=False)
class WorkerJob:
    """A job that the worker has, from its request to its end."""

    number: int
    """Unique with this worker."""
    model: str
    """Name of the model."""
    replies: trio.MemoryReceiveChannel[Reply]
    """What the worker answered and nobody took yet."""
    arrivals: trio.MemorySendChannel[Reply]
    """The other end."""
    post: Callable[[Request], None]
    """Sends a request about the job."""
    on_end: Callable[[], None]
    """Called once, when the worker has ended the job or died."""
    accepted: bool = False
    """A generation that will run."""
    begun: bool = False
    """A generation that is being computed."""
    abandoned: bool = False
    """Nobody takes replies any more."""
    ended: bool = False
    """The worker does not have it any more."""
    death: ExecutorFailed | None = None
    """Why the worker died, when it did before the job ended."""

    async def next(self) -> Reply:
        """The next reply. Raises what made the job fail, ExecutorFailed when the worker died."""
        try:
            reply = await self.replies.receive()
        except trio.EndOfChannel:
            assert self.death is not None
            raise self.death from None
        if isinstance(reply, Failed):
            raise _error(self.model, reply)
        return reply


class WorkerProcess:
    """One worker. `run` it in a nursery; it is `alive` until it dies, however that comes."""

    def __init__(self, store: Path, *, threads: int, max_batch: int) -> None:
        """`store` is the model store's path; `threads` compute, at most `max_batch` generations in one step."""
        self.alive = True
        self.jobs: dict[int, WorkerJob] = {}
        self.produced = 0
        self.process: trio.Process | None = None
        self._arguments = [str(store), str(threads), str(max_batch)]
        self._environment = {**os.environ, **dict.fromkeys(_THREAD_COUNTS, "1")}
        self._next = 0
        # Unbounded, as giving up a job must not wait. A job posts its request, one cancellation, and credit only for
        # chunks that arrived; the number of jobs is bounded.
        self._outbox, self._outgoing = trio.open_memory_channel[bytes](math.inf)
        self._errors = bytearray()
        self._garbage = ""

    def start(self, request: Callable[[int], Start], capacity: int, on_end: Callable[[], None]) -> WorkerJob:
        """Begin a job: `request` makes its request from its number; `capacity` is the most replies it may have waiting.

        Raises LocalError when a field of the request is out of bounds, ExecutorFailed when the worker is dead.
        """
        if not self.alive:
            msg = "the worker process died as soon as it was started"
            raise ExecutorFailed(msg, hint="try again")
        number = self._next
        message = request(number)
        frame = encode_frame(message)
        self._next += 1
        arrivals, replies = trio.open_memory_channel[Reply](capacity)
        job = self.jobs[number] = WorkerJob(number, message.model, replies, arrivals, self._post, on_end)
        self._outbox.send_nowait(frame)
        return job

    def abandon(self, job: WorkerJob) -> None:
        """Take no more replies of a job, and cancel it unless it is over."""
        job.abandoned = True
        job.replies.close()
        if not job.ended:
            self._post(Cancel(job.number))

    def _post(self, request: Request) -> None:
        """Without effect when the worker is dead."""
        if self.alive:
            self._outbox.send_nowait(encode_frame(request))

    async def run(self, *, task_status: trio.TaskStatus[WorkerProcess]) -> None:
        """Start the process and serve it until it dies or this is cancelled. Raises OSError when it cannot start."""
        command = [sys.executable, "-P", "-c", _BOOT, *self._arguments]
        pipe = subprocess.PIPE
        process = self.process = await trio.lowlevel.open_process(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=self._environment,
            # Its own session: Ctrl-C and a closed terminal reach the node only.
            start_new_session=True,
        )
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._collect_errors, process)
                task_status.started(self)
                async with trio.open_nursery() as pumps:
                    pumps.start_soon(self._write, process)
                    await self._read(process)
                    pumps.cancel_scope.cancel()
                self.alive = False
                await _end(process)
                # Its standard error ends with it, unless a child of it still holds that.
                nursery.cancel_scope.deadline = trio.current_time() + EXIT_S
        finally:
            closed, self.alive = self.alive, False
            with trio.CancelScope(shield=True):
                await _end(process)
                for stream in (process.stdout, process.stderr):
                    if stream is not None:
                        await stream.aclose()
            self._bury(ExecutorFailed("the executor was closed") if closed else self._cause_of_death(process))

    async def _write(self, process: trio.Process) -> None:
        assert process.stdin is not None
        with suppress(trio.BrokenResourceError):
            async for frame in self._outgoing:
                await process.stdin.send_all(frame)

    async def _read(self, process: trio.Process) -> None:
        """Deliver replies until there are no more, or what comes makes no sense."""
        assert process.stdout is not None
        frames = FrameReader()
        try:
            async for data in process.stdout:
                for reply in frames.feed(bytes(data)):
                    self._deliver(reply)
        except AciError as error:
            self._garbage = error.message
        except trio.BrokenResourceError:
            pass

    def _deliver(self, reply: Reply | Request) -> None:
        """Give a reply to its job. Raises Malformed when it has no business there."""
        job = self.jobs.get(reply.job)
        if job is None:
            msg = f"a reply to job {reply.job}, which is over"
            raise Malformed(msg)
        match reply:
            case Begun():
                job.begun = True
                return
            case Accepted():
                job.accepted = True
            case Chunk():
                self.produced += len(reply.tokens)
            case Ended() | Failed():
                del self.jobs[reply.job]
                job.ended = True
                job.on_end()
            case Loaded() | Encoded() | Logits():
                pass
            case _:
                msg = "a request where a reply belongs"
                raise Malformed(msg)
        if job.abandoned:
            return
        try:
            job.arrivals.send_nowait(reply)
        except trio.WouldBlock:
            msg = f"more replies to job {reply.job} than asked for"
            raise Malformed(msg) from None

    async def _collect_errors(self, process: trio.Process) -> None:
        assert process.stderr is not None
        with suppress(trio.BrokenResourceError):
            async for data in process.stderr:
                self._errors += data
                del self._errors[:-STDERR_BYTES]

    def _bury(self, death: ExecutorFailed) -> None:
        """Fail the jobs that a dead worker had."""
        jobs = list(self.jobs.values())
        self.jobs.clear()
        for job in jobs:
            job.ended = True
            job.death = death
            job.arrivals.close()
            job.on_end()

    def _cause_of_death(self, process: trio.Process) -> ExecutorFailed:
        if self._garbage:
            return ExecutorFailed(f"the worker process sent nonsense: {self._garbage}")
        code = process.returncode or 0
        names = {signum.value: signum.name for signum in signal.Signals}
        how = f"ended with status {code}" if code >= 0 else f"was killed by {names.get(-code, -code)}"
        lines = self._errors.decode("utf-8", "replace").split("\n")
        last = next((line for line in map(printable, reversed(lines)) if line), "")[:200]
        out_of_memory = "the system does that when memory runs out: try again, or use a smaller model"
        hint = out_of_memory if code == -signal.SIGKILL else "try again"
        return ExecutorFailed(f"the worker process {how}{': ' if last else ''}{last}", hint=hint)


async def _end(process: trio.Process) -> None:
    """End a process that may still run: by the end of its input, else by force."""
    assert process.stdin is not None
    await process.stdin.aclose()
    with trio.move_on_after(EXIT_S):
        await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()


def _error(model: str, reply: Failed) -> AciError:
    """The error that a worker reported."""
    if reply.code == WeightsMismatch.code and len(reply.roots) == 2:  # noqa: PLR2004 - expected and actual
        return WeightsMismatch(model, *reply.roots)
    return _ERRORS.get(reply.code, ExecutorFailed)(reply.message, hint=reply.hint)
