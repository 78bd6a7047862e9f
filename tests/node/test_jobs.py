"""The shell of a job: the order of effects, back-pressure, dead peers and cancellation, with a machine made for it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Final

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints

from aci_p2p.clock import virtual_clock
from aci_p2p.database import StoreError
from aci_p2p.jobs import FAREWELL_S, INBOX, OUTBOX, STALL_S, JobShell, SharedEvent, StreamPump
from aci_p2p.network.api import PeerUnreachable, Stream
from aci_p2p.network.memory_stream import MemoryStream, Pipe
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.job import (
    Cancel,
    CloseStream,
    Deliver,
    Effect,
    FrameArrived,
    JobRecord,
    Payment,
    Persist,
    Send,
    SetTimer,
    StreamEnded,
    TimerFired,
)
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.store import Store

US: Final = KeyPair(bytes([1]) * 32).node_id
PEER: Final = KeyPair(bytes([2]) * 32).node_id
END: Final = "end"
"""The event after which the machine of these tests is over."""
NEVER: Final = float("inf")
"""Pace of a peer that reads nothing."""


class Script:
    """A machine that does what its test says at each event, and notes what it hears."""

    def __init__(self, effects: Mapping[object, Sequence[Effect]]) -> None:
        """`effects` by event."""
        self.effects = effects
        self.heard: list[object] = []
        self.times: list[int] = []
        self.over = False

    def handle(self, event: str | SharedEvent, now: int) -> list[Effect]:
        if self.over:
            return []
        self.heard.append(event)
        self.times.append(now)
        self.over = event in (END, Cancel())
        return list(self.effects.get(event, []))


class Log(Store):
    """A store that only notes what is stored; the rest of a test notes here what else happens."""

    def __init__(self) -> None:
        self.entries: list[object] = []
        self.before_commit: Callable[[], None] = lambda: None

    async def put_jobs(self, records: Sequence[JobRecord], payments: Sequence[Payment] = ()) -> None:
        await trio.lowlevel.checkpoint()
        self.before_commit()
        self.entries.append([record.state for record in records])


class Pump(StreamPump):
    """A pump that notes the frames it has taken."""

    def __init__(self, tell: Callable[[SharedEvent, StreamPump], Awaitable[None]], log: Log) -> None:
        super().__init__(tell)
        self.log = log

    async def send(self, frame: bytes) -> None:
        await super().send(frame)
        self.log.entries.append(frame)


class Shell(JobShell[str]):
    """A shell that notes its own effects; each takes `pace` seconds."""

    def __init__(self, effects: Mapping[object, Sequence[Effect]], *, pace: float = 0) -> None:
        self.script = Script(effects)
        self.log = Log()
        self.pace = pace
        super().__init__(self.script, self.log, virtual_clock)

    async def _perform(self, effect: Effect) -> None:
        assert isinstance(effect, Deliver)
        if effect.text == "fail":
            msg = "no such effect"
            raise LocalError(msg)
        if self.pace:
            await trio.sleep(self.pace)
        self.log.entries.append(effect.text)

    def attach(self, nursery: trio.Nursery, opening: AbstractAsyncContextManager[Stream]) -> Pump:
        """Give it a stream."""
        self._pump = pump = Pump(self.tell, self.log)
        nursery.start_soon(pump.run, opening)
        return pump


class PacedStream(Stream):
    """A stream whose peer takes `pace` seconds to read a frame, and sends nothing."""

    def __init__(self, pace: float) -> None:
        self.pace = pace
        self.read: list[bytes] = []

    @property
    def peer(self) -> NodeId:
        return PEER

    async def send(self, frame: bytes) -> None:
        await trio.sleep(self.pace)
        self.read.append(frame)

    async def receive(self) -> bytes:
        await trio.sleep_forever()
        raise AssertionError


def connected() -> tuple[MemoryStream, MemoryStream]:
    """Our end and the peer's end of a stream."""
    there, back = Pipe(), Pipe()
    return MemoryStream(PEER, back, there), MemoryStream(US, there, back)


