"""Settling what jobs cost: the consumer tells its providers until they hold it, the provider stores what it is told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Final

import trio

from aci_p2p.clock import MS_PER_S, Clock
from aci_p2p.network.api import Network, Stream
from aci_p2p.protocol.envelope import Sealer
from aci_p2p.protocol.errors import AciError, ResourceError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import Payment
from aci_p2p.protocol.settlement import (
    SETTLE_PROTOCOL,
    acknowledged,
    acknowledgement,
    read_statement,
    settle,
)
from aci_p2p.store import Store
from aci_p2p.tasks import open_background

ANSWER_S: Final = 10.0
"""Seconds for a provider to answer all that is told over one stream, a dial included."""
FIRST_RETRY_S: Final = 1.0
"""Seconds until a provider that did not answer is tried again; doubled each time."""
LAST_RETRY_S: Final = 600.0
"""Most seconds between two tries."""
SETTLE_FOR_MS: Final = 24 * 3_600 * MS_PER_S
"""A provider that has not come back within a day is owed no more calls; it holds its last voucher."""
AT_ONCE: Final = 8
"""Providers that are told at once."""
STREAM_PAYMENTS: Final = 32
"""Payments that are told over one stream, and noted in one transaction: so many answers fit into ANSWER_S where a round
trip takes 300 ms."""
FLUSH_S: Final = 2.0
"""Seconds that a node which stops gives to what is not settled."""

log = logging.getLogger("aci_p2p.settlement")


class Settler:
    """Tells providers what they are owed. `run` it; `wake` it when a job has ended."""

    def __init__(self, network: Network, store: Store, sealer: Sealer, clock: Clock) -> None:
        self._network = network
        self._store = store
        self._sealer = sealer
        self._clock = clock
        self._woken = trio.Event()
        self._retries: dict[NodeId, tuple[float, float]] = {}
        self._rest = trio.Event()

    def wake(self) -> None:
        """Something may be owed."""
        self._rest = trio.Event()
        self._woken.set()

    async def run(self) -> None:
        """Settle until cancelled."""
        async with open_background() as tasks:
            tasks.start_soon(self._watch)
            while True:
                self._woken = trio.Event()
                await self._round()
                if not self._woken.is_set():
                    self._rest.set()
                with trio.move_on_at(min((at for at, _ in self._retries.values()), default=float("inf"))):
                    await self._woken.wait()

    async def _watch(self) -> None:
        """Try a provider anew as soon as it is connected again."""
        seen: frozenset[NodeId] = frozenset()
        while True:
            peers = frozenset(self._network.peers)
            for provider in self._retries.keys() & (peers - seen):
                del self._retries[provider]
                self._woken.set()
            seen = peers
            await self._network.changed()

    async def flush(self) -> None:
        """Wait until what is owed was told to whoever can be reached, FLUSH_S seconds at most."""
        with trio.move_on_after(FLUSH_S, shield=True):
            await self._rest.wait()

    async def _round(self) -> None:
        """Tell every provider whose time has come."""
        try:
            owed = await self._store.owed(self._clock() - SETTLE_FOR_MS)
        except AciError as error:
            log.warning("what is owed cannot be read: %s", error)
            return
        owed.sort(key=lambda payment: payment.peer.public_key)
        by_provider = {provider: list(payments) for provider, payments in groupby(owed, lambda payment: payment.peer)}
        for provider in self._retries.keys() - by_provider.keys():
            del self._retries[provider]
        limit = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for provider, payments in by_provider.items():
                if self._retries.get(provider, (0.0, 0.0))[0] <= trio.current_time():
                    nursery.start_soon(self._tell, limit, provider, payments)

    async def _tell(self, limit: trio.CapacityLimiter, provider: NodeId, payments: Sequence[Payment]) -> None:
        """Tell one provider everything; what it does not take must not hold up the rest."""
        failed, rest = False, payments
        async with limit:
            while rest:
                settled, error = await self._settle(provider, rest[:STREAM_PAYMENTS])
                rest = rest[settled:]
                if error is not None:
                    failed = True
                    job = rest[0].job_id.hex()[:8] if rest else ""
                    log.info("not settled", extra={"fields": {"peer": provider.short, "job": job, "error": error}})
                    rest = rest[1:]
                if isinstance(error, ResourceError | trio.TooSlowError):
                    # It is not there.
                    break
        if not failed:
            self._retries.pop(provider, None)
            return
        _, last = self._retries.get(provider, (0.0, 0.0))
        delay = min(2 * last, LAST_RETRY_S) or FIRST_RETRY_S
        self._retries[provider] = trio.current_time() + delay, delay

    async def _settle(self, provider: NodeId, payments: Sequence[Payment]) -> tuple[int, Exception | None]:
        """Tell payments over one stream; how many of them are settled and noted so, and why not the next."""
        settled: list[Payment] = []
        failure: Exception | None = None
        try:
            with trio.fail_after(ANSWER_S):
                async with self._network.open_stream(provider, SETTLE_PROTOCOL, eager=True) as stream:
                    for payment in payments:
                        await stream.send(payment.statement)
                        answer = await stream.receive()
                        now = self._clock()
                        settled.append(acknowledged(payment, answer, network=self._sealer.network, now=now))
        except* (AciError, trio.TooSlowError) as group:
            failure = group.exceptions[0]
        if settled:
            try:
                await self._store.put_jobs((), settled)
            except AciError as error:
                return 0, error
        return len(settled), failure


class Till:
    """Takes what consumers promise for jobs whose streams have ended."""

    def __init__(self, store: Store, sealer: Sealer, clock: Clock, taken: Callable[[int], None]) -> None:
        """`taken(amount)` hears of each promise by how much it is more, base units."""
        self._store = store
        self._sealer = sealer
        self._clock = clock
        self._taken = taken
        self._lock = trio.Lock()

    async def serve(self, stream: Stream) -> None:
        """Serve one consumer's stream, until it closes it or says what we do not take."""
        while True:
            frame = await stream.receive()
            try:
                answer = await self._take(frame)
            except AciError as error:
                log.info("not settled", extra={"fields": {"peer": stream.peer.short, "error": error}})
                return
            await stream.send(answer)

    async def _take(self, frame: bytes) -> bytes:
        now, network = self._clock(), self._sealer.network
        statement = read_statement(frame, self._sealer.node_id, network=network)
        # One at a time: what is stored depends on what is held.
        async with self._lock:
            job, held = await self._store.served(statement.job_id)
            change = settle(statement, job, held, now)
            if change is not None:
                records, payment = change
                await self._store.put_jobs(records, (payment,))
                self._taken(payment.amount - (held.amount if held else 0))
                held = payment
        return self._sealer.seal(acknowledgement(statement, held), now).data
