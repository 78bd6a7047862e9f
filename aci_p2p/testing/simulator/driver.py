"""Drives one job's state machine on a simulated node, in the order in which `aci_p2p.jobs` does it on a real one."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from aci_p2p.protocol.job import (
    CloseStream,
    Deliver,
    Effect,
    FrameArrived,
    Persist,
    Send,
    SetTimer,
    StreamEnded,
    TimerFired,
)
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.testing.simulator.node import DiskFull, NodeDied, SimNode
from aci_p2p.testing.simulator.transport import End
from aci_p2p.testing.simulator.world import Timer


class Machine(Protocol):
    """A job's state machine."""

    role: Party

    @property
    def job_id(self) -> bytes:
        """32 bytes."""
        ...

    @property
    def state(self) -> State:
        """Where the job stands."""
        ...

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        ...

    def handle(self, event: Any, now: int) -> list[Effect]:  # noqa: ANN401 - the machine's own events
        """React to an event."""
        ...


class Observer(Protocol):
    """Sees what a job takes from its stream, and what it says there."""

    def moved(self, driver: Driver, before: State, frame: bytes) -> None:
        """A frame was handled by the job's machine, which was in a state before."""
        ...

    def sent(self, driver: Driver, frame: bytes) -> None:
        """A job's frame is sent."""
        ...


class Driver:
    """Drives one job's machine on one node."""

    def __init__(self, node: SimNode, machine: Machine, observer: Observer) -> None:
        """The job runs until its machine is over, or the node dies."""
        self.node = node
        """Where it runs."""
        self.machine = machine
        """What decides."""
        self.end: End | None = None
        """The job's stream, while it is open."""
        self.renewed_at = node.world.now
        """When its state last changed or its stream last moved, Unix milliseconds of true time."""
        self._observer = observer
        self._timer: Timer | None = None
        self._waiting: deque[Any] = deque()
        self._busy = False
        self._done = False
        node.drivers[self] = None

    def __repr__(self) -> str:
        return f"<{self.machine.role.value}'s job {self.machine.job_id.hex()[:8]}, {self.machine.state.value}>"

    def tell(self, event: Any) -> None:  # noqa: ANN401 - the machine's own events
        """Hand an event to the machine and perform what follows."""
        if self._done:
            return
        self._waiting.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._waiting and not self.machine.over:
                self._handle(self._waiting.popleft())
        except NodeDied:
            return
        except DiskFull:
            # As the real shell does: the job ends here, its stream behind what was sent, its record stays as it is.
            if self.end:
                self.end.close()
            self._leave()
            self.disk_full()
            return
        finally:
            self._busy = False
        if self.machine.over:
            self._leave()
            self.over()

    def _handle(self, event: Any) -> None:  # noqa: ANN401 - the machine's own events
        before = self.machine.state
        effects = deque(self.machine.handle(event, self.node.clock))
        if self.machine.state is not before or any(isinstance(effect, Send | Deliver) for effect in effects):
            self.renewed_at = self.node.world.now
        if isinstance(event, FrameArrived):
            self._observer.moved(self, before, event.data)
        while effects:
            if isinstance(effects[0], Persist):
                self._persist(effects)
            else:
                self._perform(effects.popleft())

    def _persist(self, effects: deque[Effect]) -> None:
        """Store the transitions at the head in one transaction, before anything behind them happens."""
        head: list[Effect] = []
        while effects and isinstance(effects[0], Persist | SetTimer):
            head.append(effects.popleft())
        stored = [effect for effect in head if isinstance(effect, Persist)]
        self.node.store([one.record for one in stored], [payment for one in stored for payment in one.payments])
        timers = [effect for effect in head if isinstance(effect, SetTimer)]
        effects.extendleft(timers[-1:])

    def _leave(self) -> None:
        self.abandon()
        self.node.drivers.pop(self, None)

    def attach(self, end: End) -> None:
        """The job's stream is open."""
        self.end = end
        end.on_frame = lambda frame: self._from(end, FrameArrived(frame))
        end.on_end = lambda detail: self._from(end, StreamEnded(detail))

    def _from(self, end: End, event: FrameArrived | StreamEnded) -> None:
        if self.end is end:
            self.tell(event)

    def abandon(self) -> None:
        """Nothing more happens here."""
        self._done = True
        if self._timer:
            self._timer.cancel()
        self._waiting.clear()

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send(data):
                self._observer.sent(self, data)
                if self.end:
                    self.end.send(data)
            case CloseStream():
                if self.end:
                    end, self.end = self.end, None
                    end.close()
            case SetTimer(at):
                if self._timer:
                    self._timer.cancel()
                node = self.node
                self._timer = node.world.at(at - node.skew_ms, self.tell, TimerFired())
            case _:
                self.perform(effect)

    def perform(self, effect: Effect) -> None:
        """Perform an effect of one role."""
        raise NotImplementedError

    def over(self) -> None:
        """The job has ended."""

    def disk_full(self) -> None:
        """The job cannot go on, for its transition could not be stored."""
