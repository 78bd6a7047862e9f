"""What must hold in every simulated world, whatever fails and whoever cheats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from aci_p2p.protocol.bidding import MAX_OUTSTANDING
from aci_p2p.protocol.envelope import Envelope, open_envelope
from aci_p2p.protocol.errors import AciError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import JobRecord
from aci_p2p.protocol.lifecycle import TRANSITIONS, Party, State
from aci_p2p.protocol.market import MAX_OFFERS
from aci_p2p.protocol.messages import Receipt
from aci_p2p.testing.simulator.node import NETWORK, SimNode

RECEIPTED: Final = (State.RECEIPTED, State.PENDING, State.CHALLENGED, State.FINAL)
"""States of a job that somebody has signed for."""
_STEPS: Final = frozenset((state, target) for (state, _), target in TRANSITIONS.items())


class InvariantBroken(AssertionError):
    """Something happened that must never happen."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}")
        self.name = name


@dataclass(slots=True)
class _Account:
    """What both sides of a job say of it."""

    consumer: JobRecord | None = None
    providers: dict[int, JobRecord] = field(default_factory=dict[int, JobRecord])


class Judge:
    """Watches what honest nodes store and hear. Raises InvariantBroken at the first breach."""

    def __init__(self, honest: Callable[[NodeId], bool]) -> None:
        """`honest`: whether an identity belongs to an honest node."""
        self._honest = honest
        self._last: dict[tuple[int, bytes, Party], JobRecord] = {}
        self._accounts: dict[bytes, _Account] = {}
        self._said: set[bytes] = set()
        self.checks = 0
        """How often something was checked."""

    def said(self, envelope: Envelope[Any]) -> None:
        """A node has signed a message."""
        self._said.add(envelope.digest)

    def heard(self, node: SimNode, envelope: Envelope[Any]) -> None:
        """An honest node believes a message: its sender must have signed it, and it must be of now."""
        self.checks += 1
        if envelope.digest not in self._said:
            name = type(envelope.body).__name__.lower()
            msg = f"node {node.index} believes a {name} that {envelope.sender.short} never signed"
            raise InvariantBroken("only true words count", msg)
        if envelope.header.expires_at <= node.clock:
            raise InvariantBroken("nothing expired counts", f"node {node.index} believes what expired")

    def stored(self, node: SimNode, record: JobRecord) -> None:
        """An honest node has stored a transition."""
        self.checks += 1
        key = (node.index, record.job_id, record.role)
        last = self._last.get(key)
        # A consumer's record begins as OFFERED, a provider's as AWARDED.
        before = last.state if last else State.DRAFT if record.role is Party.CONSUMER else State.OFFERED
        if (before, record.state) not in _STEPS:
            name = record.job_id.hex()[:8]
            msg = f"job {name} of node {node.index} went from {before.value} to {record.state.value}"
            raise InvariantBroken("states follow the table", msg)
        self._last[key] = record
        if record.state in RECEIPTED:
            self._settle(node, record)

    def _settle(self, node: SimNode, record: JobRecord) -> None:
        account = self._accounts.setdefault(record.job_id, _Account())
        if record.role is Party.CONSUMER:
            account.consumer = record
        else:
            account.providers[node.index] = record
        name = record.job_id.hex()[:8]
        if len(account.providers) > 1:
            raise InvariantBroken("one result for a job", f"providers {sorted(account.providers)} were paid for {name}")
        try:
            receipt = open_envelope(record.receipt, Receipt, network=NETWORK, now=None)
        except AciError as error:
            raise InvariantBroken("no money without a receipt", f"job {name}: {error}") from error
        if receipt.body.price != record.price or receipt.digest not in self._said:
            raise InvariantBroken("no money without a receipt", f"job {name} claims {record.price}")
        for provider in account.providers.values():
            paid = account.consumer
            if paid is None and not self._honest(receipt.sender):
                continue
            if paid is None or (paid.receipt, paid.price) != (provider.receipt, provider.price):
                raise InvariantBroken("money is conserved", f"the two sides of job {name} disagree")

    def income(self) -> dict[int, int]:
        """What each provider has receipts for, base units."""
        totals: dict[int, int] = {}
        for account in self._accounts.values():
            for index, record in account.providers.items():
                totals[index] = totals.get(index, 0) + record.price
        return totals

    def spending(self) -> int:
        """What consumers have signed for, base units."""
        return sum(account.consumer.price for account in self._accounts.values() if account.consumer)

    def bounded(self, node: SimNode, outstanding: int, running: int, slots: int) -> None:
        """The queues of a node stay within their limits."""
        self.checks += 1
        if outstanding > MAX_OUTSTANDING or running > slots or len(node.view) > MAX_OFFERS:
            msg = f"node {node.index}: {outstanding} bids, {running} of {slots} slots, {len(node.view)} offers"
            raise InvariantBroken("queues are bounded", msg)


Watch = Callable[[SimNode, JobRecord], None]
"""Hears of every transition that reaches a disk."""