@asynccontextmanager
async def dialling(seconds: float) -> AsyncGenerator[Stream]:
    """A stream that nobody answers within `seconds`."""
    with trio.move_on_after(seconds):
        await trio.sleep_forever()
    if seconds:
        msg = "nobody answers"
        raise PeerUnreachable(msg)
    yield PacedStream(0)


def persist(state: State) -> Persist:
    return Persist(JobRecord(bytes(32), Party.CONSUMER, state, 0, bytes(32), PEER, 0, Party.NOBODY, "", b"", b""))


def note(text: str) -> Deliver:
    return Deliver((), text)


# The order of effects.


async def test_transitions_are_stored_before_what_follows_and_together(autojump_clock: MockClock) -> None:
    shell = Shell(
        {
            END: [
                note("first"),
                persist(State.AWARDED),
                SetTimer(1),
                persist(State.ACCEPTED),
                Send(b"accept"),
                persist(State.COMMITTED),
                Send(b"commit"),
                Send(b"more"),
                persist(State.REVEALED),
            ]
        }
    )
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, nullcontext(PacedStream(0)))
        await shell.run(END)
    assert shell.log.entries == [
        "first", [State.AWARDED, State.ACCEPTED], b"accept", [State.COMMITTED], b"commit", b"more", [State.REVEALED],
    ]  # fmt: skip


async def test_what_could_not_be_stored_is_not_sent(autojump_clock: MockClock) -> None:
    shell = Shell({"go": [persist(State.COMMITTED), Send(b"commit")]})
    error = StoreError("the disk is full")

    def fail() -> None:
        raise error

    shell.log.before_commit = fail
    stream = PacedStream(0)
    async with trio.open_nursery() as nursery:
        pump = shell.attach(nursery, nullcontext(stream))
        with pytest.raises(StoreError) as caught:
            await shell.run("go")
        assert caught.value is error
        assert pump.closing
    assert (shell.log.entries, stream.read) == ([], [])


async def test_without_a_stream_nothing_is_sent(autojump_clock: MockClock) -> None:
    shell = Shell({END: [Send(b"lost"), CloseStream(), note("last")]})
    await shell.run(END)
    assert shell.log.entries == ["last"]


async def test_an_effect_that_fails_ends_the_job(autojump_clock: MockClock) -> None:
    shell = Shell({"go": [note("fail"), note("behind")]})
    async with trio.open_nursery() as nursery:
        pump = shell.attach(nursery, nullcontext(PacedStream(0)))
        with pytest.raises(LocalError, match="no such effect"):
            await shell.run("go")
        assert pump.closing
    assert shell.log.entries == []


# Timers.


async def test_a_timer_fires_at_its_time_and_once(autojump_clock: MockClock) -> None:
    shell = Shell({"go": [SetTimer(3_000)], TimerFired(): [note("fired")]})
    with trio.move_on_after(100):
        await shell.run("go")
    assert shell.script.heard == ["go", TimerFired(), Cancel()]
    assert shell.script.times == [0, 3_000, 100_000]


async def test_of_the_timers_between_transitions_the_last_counts(autojump_clock: MockClock) -> None:
    shell = Shell({"go": [persist(State.AWARDED), SetTimer(1_000), persist(State.ACCEPTED), SetTimer(9_000)]})
    with trio.move_on_after(20):
        await shell.run("go")
    assert shell.script.heard == ["go", TimerFired(), Cancel()]
    assert shell.script.times == [0, 9_000, 20_000]


async def test_a_timer_replaces_the_one_before(autojump_clock: MockClock) -> None:
    shell = Shell(
        {
            "go": [SetTimer(9_000)],
            "sooner": [SetTimer(5_000)],
            "amid": [SetTimer(20_000)],
        }
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shell.run, "go")
        await trio.sleep(2)
        await shell.tell("sooner")
        await trio.sleep(10)
        await shell.tell("amid")
        await trio.sleep(10)
        await shell.tell(END)
    assert shell.script.heard == ["go", "sooner", TimerFired(), "amid", TimerFired(), END]
    assert shell.script.times == [0, 2_000, 5_000, 12_000, 20_000, 22_000]


async def test_events_go_on_after_a_timer(autojump_clock: MockClock) -> None:
    shell = Shell({"go": [SetTimer(-1)], TimerFired(): []})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shell.run, "go")
        await trio.sleep(1)
        await shell.tell("late")
        await shell.tell(END)
    assert shell.script.heard == ["go", TimerFired(), "late", END]


