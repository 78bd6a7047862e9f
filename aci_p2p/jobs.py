"""The shell of a job: performs a state machine's effects, and turns what happens into its events."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

import trio

from aci_p2p.clock import Clock, trio_deadline
from aci_p2p.network.api import NoFreeStream, Stream, StreamClosed
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.job import (
    Cancel,
    CloseStream,
    Effect,
    FrameArrived,
    Persist,
    Send,
    SetTimer,
    StreamEnded,
    TimerFired,
)
from aci_p2p.store import Store

INBOX: Final = 32
"""Events waiting for a job; a fast peer then waits for flow control."""
OUTBOX: Final = 32
"""Frames waiting to be sent; a slow consumer then slows the model down."""
FAREWELL_S: Final = 2.0
"""Seconds to send what is left when a job ends or is cancelled; a dead peer must not hold us longer."""
STALL_S: Final = 30.0
"""Seconds that a peer may leave a frame unread before it counts as gone."""

SharedEvent: TypeAlias = FrameArrived | StreamEnded | TimerFired | Cancel
"""Events that the machines of both sides know."""
E = TypeVar("E")
T = TypeVar("T")
E_contra = TypeVar("E_contra", contravariant=True)


async def send_promptly(channel: trio.MemorySendChannel[T], value: T) -> None:
    """Send into a channel without a turn of the event loop for each value, which trio's own `send` takes.

    Waits only while the channel is full, so it is no checkpoint otherwise: callers have waited for what they send.
    Raises BrokenResourceError, ClosedResourceError.
    """
    try:
        channel.send_nowait(value)
    except trio.WouldBlock:
        await channel.send(value)


class Machine(Protocol[E_contra]):
    """A job's state machine, as the shell sees it."""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        ...

    def handle(self, event: E_contra, now: int) -> list[Effect]:
        """React to an event."""
        ...


class StreamPump:
    """Moves frames between a stream and a job's queues, so that neither side has to wait for the other.

    It outlives its job's cancellation, for FAREWELL_S seconds at most, to deliver the last frames.
    """

    def __init__(self, tell: Callable[[SharedEvent, StreamPump], Awaitable[None]]) -> None:
        """`tell` hands an event to the job, with the pump it comes from."""
        self._tell = tell
        self._outbox, self._outgoing = trio.open_memory_channel[bytes](OUTBOX)
        self._scope = trio.CancelScope(shield=True)
        self._closing = False

    @property
    def closing(self) -> bool:
        """Whether the job has done with this stream, and wants to hear no more of it."""
        return self._closing

    async def send(self, frame: bytes) -> None:
        """Queue a frame. It is lost when the stream is gone, which the job learns from `StreamEnded`."""
        try:
            await send_promptly(self._outbox, frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await trio.lowlevel.checkpoint()

    def hurry(self) -> None:
        """End within FAREWELL_S seconds, whatever is sent by then."""
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + FAREWELL_S)

    def close(self) -> None:
        """Send what is queued, then end; nothing more is reported."""
        self._closing = True
        self._outbox.close()
        self.hurry()

    async def run(self, opening: AbstractAsyncContextManager[Stream]) -> None:
        """Open the stream and pump until it ends or `close` is called."""
        ended = StreamEnded("the stream ended")
        with self._scope, self._outgoing:
            try:
                async with opening as stream, trio.open_nursery() as nursery:
                    nursery.start_soon(self._receive_all, stream)
                    await self._send_all(stream)
                    nursery.cancel_scope.cancel()
            except* AciError as group:
                error = group.exceptions[0]
                ended = StreamEnded(str(error), is_crowded=isinstance(error, NoFreeStream))
        if not self._closing:
            await self._tell(ended, self)

    async def _send_all(self, stream: Stream) -> None:
        async for frame in self._outgoing:
            try:
                with trio.move_on_after(STALL_S) as scope:
                    await stream.send(frame)
            except StreamClosed:
                # What the peer said before it left is still to be heard; the job must not wait to send more meanwhile.
                self._outgoing.close()
                await trio.sleep(FAREWELL_S)
                raise
            if scope.cancelled_caught:
                msg = f"the peer read nothing for {STALL_S:g} s"
                raise StreamClosed(msg)

    async def _receive_all(self, stream: Stream) -> None:
        while True:
            await self._tell(FrameArrived(await stream.receive()), self)


