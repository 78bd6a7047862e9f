"""The provider's role: bids on offers, and runs the jobs it wins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from aci_p2p.clock import MS_PER_S, Clock
from aci_p2p.database import StoreError
from aci_p2p.executor import (
    Executor,
)
from aci_p2p.gossip import Market
from aci_p2p.jobs import FAREWELL_S
from aci_p2p.network.api import Network, Stream
from aci_p2p.protocol.admission import LEASE_MS
from aci_p2p.protocol.bidding import BidBook, Declined, Offering, Won
from aci_p2p.protocol.envelope import Sealer, kind_of
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.messages import NONCE_BYTES, AbortCode, Kind
from aci_p2p.protocol.pricing import format_amount
from aci_p2p.protocol.provider import (
    ProviderJob,
    ProviderSecrets,
)
from aci_p2p.protocol.publications import Ask, CapabilityRecord
from aci_p2p.protocol.validation import MessageRefused
from aci_p2p.served_job import JobProgress, ServedJob, engine_of
from aci_p2p.settlement import Till
from aci_p2p.store import Store

AWARD_WAIT_S: Final = 5.0
"""Seconds for the award on a stream that a consumer opened."""

PROBE_S: Final = 1.0
"""Seconds between attempts to write to a disk that was full."""
LINGER_S: Final = 0.2
"""Seconds for the last frames to arrive: one way between continents, before connections close."""

log = logging.getLogger("aci_p2p.provider")


@dataclass(frozen=True, slots=True)
class ProviderStatistics:
    """A snapshot of the provider's work since it began."""

    slots: int
    """Jobs at once."""
    running: int
    """Jobs being run."""
    bids: int
    """Bids made."""
    outstanding: int
    """Of those, the ones that may still be awarded."""
    finished: int
    """Jobs that ended with an answer."""
    failed: int
    """Jobs that ended without an answer."""
    earned: int
    """What consumers have promised for all of them, base units."""
    draining: bool
    """Whether no more jobs are taken."""


