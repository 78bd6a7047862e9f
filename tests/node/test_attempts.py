"""Two jobs for one answer, where their ends and their first tokens meet."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from aci_p2p.attempts import Attempts, OpenJob, Patience, open_attempts
from aci_p2p.clock import MS_PER_S
from aci_p2p.consumer import JobResult, JobUpdate, RunningJob, UpdateStream
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.job import BidSeen, Chosen, Deliver
from aci_p2p.protocol.messages import BidSummary
from aci_p2p.protocol.request import JobRequest, ProviderFault
from aci_p2p.protocol.selection import Ranking
from aci_p2p.tasks import open_background
from tests.protocol.driver import REQUEST

FIRST, SECOND = KeyPair(b"1" * 32).node_id, KeyPair(b"2" * 32).node_id
TWO = replace(REQUEST, max_providers=2)
PATIENCE = Patience(hedge_after_ms=1_000, busy_wait_ms=0)


class Scripted(UpdateStream[JobUpdate]):
    """A job that does as it is told."""

    def __init__(self, provider: NodeId) -> None:
        self.job_id = provider.public_key
        self.outcome: JobResult | AciError | None = None
        self._provider = provider
        self._send, self._updates = trio.open_memory_channel[JobUpdate](16)
        summary = BidSummary(provider, bytes(32), 1, 1, 0, 0, 0, "none", "")
        for update in (BidSeen(summary), Chosen(provider, cast("Ranking", None))):
            self._send.send_nowait(update)

    @property
    def result(self) -> JobResult:
        assert self.outcome is not None
        if isinstance(self.outcome, AciError):
            raise self.outcome
        return self.outcome

    def say(self, tokens: tuple[int, ...], text: str) -> None:
        """A part of the answer."""
        self._send.send_nowait(Deliver(tokens, text))

    def end(self, outcome: str | AciError) -> None:
        """It is over."""
        nothing = cast("JobResult", None)
        if isinstance(outcome, str):
            self.outcome = JobResult(outcome, (1,), nothing, nothing, nothing, self._provider)  # type: ignore[arg-type]
        else:
            self.outcome = outcome
        self._send.close()


Script = Callable[[Scripted, trio.Nursery], Awaitable[None]]


def scripted(*scripts: tuple[NodeId, Script]) -> OpenJob:
    """The n-th job follows the n-th script; its nursery holds what ends with it."""
    left = list(scripts)

    @asynccontextmanager
    async def open_job(_request: JobRequest) -> AsyncGenerator[RunningJob]:
        provider, script = left.pop(0)
        job = Scripted(provider)

        async def serve() -> None:
            async with trio.open_nursery() as streams:
                await script(job, streams)

        async with open_background() as tasks:
            tasks.start_soon(serve)
            yield cast("RunningJob", job)

    return open_job


async def answer(attempts: Attempts) -> str:
    """What the user is shown."""
    return "".join([update.text async for update in attempts if isinstance(update, Deliver)])


def clock() -> int:
    return round(trio.current_time() * MS_PER_S)


async def test_the_error_of_the_loser_is_no_concern_of_the_winner(autojump_clock: MockClock) -> None:
    """It fails, and the other begins while it takes its leave."""

    async def first(job: Scripted, _streams: trio.Nursery) -> None:
        await trio.sleep(1.5)
        job.say((1,), "hello ")
        await trio.sleep(2)
        job.say((2,), "world")
        job.end("hello world")

    async def second(job: Scripted, streams: trio.Nursery) -> None:
        await trio.sleep(0.4)
        streams.start_soon(farewell)
        # Waits for somebody who has not answered, until it is cancelled.
        streams.start_soon(trio.sleep_forever)
        job.end(ProviderFault(SECOND, "it broke", tokens=0))

    async def farewell() -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(0.3)

    jobs = scripted((FIRST, first), (SECOND, second))
    async with open_attempts(jobs, TWO, PATIENCE, clock) as attempts:
        assert await answer(attempts) == attempts.result.text == "hello world"


async def test_text_without_a_token_is_nobody_s_answer(autojump_clock: MockClock) -> None:
    async def first(job: Scripted, _streams: trio.Nursery) -> None:
        job.say((), "Not mine. ")
        await trio.sleep_forever()

    async def second(job: Scripted, _streams: trio.Nursery) -> None:
        job.say((1,), "Paris.")
        job.end("Paris.")

    jobs = scripted((FIRST, first), (SECOND, second))
    async with open_attempts(jobs, TWO, PATIENCE, clock) as attempts:
        assert await answer(attempts) == attempts.result.text == "Paris."


async def test_what_cannot_begin_is_told_at_once(autojump_clock: MockClock) -> None:
    @asynccontextmanager
    async def open_job(request: JobRequest) -> AsyncGenerator[RunningJob]:
        await trio.lowlevel.checkpoint()
        if request == REQUEST:
            raise ProviderFault(FIRST, "no", tokens=0)
        yield cast("RunningJob", None)

    with pytest.raises(ProviderFault):
        async with open_attempts(open_job, REQUEST, PATIENCE, clock):
            pass