# A stream and its job.


async def test_frames_go_both_ways(autojump_clock: MockClock) -> None:
    frames = [FrameArrived(b"%d" % number) for number in range(3)]
    shell = Shell(
        {"go": [Send(b"a"), Send(b"b")], frames[2]: [Send(b"c")], StreamEnded("the peer ended the stream"): []}
    )
    ours, theirs = connected()
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, nullcontext(ours))
        nursery.start_soon(shell.run, "go")
        for frame in frames:
            await theirs.send(frame.data)
        assert [await theirs.receive() for _ in range(3)] == [b"a", b"b", b"c"]
        theirs.close()
        await trio.sleep(1)
        await shell.tell(END)
    assert shell.script.heard == ["go", *frames, StreamEnded("the peer ended the stream"), END]


async def test_a_stream_that_cannot_be_opened(autojump_clock: MockClock) -> None:
    shell = Shell({"go": [Send(b"lost")]})
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, dialling(1))
        nursery.start_soon(shell.run, "go")
        await trio.sleep(2)
        assert shell.script.heard == ["go", StreamEnded("nobody answers")]
        await shell.tell(END)


async def test_frames_for_a_stream_that_ended_are_lost(autojump_clock: MockClock) -> None:
    shell = Shell({StreamEnded("the peer reset the stream"): [Send(b"lost")] * (2 * OUTBOX) + [note("behind")]})
    ours, theirs = connected()
    async with trio.open_nursery() as nursery:
        pump = shell.attach(nursery, nullcontext(ours))
        nursery.start_soon(shell.run, "go")
        theirs.reset()
        await trio.sleep(1)
        assert shell.log.entries[-1] == "behind"
        await shell.tell(END)
        with assert_checkpoints():
            await pump.send(b"lost")
    assert pump.closing


async def test_a_job_ends_and_sends_what_is_left(autojump_clock: MockClock) -> None:
    stream = PacedStream(0.1)
    shell = Shell({END: [Send(b"%d" % number) for number in range(10)]})
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, nullcontext(stream))
        await shell.run(END)
        assert len(stream.read) < 10
    assert stream.read == [b"%d" % number for number in range(10)]
    assert trio.current_time() == pytest.approx(1)


async def test_a_job_that_ends_does_not_wait_for_a_dead_peer(autojump_clock: MockClock) -> None:
    shell = Shell({END: [Send(b"unread"), CloseStream()]})
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, nullcontext(PacedStream(NEVER)))
        await shell.run(END)
        assert trio.current_time() == 0
    assert trio.current_time() == FAREWELL_S


async def test_events_of_a_stream_that_was_left_are_ignored(autojump_clock: MockClock) -> None:
    """Those that wait, those that come later, and its end; those of the next stream count."""
    old, new = FrameArrived(b"old"), FrameArrived(b"new")
    shell = Shell({"go": [note("slow"), CloseStream()]}, pace=1)
    our_old, their_old = connected()
    our_new, their_new = connected()
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, nullcontext(our_old))
        nursery.start_soon(shell.run, "go")
        await their_old.send(old.data)
        await trio.sleep(1.5)
        assert shell.script.heard == ["go"]
        await their_old.send(old.data)
        shell.attach(nursery, nullcontext(our_new))
        await their_new.send(new.data)
        their_old.reset()
        await trio.sleep(1)
        their_new.reset()
        await trio.sleep(1)
        await shell.tell(END)
    assert shell.script.heard == ["go", new, StreamEnded("the peer reset the stream"), END]


async def test_a_job_that_is_over_hears_nothing(autojump_clock: MockClock) -> None:
    shell = Shell({})
    ours, theirs = connected()
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, nullcontext(ours))
        await shell.run(END)
        with trio.fail_after(1):
            for _ in range(2 * INBOX):
                # A loop of a peer's making must not starve others.
                with assert_checkpoints():
                    await shell.tell("late")
                await theirs.send(b"late")
    assert shell.script.heard == [END]


