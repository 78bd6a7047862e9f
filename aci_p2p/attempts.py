"""The jobs behind one answer: usually one; another where all providers were busy, or where the first token is late.

Hedged requests (Dean and Barroso, The Tail at Scale, 2013): when no token has come some time after the award, another
provider is asked for the same answer, and the one that begins first goes on. Each of the two is a whole job, with its
own offer and record. One that lost before its first token owes nothing, and both together never cost more than one may.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import trio

from aci_p2p.clock import MS_PER_S, Clock
from aci_p2p.consumer import UPDATES, JobResult, JobUpdate, RunningJob, UpdateStream
from aci_p2p.jobs import send_promptly
from aci_p2p.protocol.admission import MAX_WAIT_MS, RETRY_MS
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import BidSeen, Chosen, Deliver, FailedOver
from aci_p2p.protocol.request import JobCancelled, JobRequest, NoBids
from aci_p2p.tasks import open_background


@dataclass(frozen=True, slots=True)
class Hedged:
    """The first token is late; another provider is asked too."""

    provider: NodeId
    """Who is late."""
    waited_ms: int
    """Since its award, milliseconds."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nobody took the job, at least one provider for want of a slot; all are asked again."""

    wait_ms: int
    """Until then, milliseconds: as a provider said, but 1, 2, 4 and then 5 seconds at least."""
    problem: str
    """Why nobody took it."""


Update: TypeAlias = JobUpdate | Hedged | Waiting
"""What a user sees on the way to an answer."""
OpenJob: TypeAlias = Callable[[JobRequest], AbstractAsyncContextManager[RunningJob]]
"""Offers a job, and runs it within the block."""


@dataclass(frozen=True, slots=True)
class Patience:
    """When another job is begun for the same answer."""

    hedge_after_ms: int
    """When no token has come so long after the award, milliseconds; 0: never."""
    busy_wait_ms: int
    """How long after the beginning another try may begin, milliseconds."""


class _Attempt:
    """One of the jobs."""

    def __init__(self, request: JobRequest) -> None:
        self.request = request
        self.scope = trio.CancelScope()
        self.job: RunningJob | None = None
        self.outcome: JobResult | AciError | None = None
        self.provider: NodeId | None = None
        self._failed: set[NodeId] = set()
        self._worst: dict[NodeId, int] = {}

    def hedged(self) -> JobRequest | None:
        """What another job may do while the provider stays: what is left of the price and of the providers.

        None when nothing is.
        """
        assert self.provider is not None  # callers come after the choice
        price = self.request.max_price - self._worst[self.provider]
        providers = self.request.max_providers - len(self._failed) - 1
        if price <= 0 or providers <= 0:
            return None
        avoid = self.request.avoid | self._failed | {self.provider}
        return replace(self.request, avoid=avoid, max_price=price, max_providers=providers)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.outcome is not None or self.scope.cancel_called

    def note(self, update: JobUpdate) -> bool:
        """Remember what it says; whether the job has left the provider that it had."""
        match update:
            case BidSeen(bid):
                self._worst[bid.provider] = bid.worst_price
            case Chosen(provider):
                before, self.provider = self.provider, provider
                return before is not None
            case FailedOver(provider):
                self._failed.add(provider)
                return True
            case _:
                pass
        return False


