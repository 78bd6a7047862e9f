"""What the nodes of a swarm have stored, and what must hold of it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Final

import trio

from aci_p2p.protocol.envelope import open_envelope
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import JobRecord, Payment, PaymentState
from aci_p2p.protocol.lifecycle import FINAL_STATES, TRANSITIONS, Party, State
from aci_p2p.protocol.messages import Receipt
from aci_p2p.store import Store
from aci_p2p.testing.simulator.accounts import RECEIPTED
from aci_p2p.testing.simulator.invariant import Invariant, InvariantBroken

_STEPS: Final = frozenset((state, target) for (state, _), target in TRANSITIONS.items())
_AT_REST: Final = (*FINAL_STATES, State.PENDING)
"""States in which nobody has anything to do."""
_BEFORE: Final = {Party.CONSUMER: State.DRAFT, Party.PROVIDER: State.OFFERED}
"""States before the first that is stored."""


class Ledger:
    """Every record that reached a disk. Checks what each node stores, and what all of it says together."""

    def __init__(self, network: str) -> None:
        """`network`: id of the network, which signatures are for."""
        self._network = network
        self._jobs: dict[tuple[str, Party, bytes], list[JobRecord]] = {}
        self._payments: dict[tuple[Party, bytes, NodeId, NodeId], Payment] = {}
        self._broken: list[InvariantBroken] = []

    def stored(self, node: str, node_id: NodeId, records: Sequence[JobRecord], payments: Sequence[Payment]) -> None:
        """A node has stored records and payments. What is wrong is raised by `check`, not into the node."""
        for payment in payments:
            pair = (node_id, payment.peer) if payment.role is Party.CONSUMER else (payment.peer, node_id)
            self._payments[payment.role, payment.job_id, *pair] = payment
        for record in records:
            history = self._jobs.setdefault((node, record.role, record.job_id), [])
            before = history[-1].state if history else _BEFORE[record.role]
            if history and history[-1] == record:
                continue
            is_later_word = bool(history) and history[-1].updated_at == record.updated_at and before is record.state
            if (before, record.state) not in _STEPS and not is_later_word:
                detail = f"{_name(record)} of {node} went from {before.value} to {record.state.value}"
                self._broken.append(InvariantBroken(Invariant.TABLE, detail))
            history.append(record)

    def jobs(self, node: str) -> list[JobRecord]:
        """The latest record of each job that a node has, in the order of their beginnings."""
        return [history[-1] for (owner, _, _), history in self._jobs.items() if owner == node]

    def history(self, node: str, job_id: bytes, role: Party) -> list[State]:
        """The states of one job, as they were stored."""
        return [record.state for record in self._jobs.get((node, role, job_id), ())]

    def unfinished(self, node: str) -> list[JobRecord]:
        """Jobs of a node in which somebody still has to act."""
        return [record for record in self.jobs(node) if record.state not in _AT_REST]

    def check(self) -> None:
        """Raises InvariantBroken when something must not be as it is."""
        for broken in self._broken:
            raise broken
        paid: dict[bytes, JobRecord] = {}
        receipted = [
            (node, history[-1]) for (node, _, _), history in self._jobs.items() if history[-1].state in RECEIPTED
        ]
        for node, record in receipted:
            self._check_receipt(node, record)
            if record.role is Party.PROVIDER and paid.setdefault(record.job_id, record) is not record:
                raise InvariantBroken(Invariant.ONE_RESULT, f"{_name(record)} was paid to two providers")
        for _, record in receipted:
            if record.role is not Party.CONSUMER:
                continue
            provider = paid.pop(record.job_id, None)
            if provider is not None and provider.receipt != record.receipt:
                raise InvariantBroken(Invariant.MONEY, f"the two sides of {_name(record)} disagree")
        for record in paid.values():
            raise InvariantBroken(Invariant.MONEY, f"{_name(record)} was paid by nobody")
        for (role, job_id, *pair), held in self._payments.items():
            promised = self._payments.get((Party.CONSUMER, job_id, pair[0], pair[1]))
            if role is Party.PROVIDER and (promised is None or held.amount > promised.amount):
                raise InvariantBroken(Invariant.MONEY, f"more is held for job {job_id.hex()[:8]} than was promised")

    def unsettled(self) -> list[tuple[NodeId, Payment]]:
        """Payments that are final at a consumer, and of which the provider does not know; with the consumer."""
        return [
            (pair[0], payment)
            for (role, job_id, *pair), payment in self._payments.items()
            if role is Party.CONSUMER
            and payment.state is not PaymentState.RUNNING
            and self._held(job_id, pair[0], pair[1]) < payment.amount
        ]

    def _held(self, job_id: bytes, consumer: NodeId, provider: NodeId) -> int:
        held = self._payments.get((Party.PROVIDER, job_id, consumer, provider))
        return held.amount if held else 0

    def _check_receipt(self, node: str, record: JobRecord) -> None:
        try:
            receipt = open_envelope(record.receipt, Receipt, network=self._network, now=None).body
        except AciError as error:
            raise InvariantBroken(Invariant.RECEIPTS, f"{_name(record)} of {node}: {error}") from error
        owed = receipt.price if record.role is Party.CONSUMER else receipt.shares[-1].price
        whole = sum(share.price for share in receipt.shares)
        if (receipt.job_id, owed, whole) != (record.job_id, record.price, receipt.price):
            detail = f"{_name(record)} of {node} claims {record.price}, and the receipt says {owed}"
            raise InvariantBroken(Invariant.RECEIPTS, detail)


class WatchedStore(Store):
    """A node's database whose writes are watched, and stop reaching the disk when the node has crashed."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        node: NodeId,
        *,
        threads: bool,
        is_dead: Callable[[], bool],
        stored: Callable[[Sequence[JobRecord], Sequence[Payment]], None],
    ) -> None:
        """`stored` hears of every transaction that has reached the disk, before its messages are sent."""
        super().__init__(connection, node, threads=threads)
        # A crash in a swarm leaves the process alive, and with it all that was written.
        connection.execute("PRAGMA synchronous = OFF")
        self._is_dead = is_dead
        self._stored = stored

    async def put_jobs(self, records: Sequence[JobRecord], payments: Sequence[Payment] = ()) -> None:
        if self._is_dead():
            await trio.lowlevel.checkpoint()
            return
        await super().put_jobs(records, payments)
        if records or payments:
            self._stored(records, payments)

    async def note_key(self, now: int) -> None:
        if not self._is_dead():
            await super().note_key(now)


def _name(record: JobRecord) -> str:
    return f"job {record.job_id.hex()[:8]}"
