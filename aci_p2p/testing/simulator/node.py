"""A simulated node: key, clock, disk, market view, and the jobs that it drives."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from aci_p2p.network.model import Place
from aci_p2p.protocol.envelope import Envelope, Sealer, check_age, open_envelope
from aci_p2p.protocol.identity import KeyPair, NodeId
from aci_p2p.protocol.job import JobRecord, Payment, PaymentState
from aci_p2p.protocol.lifecycle import Party
from aci_p2p.protocol.market import MarketView
from aci_p2p.protocol.orderbook import OrderBook
from aci_p2p.protocol.validation import MessageRefused
from aci_p2p.testing.simulator.transport import End, Transport
from aci_p2p.testing.simulator.world import World

if TYPE_CHECKING:
    from aci_p2p.testing.simulator.driver import Driver

NETWORK: Final = "aci-sim"
"""Network id of simulated nodes."""
MAX_READ: Final = 65_536
"""Envelopes whose reading is remembered: those of the last minutes."""
SECRET_BYTES: Final = 32
"""Bytes of salts and nonces."""

B = TypeVar("B")


class NodeDied(Exception):
    """The node died while it wrote; nothing that would have followed happens."""


class DiskFull(Exception):
    """A transition could not be stored."""


class WriteFate(Enum):
    """What becomes of a transaction."""

    STORED = "stored"
    """It is durable."""
    LOST = "lost"
    """The node dies before it is durable."""
    LAST = "last"
    """The node dies when it is durable, before anything else happens."""
    REFUSED = "refused"
    """The disk is full."""


class Watch(Protocol):
    """The world's view of its nodes: sees what they do, and decides what becomes of their writes."""

    def signed(self, envelope: Envelope[Any]) -> None:
        """A node has signed a message."""
        ...

    def fate(self, node: SimNode, what: str) -> WriteFate:
        """A node is about to store something in one transaction: what, in words."""
        ...

    def stored(self, node: SimNode, record: JobRecord) -> None:
        """A transition is on a node's disk."""
        ...

    def promised(self, node: SimNode, payment: Payment) -> None:
        """What is paid for a job is on a node's disk."""
        ...

    def dies(self, node: SimNode) -> None:
        """A node dies at a write."""
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
        """`tell` hears of every message."""
        super().__init__(key, NETWORK)
        self._tell = tell

    def seal(self, body: B, now: int, *, lifetime_ms: int | None = None) -> Envelope[B]:
        envelope = super().seal(body, now, lifetime_ms=lifetime_ms)
        self._tell(envelope)
        return envelope


class Disk:
    """What survives a crash: the jobs' records, and what is paid for them."""

    def __init__(self) -> None:
        self.jobs: dict[tuple[bytes, Party], JobRecord] = {}
        """The latest record of each job and role."""
        self.payments: dict[tuple[bytes, Party, NodeId], Payment] = {}
        """What is paid for each job in each role, by the other side."""
        self.is_full = False
        """Whether it refuses what is written."""


class SimNode:
    """One node. What it does is in its roles; this is what all of them share."""

    def __init__(
        self, world: World, transport: Transport, index: int, place: Place, watch: Watch, reader: Reader
    ) -> None:
        """`index`: its number in the world; `reader` is the world's."""
        self.world = world
        """Clock, queue and trace."""
        self.transport = transport
        """Streams to the others."""
        self.index = index
        """Its number in the world."""
        self.place = place
        """Where it stands in the network."""
        self.key = KeyPair(world.dice.secret(f"key/{index}"))
        """Its identity's key."""
        self.sealer = TellingSealer(self.key, watch.signed)
        """Signs its messages."""
        self.random = world.dice[f"node/{index}"]
        """Its own randomness."""
        self.disk = Disk()
        """What it keeps over a crash."""
        self.streams: dict[End, None] = {}
        """Its open streams, the oldest first."""
        self.up = True
        """Whether it runs."""
        self.started_at = world.now
        """When it was started last, Unix milliseconds of true time."""
        self.skew_ms = 0
        """How far its clock is ahead, milliseconds."""
        self.accepting: Callable[[End], None] | None = None
        """Takes streams that others open; None: they are closed."""
        self.drivers: dict[Driver, None] = {}
        """Its running jobs, the oldest first."""
        self.honest = True
        """Whether it keeps to the protocol."""
        self.forwards = True
        """Whether it passes on gossip of others."""
        self._watch = watch
        self._reader = reader
        self.view = MarketView(NETWORK, reader)
        """The market as it has seen it."""

    def __repr__(self) -> str:
        return f"<node {self.index}>"

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

    def order_book(self) -> OrderBook:
        """An empty one."""
        return OrderBook(NETWORK, self._reader)

    def read(self, data: bytes, body_type: type[B]) -> Envelope[B]:
        """What a message says, whenever it was said. Raises MessageRefused."""
        return self._reader(data, body_type, network=NETWORK, now=None)

    def entropy(self) -> bytes:
        """32 random bytes of its own."""
        return self.random.randbytes(SECRET_BYTES)

    def store(self, records: Sequence[JobRecord], payments: Sequence[Payment] = ()) -> None:
        """Store transitions and payments in one durable transaction. Raises DiskFull, NodeDied."""
        last = records[-1] if records else None
        what = f"{last.role.value} {last.state.value}" if last else f"{payments[-1].role.value} settled"
        fate = self._watch.fate(self, what)
        if fate is WriteFate.REFUSED:
            raise DiskFull
        if fate is not WriteFate.LOST:
            self.write(records, payments)
        if fate is not WriteFate.STORED:
            self._watch.dies(self)
            raise NodeDied

    def write(self, records: Sequence[JobRecord], payments: Sequence[Payment]) -> None:
        """Put something on the disk, which it takes."""
        for payment in payments:
            self.disk.payments[payment.job_id, payment.role, payment.peer] = payment
            self.world.note(payment.state.value, self.index, payment.job_id)
        for record in records:
            self.disk.jobs[record.job_id, record.role] = record
            self.world.note(record.state.value, self.index, record.job_id)
            self._watch.stored(self, record)
        for payment in payments:
            self._watch.promised(self, payment)

    def owed(self) -> list[Payment]:
        """What is owed, and its providers may not know."""
        return [one for one in self.disk.payments.values() if one.state is PaymentState.OWED]

    def close_payments(self) -> None:
        """What was promised for jobs that were interrupted is owed, as `Store.recover` has it."""
        for payment in tuple(self.disk.payments.values()):
            if payment.state is PaymentState.RUNNING:
                self.write((), (replace(payment, state=PaymentState.OWED),))

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
        self.started_at = self.world.now
        self.view = MarketView(NETWORK, self._reader)
        self.sealer = TellingSealer(self.key, self._watch.signed)
        self.world.note("start", self.index)
