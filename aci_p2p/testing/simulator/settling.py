"""How simulated nodes settle, in the order in which `aci_p2p.settlement` does it on real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import Payment
from aci_p2p.protocol.lifecycle import Party
from aci_p2p.protocol.settlement import acknowledged, acknowledgement, read_statement, settle
from aci_p2p.protocol.validation import MessageRefused
from aci_p2p.settlement import ANSWER_S, FIRST_RETRY_S, LAST_RETRY_S, SETTLE_FOR_MS
from aci_p2p.testing.simulator.node import NETWORK, DiskFull, NodeDied, SimNode
from aci_p2p.testing.simulator.transport import End

ANSWER_MS: Final = round(1_000 * ANSWER_S)
"""Milliseconds for a provider to answer, a dial included."""
FIRST_RETRY_MS: Final = round(1_000 * FIRST_RETRY_S)
"""Milliseconds until a provider that did not answer is tried again; doubled each time."""
LAST_RETRY_MS: Final = round(1_000 * LAST_RETRY_S)
"""Most milliseconds between two tries."""


class Settler:
    """Tells providers what a consumer owes them, until they hold it."""

    def __init__(self, node: SimNode, find: Callable[[NodeId], SimNode | None]) -> None:
        """`find`: who has an identity."""
        self.node = node
        """Who owes."""
        self._find = find
        self._retries: dict[NodeId, tuple[int, int]] = {}
        self._tellings: dict[NodeId, _Telling] = {}

    def wake(self) -> None:
        """Something may be owed, or a provider's time may have come."""
        if not self.node.up:
            return
        jobs, now = self.node.disk.jobs, self.node.world.now
        owed: dict[NodeId, list[Payment]] = {}
        for payment in self.node.owed():
            if jobs[payment.job_id, Party.CONSUMER].updated_at >= self.node.clock - SETTLE_FOR_MS:
                owed.setdefault(payment.peer, []).append(payment)
        for provider in self._retries.keys() - owed.keys():
            del self._retries[provider]
        for provider, payments in owed.items():
            if provider not in self._tellings and self._retries.get(provider, (0, 0))[0] <= now:
                telling = self._tellings[provider] = _Telling(self, payments)
                telling.begin(self._find(provider))

    def restarted(self) -> None:
        """The node has forgotten whom it was telling."""
        for telling in self._tellings.values():
            telling.stop()
        self._tellings.clear()
        self._retries.clear()
        self.wake()

    def ended(self, provider: NodeId, *, is_settled: bool) -> None:
        """A provider holds what it was to be told, or must be told again."""
        del self._tellings[provider]
        if is_settled:
            self._retries.pop(provider, None)
            self.wake()
            return
        _, last = self._retries.get(provider, (0, 0))
        delay = min(2 * last, LAST_RETRY_MS) or FIRST_RETRY_MS
        world = self.node.world
        self._retries[provider] = world.now + delay, delay
        world.after(delay, self.wake)


class _Telling:
    """One stream to one provider."""

    def __init__(self, settler: Settler, payments: list[Payment]) -> None:
        self._settler = settler
        self._node = settler.node
        self._payments = payments
        self._provider = payments[0].peer
        self._patience = self._node.world.after(ANSWER_MS, self._give_up)
        self._stream: End | None = None

    def begin(self, target: SimNode | None) -> None:
        """Dial the provider, and tell it the first."""
        if target is None:
            # Nobody answers: the time for it runs out.
            return
        self._stream = self._node.transport.dial(self._node, target)
        self._stream.on_frame = self._answered
        self._stream.on_end = self._give_up
        self._stream.send(self._payments[0].statement)

    def stop(self) -> None:
        """Nothing more happens here."""
        self._patience.cancel()
        if self._stream:
            self._stream.close()

    def _answered(self, frame: bytes) -> None:
        payment = self._payments.pop(0)
        try:
            settled = acknowledged(payment, frame, network=NETWORK, now=self._node.clock)
            self._node.store((), (settled,))
        except (MessageRefused, DiskFull):
            self._give_up()
        except NodeDied:
            self._patience.cancel()
        else:
            if self._payments and self._stream:
                self._stream.send(self._payments[0].statement)
            else:
                self.stop()
                self._settler.ended(self._provider, is_settled=True)

    def _give_up(self, _detail: str = "") -> None:
        self.stop()
        self._settler.ended(self._provider, is_settled=False)


class Till:
    """Takes what consumers promise a provider for jobs whose streams have ended."""

    def __init__(self, node: SimNode) -> None:
        """`node`: who is paid."""
        self._node = node

    def serve(self, end: End, frame: bytes) -> None:
        """Serve one consumer's stream, of which the first frame has come."""
        end.on_frame = lambda following: self._take(end, following)
        self._take(end, frame)

    def _take(self, end: End, frame: bytes) -> None:
        node = self._node
        now = node.clock
        try:
            statement = read_statement(frame, node.node_id, network=NETWORK)
            job = node.disk.jobs.get((statement.job_id, Party.PROVIDER))
            held = node.disk.payments.get((statement.job_id, Party.PROVIDER, job.peer)) if job and job.peer else None
            change = settle(statement, job, held, now)
            if change is not None:
                records, payment = change
                node.store(records, (payment,))
                held = payment
        except (MessageRefused, DiskFull):
            end.close()
        except NodeDied:
            return
        else:
            end.send(node.sealer.seal(acknowledgement(statement, held), now).data)
