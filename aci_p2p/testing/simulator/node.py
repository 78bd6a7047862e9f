"""A simulated node: key, clock, disk, market view, and the jobs that it drives."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

from aci_p2p.network.model import Place
from aci_p2p.protocol.envelope import Envelope, Sealer, check_age, open_envelope
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.job import (
    CloseStream,
    Effect,
    FrameArrived,
    JobRecord,
    Persist,
    Send,
    SetTimer,
    StreamEnded,
    TimerFired,
)
from aci_p2p.protocol.lifecycle import Party
from aci_p2p.protocol.market import MarketView
from aci_p2p.protocol.validation import MessageRefused
from aci_p2p.testing.simulator.transport import End, Transport
from aci_p2p.testing.simulator.world import Timer, World

NETWORK: Final = "aci-sim"
"""Network id of simulated nodes."""
MAX_READ: Final = 65_536
"""Envelopes whose reading is remembered: those of the last minutes."""


B = TypeVar("B")


class Crashed(Exception):
    """The node died while it performed an effect."""


class Machine(Protocol):
    """A job's state machine."""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        ...

    def handle(self, event: Any, now: int) -> list[Effect]:  # noqa: ANN401 - the machine's own events
        """React to an event."""
        ...


class Reader:
    """Opens envelopes for all nodes of a world: what is the same for every reader is checked once."""

    def __init__(self) -> None:
        self._read: OrderedDict[tuple[bytes, type[Any]], Envelope[Any] | MessageRefused] = OrderedDict()

    def __call__(self, data: bytes, body_type: type[B], *, network: str, now: int | None) -> Envelope[B]:
        """See `open_envelope`."""
        key = (data, body_type)
        outcome = self._read.get(key)
        if outcome is None:
            try:
                outcome = open_envelope(data, body_type, network=network, now=None)
            except MessageRefused as error:
                outcome = error
            self._read[key] = outcome
            if len(self._read) > MAX_READ:
                self._read.popitem(last=False)
        if isinstance(outcome, MessageRefused):
            raise MessageRefused(outcome.validation.decision, outcome.validation.reason)
        if now is not None:
            check_age(outcome.header, now)
        return outcome


class TellingSealer(Sealer):
    """Signs as a real one does, and tells what it signed."""

    def __init__(self, key: KeyPair, tell: Callable[[Envelope[Any]], None]) -> None:
        super().__init__(key, NETWORK)
        self._tell = tell

    def seal(self, body: B, now: int, *, lifetime_ms: int | None = None) -> Envelope[B]:
        envelope = super().seal(body, now, lifetime_ms=lifetime_ms)
        self._tell(envelope)
        return envelope


class Disk:
    """What survives a crash: the jobs' records, and their history for the invariants."""

    def __init__(self) -> None:
        self.jobs: dict[tuple[bytes, Party], JobRecord] = {}
        self.history: dict[tuple[bytes, Party], list[JobRecord]] = {}

    def put(self, record: JobRecord) -> None:
        """Store a record durably."""
        key = (record.job_id, record.role)
        self.jobs[key] = record
        self.history.setdefault(key, []).append(record)


class SimNode:
    """One node. What it does is in its roles; this is what all of them share."""

    def __init__(
        self,
        world: World,
        transport: Transport,
        index: int,
        place: Place,
        said: Callable[[Envelope[Any]], None],
        reader: Reader,
    ) -> None:
        """`index`: its number in the world; `said` hears of every message that it signs; `reader` is the world's."""
        self.world = world
        self.transport = transport
        self.index = index
        self.place = place
        self.key = KeyPair(world.dice.secret(f"key/{index}"))
        self._said = said
        self.sealer = TellingSealer(self.key, said)
        self.random = world.dice[f"node/{index}"]
        self.disk = Disk()
        self._reader = reader
        self.view = MarketView(NETWORK, self._reader)
        self.streams: dict[End, None] = {}
        self.up = True
        self.skew_ms = 0
        self.accepting: Callable[[End], None] | None = None
        self.drivers: dict[Driver, None] = {}
        self.honest = True
        self.forwards = True

    @property
    def node_id(self) -> NodeId:
        """Its identity."""
        return self.key.node_id

    @property
    def clock(self) -> int:
        """What its clock shows, Unix milliseconds."""
        return self.world.now + self.skew_ms

    def accept(self, end: End) -> None:
        """A peer has opened a stream."""
        if self.accepting is None:
            end.close()
        else:
            self.accepting(end)

    def entropy(self) -> bytes:
        """32 random bytes of its own."""
        return self.random.randbytes(32)

    def crash(self) -> None:
        """Lose everything but the disk."""
        if not self.up:
            return
        self.up = False
        self.world.note("crash", self.index)
        for driver in tuple(self.drivers):
            driver.abandon()
        self.drivers.clear()
        self.transport.crash(self)

    def start(self) -> None:
        """Come back with what the disk holds."""
        self.up = True
        self.view = MarketView(NETWORK, self._reader)
        self.sealer = TellingSealer(self.key, self._said)
        self.world.note("start", self.index)


class Driver:
    """Drives one job's machine on one node."""

    def __init__(self, node: SimNode, machine: Machine) -> None:
        self.node = node
        self.machine = machine
        self.end: End | None = None
        self._timer: Timer | None = None
        self._waiting: deque[Any] = deque()
        self._busy = False
        self._done = False
        node.drivers[self] = None

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
                for effect in self.machine.handle(self._waiting.popleft(), self.node.clock):
                    self._perform(effect)
        except Crashed:
            return
        finally:
            self._busy = False
        if self.machine.over:
            self.abandon()
            self.node.drivers.pop(self, None)
            self.over()

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
        node = self.node
        match effect:
            case Persist(record):
                node.disk.put(record)
                node.world.note(record.state.value, node.index, record.job_id)
                self.stored(record)
                if not node.up:
                    raise Crashed
            case Send(data):
                if self.end:
                    self.end.send(data)
            case CloseStream():
                if self.end:
                    end, self.end = self.end, None
                    end.close()
            case SetTimer(at):
                if self._timer:
                    self._timer.cancel()
                self._timer = node.world.at(at - node.skew_ms, self.tell, TimerFired())
            case _:
                self.perform(effect)

    def stored(self, record: JobRecord) -> None:
        """A transition is on disk: the moment at which crashes hurt most."""

    def perform(self, effect: Effect) -> None:
        """Perform an effect of one role."""
        raise NotImplementedError

    def over(self) -> None:
        """The job has ended."""