class Attempts(UpdateStream[Update]):
    """The way to one answer. Made by `open_attempts`."""

    def __init__(
        self, open_job: OpenJob, request: JobRequest, patience: Patience, clock: Clock, tasks: trio.Nursery
    ) -> None:
        self._open_job = open_job
        self._patience = patience
        self._clock = clock
        self._tasks = tasks
        self._attempts = [_Attempt(request)]
        self._leader: _Attempt | None = None
        self._begun = False
        self._pause_ms = RETRY_MS
        self._wait_until = clock() + patience.busy_wait_ms
        self._updates_in, self._updates = trio.open_memory_channel[Update](UPDATES)

    async def begin(self) -> None:
        """Start the first job. Raises the AciError that it cannot begin with."""
        await self._tasks.start(self._pursue)

    @property
    def job_id(self) -> bytes:
        """32 bytes: of the job that has begun to answer; until then of the latest that is no hedge."""
        job = (self._leader or self._attempts[0]).job
        assert job is not None  # it has begun
        return job.job_id

    @property
    def result(self) -> JobResult:
        """The finished job. Raises the AciError that ended it otherwise; of a hedge only if the first has none."""
        attempts = [self._leader] if self._leader else self._attempts
        for attempt in attempts:
            if isinstance(attempt.outcome, AciError):
                raise attempt.outcome
            if attempt.outcome is not None:
                return attempt.outcome
        msg = "the job did not run to its end"
        raise JobCancelled(msg)

    async def _pursue(self, task_status: trio.TaskStatus[None]) -> None:
        """Run the first job, and anew as long as all are busy and there is time."""
        await self._run(self._attempts[0], task_status)
        while (wait_ms := self._wait_ms()) is not None:
            first = self._attempts[0]
            self._pause_ms = min(2 * self._pause_ms, MAX_WAIT_MS)
            await self._updates_in.send(Waiting(wait_ms, str(first.outcome)))
            await trio.sleep(wait_ms / MS_PER_S)
            self._attempts = [_Attempt(first.request)]
            await self._run(self._attempts[0])
        self._close_if_over()

    def _wait_ms(self) -> int | None:
        """How long to wait for a free slot now; None: it is of no use, or too long."""
        first, now = self._attempts[0], self._clock()
        if len(self._attempts) > 1 or not isinstance(first.outcome, NoBids) or first.outcome.retry_at is None:
            return None
        wait_ms = max(first.outcome.retry_at - now, self._pause_ms)
        return wait_ms if now + wait_ms < self._wait_until else None

    async def _run(self, attempt: _Attempt, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with attempt.scope:
            try:
                async with self._open_job(attempt.request) as attempt.job:
                    self._begun = True
                    task_status.started()
                    await self._follow(attempt, attempt.job)
            except AciError as error:
                if not self._begun:
                    raise
                attempt.outcome = attempt.outcome or error

    async def _follow(self, attempt: _Attempt, job: RunningJob) -> None:
        """Hear the job to its end. Its error stays here: on its way out it would meet what ends with the job."""
        try:
            async for update in job:
                await self._take(attempt, update)
            attempt.outcome = job.result
        except AciError as error:
            attempt.outcome = error
        else:
            # The user has everything; farewells need not be waited for.
            self._close_if_over()

    async def _take(self, attempt: _Attempt, update: JobUpdate) -> None:
        if self._leader is None:
            has_left = attempt.note(update)
            if isinstance(update, Deliver) and update.tokens:
                self._leader = attempt
                for other in self._attempts:
                    if other is not attempt:
                        other.scope.cancel()
            elif isinstance(update, Deliver):
                # Text without a token makes no answer.
                return
            elif has_left and attempt is self._attempts[0] and not all(other.is_over for other in self._attempts[1:]):
                # The other one takes its place already; a third would not be covered by the price.
                attempt.scope.cancel()
            elif isinstance(update, Chosen) and len(self._attempts) == 1 and self._patience.hedge_after_ms:
                self._tasks.start_soon(self._hedge, attempt, update.provider)
        if self._leader in (None, attempt):
            await send_promptly(self._updates_in, update)

    async def _hedge(self, first: _Attempt, provider: NodeId) -> None:
        """Ask another, when the first token has not come in time."""
        await trio.sleep(self._patience.hedge_after_ms / MS_PER_S)
        is_late = self._leader is None and not first.is_over and first.provider == provider
        if not is_late or len(self._attempts) > 1 or (request := first.hedged()) is None:
            return
        second = _Attempt(request)
        self._attempts.append(second)
        await self._updates_in.send(Hedged(provider, self._patience.hedge_after_ms))
        await self._run(second)
        self._close_if_over()

    def _close_if_over(self) -> None:
        attempts = [self._leader] if self._leader else self._attempts
        if all(attempt.is_over for attempt in attempts) and self._wait_ms() is None:
            self._updates_in.close()


@asynccontextmanager
async def open_attempts(
    open_job: OpenJob, request: JobRequest, patience: Patience, clock: Clock
) -> AsyncGenerator[Attempts]:
    """Run a job within the block, and others where `patience` says so; `clock` gives Unix milliseconds.

    Leaving early cancels them, and their providers are told. Raises the AciError that the job cannot begin with.
    """
    async with open_background() as tasks:
        attempts = Attempts(open_job, request, patience, clock, tasks)
        await attempts.begin()
        yield attempts
