"""A consumer's job in progress: performs `ConsumerJob` over the market and a stream, and streams to the user."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Final, Generic, Self, TypeAlias, TypeVar

import trio

from aci_p2p.clock import Clock
from aci_p2p.gossip import Asks, Market
from aci_p2p.jobs import JobShell, StreamPump, send_promptly
from aci_p2p.network.api import Network
from aci_p2p.protocol.consumer import ConsumerEvent, ConsumerJob, Start
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import (
    JOB_PROTOCOL,
    AskForQuotes,
    BidSeen,
    Broadcast,
    Chosen,
    Deliver,
    Effect,
    Failed,
    FailedOver,
    Finished,
    OpenStream,
    ReleaseQuotes,
)
from aci_p2p.protocol.lifecycle import State
from aci_p2p.protocol.messages import MAX_TOKENS, Bid, Offer, Proof, Receipt
from aci_p2p.protocol.proof import ProofFile
from aci_p2p.protocol.request import JobCancelled
from aci_p2p.protocol.round import BidArrived
from aci_p2p.quotes import Quotes
from aci_p2p.store import Store
from aci_p2p.tasks import open_background

UPDATES: Final = 2 * MAX_TOKENS
"""Updates waiting for the user: all of the longest answer, so that one who reads slowly makes no job late."""

U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Offered:
    """The offer is made, to those whose prices are known, or to everybody."""

    offer: Envelope[Offer]
    """What is offered."""


JobUpdate: TypeAlias = Offered | BidSeen | Chosen | FailedOver | Deliver
"""What a user sees of a running job."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """A finished job."""

    text: str
    """The answer."""
    tokens: tuple[int, ...]
    """Its token ids."""
    file: ProofFile
    """The proof, of the part of the provider that ended the answer."""
    proof: Envelope[Proof]
    """The provider's signed statement."""
    receipt: Envelope[Receipt]
    """Our signed receipt."""
    provider: NodeId
    """Who ended the answer."""


@dataclass(frozen=True, slots=True)
class Services:
    """What a job of ours needs of its node."""

    network: Network
    """Streams to providers."""
    market: Market
    """Offers and bids for everybody."""
    asks: Asks
    """Whom to ask for a quote."""
    store: Store
    """Where it is kept."""
    clock: Clock
    """Unix milliseconds."""
    random: Random
    """Spreads jobs over providers."""


class UpdateStream(ABC, Generic[U]):
    """The way to a result: iterate over it for its updates, then read `result`."""

    _updates: trio.MemoryReceiveChannel[U]
    """Ends with the job."""

    @property
    @abstractmethod
    def result(self) -> JobResult:
        """The finished job. Raises the AciError that ended it otherwise."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> U:
        """The next update, until the job has ended. Raises the AciError that ended it, if one did."""
        try:
            return await self._updates.receive()
        except trio.EndOfChannel:
            _ = self.result
            raise StopAsyncIteration from None


class RunningJob(JobShell[ConsumerEvent], UpdateStream[JobUpdate]):
    """One job of ours. Made by `open_job`."""

    def __init__(self, job: ConsumerJob, services: Services) -> None:
        super().__init__(job, services.store, services.clock)
        self._job = job
        self._network = services.network
        self._market = services.market
        self._asks = services.asks
        self._quotes = Quotes(services.network, services.asks, services.clock, services.random)
        self._updates_in, self._updates = trio.open_memory_channel[JobUpdate](UPDATES)
        self._outcome: JobResult | AciError = JobCancelled("the job did not run to its end")
        self._streams: trio.Nursery | None = None

    @property
    def job_id(self) -> bytes:
        """32 bytes."""
        return self._job.job_id

    @property
    def result(self) -> JobResult:
        if isinstance(self._outcome, AciError):
            raise self._outcome
        return self._outcome

    async def serve(self) -> None:
        """Run the job to its end. Its streams may end a little later than the job itself."""
        with self._updates_in, self._market.bids(self.job_id) as bids:
            async with trio.open_nursery() as streams:
                self._streams = streams
                async with open_background() as tasks:
                    tasks.start_soon(self._collect, bids)
                    try:
                        await self.run(Start())
                    except AciError as error:
                        self._outcome = error
                    finally:
                        self._quotes.release(unheard=True)
                # The user has everything; farewells need not be waited for.
                self._updates_in.close()

    async def _collect(self, bids: trio.MemoryReceiveChannel[Envelope[Bid]]) -> None:
        async for bid in bids:
            await self.tell(BidArrived(bid))

    async def _perform(self, effect: Effect) -> None:
        match effect:
            case Broadcast(offer):
                await self._asks.join(offer.body.model_root)
                await self._market.publish_offer(offer)
            case AskForQuotes(offer, exclude):
                await self._update(Offered(offer))
                assert self._streams is not None  # set before the first event
                self._streams.start_soon(self._quotes.ask, offer, exclude, self.tell)
            case ReleaseQuotes():
                self._quotes.release(unheard=self._job.state is not State.OFFERED)
            case OpenStream(provider, addresses):
                self._pump = StreamPump(self.tell)
                if not self._quotes.award(provider, self._pump):
                    self._network.learn_addresses(provider, addresses)
                    assert self._streams is not None  # set before the first event
                    stream = self._network.open_stream(provider, JOB_PROTOCOL, eager=True)
                    self._streams.start_soon(self._pump.run, stream)
            case BidSeen(bid):
                self._quotes.weighed(bid.provider)
                await self._update(effect)
            case Chosen() | FailedOver() | Deliver():
                await self._update(effect)
            case Finished():
                file, proof, receipt = self._job.proof_file(), self._job.proof, self._job.receipt
                self._outcome = JobResult(self._job.text, self._job.tokens, file, proof, receipt, proof.sender)
            case Failed(error):
                self._outcome = error
            case _:
                msg = f"a consumer's job has no {type(effect).__name__}"
                raise AssertionError(msg)

    async def _update(self, update: JobUpdate) -> None:
        # A user who leaves reads no more, and must not hold up the farewell.
        if not self._leaving:
            await send_promptly(self._updates_in, update)


@asynccontextmanager
async def open_job(job: ConsumerJob, services: Services) -> AsyncGenerator[RunningJob]:
    """Run a job within the block; leaving early cancels it, and its provider is told."""
    running = RunningJob(job, services)
    async with open_background() as nursery:
        nursery.start_soon(running.serve)
        yield running