class JobShell(Generic[E]):
    """Drives one machine: events in, effects out, one at a time. Subclasses perform the effects of their side."""

    def __init__(self, machine: Machine[E | SharedEvent], store: Store, clock: Clock) -> None:
        """`clock`: Unix milliseconds, as the machine's time."""
        self._machine = machine
        self._store = store
        self._clock = clock
        self._inbox, self._events = trio.open_memory_channel[tuple[E | SharedEvent, StreamPump | None]](INBOX)
        self._deadline = float("inf")
        self._pump: StreamPump | None = None
        self._leaving = False
        self._leave_by = float("inf")

    async def tell(self, event: E | SharedEvent, source: StreamPump | None = None) -> None:
        """Hand an event to the job; without effect when it is over, or has done with the stream it comes from."""
        try:
            await send_promptly(self._inbox, (event, source))
        except trio.BrokenResourceError:
            await trio.lowlevel.checkpoint()

    async def run(self, first: E | SharedEvent) -> None:
        """Handle `first`, then what happens, until the job is over. Cancelling it cancels the job properly."""
        try:
            await self._handle(first)
            while not self._machine.over:
                await self._handle(await self._next())
        except trio.Cancelled:
            with self._farewell():
                await self._handle(Cancel())
            raise
        finally:
            self._events.close()
            if self._pump:
                self._pump.close()
                # It refers to us: whatever is no cycle need not wait for the garbage collector.
                self._pump = None

    async def _next(self) -> E | SharedEvent:
        with trio.move_on_at(self._deadline):
            async for event, source in self._events:
                if source is None or not source.closing:
                    return event
        # A timer fires once, whatever the machine makes of it.
        self._deadline = float("inf")
        return TimerFired()

    async def _handle(self, event: E | SharedEvent) -> None:
        effects = deque(self._machine.handle(event, self._clock()))
        try:
            await self._perform_all(effects)
        except trio.Cancelled:
            # The machine has moved on: what it decided is carried out, or its record would fall behind its peer's.
            with self._farewell():
                await self._perform_all(effects)
            raise

    def _farewell(self) -> trio.CancelScope:
        """What a cancelled job still has to do: FAREWELL_S seconds in all, storing excepted, which comes first."""
        if not self._leaving:
            self._leaving = True
            self._leave_by = trio.current_time() + FAREWELL_S
            if self._pump:
                self._pump.hurry()
        return trio.CancelScope(shield=True)

    async def _perform_all(self, effects: deque[Effect]) -> None:
        while effects:
            effect = effects[0]
            if isinstance(effect, Persist):
                await self._persist(effects)
                continue
            match effect:
                case Send(data):
                    if self._pump:
                        await self._pump.send(data)
                case CloseStream():
                    if self._pump:
                        self._pump.close()
                case SetTimer(at):
                    self._deadline = trio_deadline(at, self._clock())
                case _:
                    with trio.move_on_at(self._leave_by):
                        await self._perform(effect)
            effects.popleft()

    async def _persist(self, effects: deque[Effect]) -> None:
        """Store the transitions at the head in one transaction, before anything behind them happens."""
        head: list[Effect] = []
        for effect in effects:
            if not isinstance(effect, Persist | SetTimer):
                break
            head.append(effect)
        stored = [effect for effect in head if isinstance(effect, Persist)]
        payments = [payment for effect in stored for payment in effect.payments]
        await self._store.put_jobs([effect.record for effect in stored], payments)
        for _ in head:
            effects.popleft()
        timers = [effect for effect in head if isinstance(effect, SetTimer)]
        effects.extendleft(timers[-1:])

    async def _perform(self, effect: Effect) -> None:
        """Perform an effect of one side only."""
        raise NotImplementedError