async def test_who_waits_to_tell_goes_on_when_the_job_ends(autojump_clock: MockClock) -> None:
    shell = Shell({"go": [note("slow")]}, pace=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shell.run, "go")
        await shell.tell(END)
        with trio.fail_after(2):
            for _ in range(2 * INBOX):
                await shell.tell("late")
    assert shell.script.heard == ["go", END]


# Back-pressure.


async def test_a_busy_job_lets_its_peer_wait(autojump_clock: MockClock) -> None:
    shell = Shell({"go": [note("slow")]}, pace=1)
    ours, theirs = connected()
    read = 0

    async def count() -> bytes:
        nonlocal read
        frame = await MemoryStream.receive(ours)
        read += 1
        return frame

    ours.receive = count  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, nullcontext(ours))
        nursery.start_soon(shell.run, "go")
        for number in range(3 * INBOX):
            await theirs.send(b"%d" % number)
        await trio.sleep(0.5)
        # One more has been read, and waits for room.
        assert read == INBOX + 1
        await trio.sleep(1)
        assert read == 3 * INBOX
        assert shell.script.heard[1:] == [FrameArrived(b"%d" % number) for number in range(3 * INBOX)]
        await shell.tell(END)


async def test_a_slow_peer_lets_the_job_wait(autojump_clock: MockClock) -> None:
    frames = [b"%d" % number for number in range(3 * OUTBOX)]
    stream = PacedStream(1)
    shell = Shell({"go": [Send(frame) for frame in frames]})
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, nullcontext(stream))
        nursery.start_soon(shell.run, "go")
        await trio.sleep(0.5)
        # One more is being sent.
        assert shell.log.entries == frames[: OUTBOX + 1]
        await trio.sleep(10)
        assert shell.log.entries == frames[: OUTBOX + 11]
        await trio.sleep(3 * OUTBOX)
        assert stream.read == frames
        await shell.tell(END)


async def test_a_peer_that_reads_nothing_is_gone(autojump_clock: MockClock) -> None:
    shell = Shell({"go": [Send(b"unread")] * (2 * OUTBOX) + [note("behind")]})
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, nullcontext(PacedStream(NEVER)))
        nursery.start_soon(shell.run, "go")
        await trio.sleep(STALL_S - 0.1)
        assert "behind" not in shell.log.entries
        await trio.sleep(0.2)
        assert shell.log.entries[-1] == "behind"
        assert shell.script.heard == ["go", StreamEnded("the peer read nothing for 30 s")]
        await shell.tell(END)


async def test_a_peer_that_reads_slowly_is_not_gone(autojump_clock: MockClock) -> None:
    stream = PacedStream(STALL_S - 1)
    shell = Shell({"go": [Send(b"read")] * 5})
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, nullcontext(stream))
        nursery.start_soon(shell.run, "go")
        await trio.sleep(6 * STALL_S)
        assert stream.read == [b"read"] * 5
        assert shell.script.heard == ["go"]
        await shell.tell(END)


# Cancellation.


FAREWELL: Final[list[Effect]] = [persist(State.CANCELLED), Send(b"abort"), CloseStream(), note("failed")]


async def test_a_job_that_waits_is_cancelled_properly(autojump_clock: MockClock) -> None:
    shell = Shell({Cancel(): FAREWELL})
    stream = PacedStream(0.1)
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, nullcontext(stream))
        with trio.move_on_after(3) as scope:
            await shell.run("go")
    assert scope.cancelled_caught
    assert shell.script.heard == ["go", Cancel()]
    assert shell.log.entries == [[State.CANCELLED], b"abort", "failed"]
    assert stream.read == [b"abort"]


class CancelAt(trio.abc.Instrument):
    """Cancels a scope before the given step of the task that made this."""

    def __init__(self, step: int, scope: trio.CancelScope) -> None:
        self.task = trio.lowlevel.current_task()
        self.steps_left = step
        self.scope = scope

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps_left -= task is self.task
        if not self.steps_left:
            self.scope.cancel()