class ProviderRole:
    """Serves models to the market: `bid_on_offers` answers offers, `serve` runs what was won."""

    def __init__(
        self,
        *,
        network: Network,
        market: Market,
        executor: Executor,
        store: Store,
        sealer: Sealer,
        clock: Clock,
        entropy: Callable[[int], bytes],
        offerings: Sequence[Offering],
        slots: int,
        on_change: Callable[[], None] = lambda: None,
        region: str = "",
    ) -> None:
        """`entropy(n)` gives n random bytes; `slots` jobs run at once.

        `on_change`: our `capabilities` and `asks` may differ; `region`: where we stand, if that is told.
        """
        self.region = region
        """Where we stand, in our owner's words; empty: not told."""
        self._network = network
        self._market = market
        self._executor = executor
        self._store = store
        self._sealer = sealer
        self._clock = clock
        self._entropy = entropy
        self._book = BidBook(sealer, offerings, slots)
        self._on_change = on_change
        self._till = Till(store, sealer, clock, self._promised)
        self._jobs: dict[trio.CancelScope, ServedJob] = {}
        self._idle = trio.Event()
        self._idle.set()
        self._probe_at = 0.0
        self._bids = 0
        self._finished = 0
        self._failed = 0
        self._earned = 0

    def capabilities(self) -> list[CapabilityRecord]:
        """What we announce in the DHT."""
        return [
            CapabilityRecord(
                model_root=offering.root,
                model_name=offering.name,
                context=offering.context,
                engine=engine_of(self._executor.describe(offering.name)),
                input_token_price=offering.input_token_price,
                output_token_price=offering.output_token_price,
                slots=self._book.slots,
                addresses=tuple(self._network.addresses),
                free_slots=max(self._book.slots - len(self._jobs), 0) if self._book.takes_jobs else 0,
                price_curve=offering.price_curve,
            )
            for offering in self._book.offerings
        ]

    def asks(self) -> list[Ask]:
        """What we ask now, for each model."""
        return [
            Ask(
                model_root=one.model_root,
                model_name=one.model_name,
                engine=one.engine,
                context=one.context,
                input_token_price=one.input_token_price,
                output_token_price=one.output_token_price,
                price_curve=one.price_curve,
                slots=one.slots,
                free_slots=one.free_slots,
                latency_ms=self._book.latency_ms,
                region=self.region,
                addresses=one.addresses,
            )
            for one in self.capabilities()
        ]

    def offer(self, offerings: Sequence[Offering], slots: int) -> None:
        """Serve other models, for other prices, or more or fewer jobs at once; bids that are out stay firm."""
        self._book.offer(offerings, slots)

    def statistics(self) -> ProviderStatistics:
        """A snapshot of the counters."""
        return ProviderStatistics(
            slots=self._book.slots,
            running=len(self._jobs),
            bids=self._bids,
            outstanding=len(self._book),
            finished=self._finished,
            failed=self._failed,
            earned=self._earned,
            draining=self._book.draining,
        )

    def progress(self) -> list[JobProgress]:
        """The running jobs, the oldest first."""
        return [job.progress() for job in self._jobs.values()]

    async def bid_on_offers(self) -> None:
        """Answer every offer that we can serve with a firm bid, until cancelled."""
        while True:
            offer = await self._market.next_offer()
            try:
                await self._try_to_store()
                bid = self._book.bid(offer, self._clock(), addresses=self._network.addresses)
                if bid is not None:
                    self._bids += 1
                    await self._market.publish_bid(bid)
            except AciError as error:
                log.warning("no bid", extra={"fields": {"job": offer.body.job_id.hex()[:8], "error": error}})

    async def _try_to_store(self) -> None:
        """After a job could not be stored: bid again as soon as the disk takes what we write."""
        if not self._book.is_suspended or trio.current_time() < self._probe_at:
            return
        self._probe_at = trio.current_time() + PROBE_S
        try:
            await self._store.note_key(self._clock())
        except StoreError:
            return
        self._book.is_suspended = False
        log.info("bids again", extra={"fields": {"reason": "the database can be written"}})

    async def drain(self, grace_s: float) -> None:
        """Take no more jobs, and wait until those that run have ended, `grace_s` seconds at most."""
        self._book.draining = True
        self._on_change()
        with trio.move_on_after(grace_s):
            await self._idle.wait()

    async def hand_back(self) -> None:
        """Cancel the running jobs, and wait until their consumers were told or FAREWELL_S seconds are over."""
        if not self._jobs:
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + FAREWELL_S):
            for scope in self._jobs:
                scope.cancel()
            await self._idle.wait()
            # What was sent last is still on its way when the connections close behind us.
            await trio.sleep(LINGER_S)

    async def serve(self, stream: Stream) -> None:
        """Serve one job's stream: its first frame awards one of our bids, or is an offer to be quoted for."""
        frame = b""
        with trio.move_on_after(AWARD_WAIT_S):
            frame = await stream.receive()
        try:
            if kind_of(frame) is Kind.OFFER:
                await self._quote(stream, frame)
            else:
                await self._award(stream, frame, self._book.take(frame, self._clock()))
        except MessageRefused as error:
            log.info("no award", extra={"fields": {"peer": stream.peer.short, "error": error}})

    async def _quote(self, stream: Stream, frame: bytes) -> None:
        """Answer an offer, and hold a slot until the award comes, or the lease is over."""
        quoted = self._book.quote(frame, stream.peer, self._clock(), addresses=self._network.addresses)
        if isinstance(quoted, Declined):
            await self._decline(stream, quoted)
            return
        self._bids += 1
        award, taken = b"", None
        try:
            await stream.send(quoted.bid.data)
            with trio.move_on_after(LEASE_MS / MS_PER_S):
                award = await stream.receive()
                taken = self._book.take(award, self._clock())
        finally:
            # Nothing came, or nonsense, or the award of another bid: the slot is for others.
            if not (isinstance(taken, Won) and taken.bid is quoted.bid):
                self._book.take_back(quoted)
        if taken is not None:
            await self._award(stream, award, taken)

    async def _award(self, stream: Stream, frame: bytes, taken: Won | Declined) -> None:
        """Run the job that `frame` awards, or say why not."""
        if isinstance(taken, Won):
            taken = await self._confirm(taken)
        if isinstance(taken, Declined):
            await self._decline(stream, taken)
            return
        with trio.CancelScope() as scope:
            if not self._jobs:
                self._idle = trio.Event()
            self._jobs[scope] = job = self._take(taken)
            self._on_change()
            try:
                await self._run(stream, frame, job)
            finally:
                del self._jobs[scope]
                self._book.release(taken)
                self._on_change()
                if not self._jobs:
                    self._idle.set()

    async def _confirm(self, won: Won) -> Won | Declined:
        try:
            served, _ = await self._store.served(won.offer.body.job_id)
        except StoreError:
            self._book.is_suspended = True
            return self._book.refuse(won, AbortCode.BUSY, "the provider cannot store jobs")
        except trio.Cancelled:
            self._book.release(won)
            raise
        return self._book.confirm(won, is_on_record=served is not None)

    async def _decline(self, stream: Stream, declined: Declined) -> None:
        await stream.send(self._sealer.seal(declined.answer, self._clock()).data)

    async def settle(self, stream: Stream) -> None:
        """Serve a consumer that tells what it owes us."""
        await self._till.serve(stream)

    def _promised(self, amount: int) -> None:
        self._earned += amount

    def _take(self, won: Won) -> ServedJob:
        nonce, salt, kem_seed = (self._entropy(NONCE_BYTES) for _ in range(3))
        secrets = ProviderSecrets(nonce, salt, kem_seed)
        job = ProviderJob(self._sealer, won.offer, won.bid, secrets)
        return ServedJob(job, won.offer, self._store, self._clock, self._executor, won.model)

    async def _run(self, stream: Stream, frame: bytes, job: ServedJob) -> None:
        try:
            await job.serve(stream, frame)
        finally:
            progress = job.progress()
            fields = {
                "job": progress.job_id.hex()[:8],
                "consumer": progress.consumer.short,
                "tokens": progress.tokens,
                "seconds": f"{progress.elapsed_s:.1f}",
            }
            self._earned += job.paid
            if job.error is None:
                self._finished += 1
                log.info("job done", extra={"fields": {**fields, "price": format_amount(job.price)}})
            else:
                self._failed += 1
                log.info("job failed", extra={"fields": {**fields, "error": job.error}})
        if isinstance(job.error, StoreError):
            self._book.is_suspended = True
        if job.unavailable:
            self._withdraw(job.model_root)
        if job.latency_s is not None:
            self._book.measured(round(job.latency_s * MS_PER_S))

    def _withdraw(self, root: bytes) -> None:
        """Serve a model no more, that cannot be loaded or is not what it was: every job that we won would fail."""
        offering = self._book.withdraw(root)
        if offering:
            problem = "a model is not served any more; repair it and restart the node"
            log.warning(problem, extra={"fields": {"model": offering.name}})