@pytest.mark.parametrize("step", range(1, 16))
async def test_cancelled_amid_effects_the_rest_is_performed_once(autojump_clock: MockClock, step: int) -> None:
    """Wherever the cancellation hits, the machine's decision is carried out, and then the job is cancelled."""
    decision: list[Effect] = [
        persist(State.COMMITTED), Send(b"commit"), note("one"), persist(State.REVEALED), Send(b"reveal"), note("two"),
    ]  # fmt: skip
    shell = Shell({"go": decision, Cancel(): FAREWELL}, pace=0.01)
    stream = PacedStream(0)
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, nullcontext(stream))
        scope = trio.move_on_after(5)
        cancel = CancelAt(step, scope)
        trio.lowlevel.add_instrument(cancel)
        with scope:
            await shell.run("go")
        trio.lowlevel.remove_instrument(cancel)
    assert scope.cancelled_caught
    assert shell.script.heard == ["go", Cancel()]
    assert shell.log.entries == [
        [State.COMMITTED], b"commit", "one", [State.REVEALED], b"reveal", "two",
        [State.CANCELLED], b"abort", "failed",
    ]  # fmt: skip
    assert stream.read == [b"commit", b"reveal", b"abort"]


async def test_cancelled_at_its_end_a_job_is_not_cancelled(autojump_clock: MockClock) -> None:
    shell = Shell({END: [note("slow"), persist(State.PENDING), note("finished")], Cancel(): FAREWELL}, pace=0.5)
    with trio.move_on_after(0.2) as scope:
        await shell.run(END)
    assert scope.cancelled_caught
    assert shell.script.heard == [END]
    assert shell.log.entries == ["slow", [State.PENDING], "finished"]


async def test_a_cancelled_job_stores_what_it_decided_though_time_is_up(autojump_clock: MockClock) -> None:
    shell = Shell({"go": [note("hangs"), persist(State.REVEALED), note("hangs")], Cancel(): FAREWELL}, pace=NEVER)
    with trio.move_on_after(3):
        await shell.run("go")
    assert trio.current_time() == 3 + FAREWELL_S
    assert shell.log.entries == [[State.REVEALED], [State.CANCELLED]]


async def test_a_dead_peer_does_not_hold_up_the_farewell(autojump_clock: MockClock) -> None:
    stream = PacedStream(NEVER)
    shell = Shell({Cancel(): FAREWELL})
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, nullcontext(stream))
        with trio.move_on_after(3):
            await shell.run("go")
        assert trio.current_time() == 3
        assert shell.log.entries == [[State.CANCELLED], b"abort", "failed"]
    assert trio.current_time() == 3 + FAREWELL_S


async def test_a_dead_peer_does_not_hold_up_a_job_that_was_sending(autojump_clock: MockClock) -> None:
    """The cancellation is stored, though there is no room for the farewell."""
    shell = Shell({"go": [Send(b"unread")] * (3 * OUTBOX), Cancel(): FAREWELL})
    async with trio.open_nursery() as nursery:
        shell.attach(nursery, nullcontext(PacedStream(NEVER)))
        with trio.move_on_after(3):
            await shell.run("go")
        assert shell.log.entries[-3:] == [[State.CANCELLED], b"abort", "failed"]
    assert trio.current_time() == 3 + FAREWELL_S


async def test_a_pump_outlives_the_cancellation_of_its_job(autojump_clock: MockClock) -> None:
    """The whole nursery is cancelled: the frames that wait still go out, for FAREWELL_S seconds at most."""
    for pace, arrived in ((0.3, 6), (0.1, 11)):
        stream = PacedStream(pace)
        shell = Shell({"go": [Send(b"last")] * 10, Cancel(): FAREWELL})
        start = trio.current_time()
        with trio.move_on_after(0.05):
            async with trio.open_nursery() as nursery:
                shell.attach(nursery, nullcontext(stream))
                await shell.run("go")
        assert len(stream.read) == arrived
        assert trio.current_time() - start <= 0.05 + FAREWELL_S + 0.001


async def test_a_farewell_does_not_wait_for_a_stream_to_open(autojump_clock: MockClock) -> None:
    shell = Shell({Cancel(): FAREWELL})
    with trio.move_on_after(1):
        async with trio.open_nursery() as nursery:
            shell.attach(nursery, dialling(60))
            await shell.run("go")
    assert trio.current_time() == 1 + FAREWELL_S
