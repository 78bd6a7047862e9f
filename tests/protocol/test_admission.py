"""Slots are shared out fairly, and nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aci_p2p.protocol import admission
from aci_p2p.protocol.admission import (
    LEASE_MS,
    LEASES_PER_SECOND,
    MAX_WAIT_MS,
    PATIENCE_MS,
    RETRY_MS,
    Admission,
    Busy,
    Lease,
)
from aci_p2p.protocol.identity import NodeId

NOW = 1_750_000_000_000
A, B, C = (NodeId(bytes([number]) * 32) for number in (1, 2, 3))


def taken(slots: Admission, consumer: NodeId, now: int = NOW, *, runs: bool = False) -> Lease:
    lease = slots.lease(consumer, now)
    assert isinstance(lease, Lease)
    assert (lease.consumer, lease.expires_at) == (consumer, now + LEASE_MS)
    assert not runs or slots.begin(lease, now)
    return lease


def refused(slots: Admission, consumer: NodeId, now: int = NOW) -> Busy:
    busy = slots.lease(consumer, now)
    assert isinstance(busy, Busy)
    assert now < busy.until <= now + MAX_WAIT_MS
    return busy


def counts(slots: Admission) -> tuple[int, int, int]:
    statistics = slots.statistics()
    return statistics.running, statistics.reserved, statistics.turned_away


def test_one_may_use_all_while_nobody_else_wants_them() -> None:
    slots = Admission(4)
    for _ in range(4):
        taken(slots, A, runs=True)
    assert refused(slots, A) == Busy(NOW + RETRY_MS, "all slots are taken")
    assert counts(slots) == (4, 0, 1)


def test_reservations_end() -> None:
    slots = Admission(1)
    lease = taken(slots, A)
    assert refused(slots, B, NOW + 1) == Busy(NOW + LEASE_MS, "all slots are taken")
    assert not slots.begin(lease, NOW + LEASE_MS)
    taken(slots, B, NOW + LEASE_MS)


def test_a_job_keeps_its_slot_until_it_is_released() -> None:
    slots = Admission(1)
    lease = taken(slots, A, runs=True)
    refused(slots, B, NOW + 10 * LEASE_MS)
    slots.release(lease)
    slots.release(lease)
    taken(slots, B, NOW + 10 * LEASE_MS)
    assert counts(slots)[:2] == (0, 1)


def test_who_has_its_share_waits_while_others_want_some() -> None:
    slots = Admission(4)
    first, second, *_ = [taken(slots, A, runs=True) for _ in range(4)]
    until = refused(slots, B).until
    slots.release(first)
    assert refused(slots, A) == Busy(until + PATIENCE_MS, "others wait for a slot, and you have your share")
    taken(slots, B, until, runs=True)
    # Nobody waits any more.
    slots.release(second)
    taken(slots, A, until, runs=True)


def test_a_claim_lapses() -> None:
    slots = Admission(4)
    first, *_ = [taken(slots, A, runs=True) for _ in range(4)]
    refused(slots, B)
    slots.release(first)
    lapses = refused(slots, A).until
    refused(slots, A, lapses - 1)
    taken(slots, A, lapses)


def test_who_was_served_later_steps_back() -> None:
    slots = Admission(1)
    lease = taken(slots, A, runs=True)
    until = refused(slots, B).until
    slots.release(lease)
    assert refused(slots, A).detail == "others have waited for longer"
    taken(slots, C, NOW + 1, runs=False)
    refused(slots, B, until)


def test_who_does_not_come_again_keeps_nobody_waiting() -> None:
    slots = Admission(1)
    lease = taken(slots, A, runs=True)
    assert isinstance(slots.lease(B, NOW, returns=False), Busy)
    slots.release(lease)
    taken(slots, A)


def test_requests_are_limited() -> None:
    slots = Admission(1 << 16)
    for _ in range(LEASES_PER_SECOND):
        taken(slots, A)
    assert "requests a second" in refused(slots, A).detail
    taken(slots, B)
    taken(slots, A, NOW + 10)


def test_a_clock_that_is_set_back_holds_nobody_up() -> None:
    slots = Admission(2)
    taken(slots, A, NOW + 10_000_000, runs=True)
    lease = taken(slots, A, NOW + 10_000_000)
    refused(slots, B, NOW + 10_000_000)
    taken(slots, C)
    assert not slots.begin(lease, NOW)
    assert counts(slots)[:2] == (1, 1)
    for _ in range(LEASES_PER_SECOND + 1):
        slots.lease(B, NOW + 10_000_000)
    refused(slots, B)
    assert "requests a second" in refused(slots, B).detail
    taken(slots, B, NOW + 10)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_CONSUMERS", 3)
    slots = Admission(1)
    for number in range(1, 20):
        slots.lease(NodeId(bytes([number]) * 32), NOW + number)
    assert max(len(slots._claims), len(slots._served), len(slots._debts)) <= 3


def test_fewer_slots_take_nothing_away() -> None:
    slots = Admission(2)
    leases = [taken(slots, A, runs=True) for _ in range(2)]
    slots.slots = 1
    slots.release(leases[0])
    refused(slots, B)
    assert counts(slots)[0] == 1


@settings(max_examples=100)
@given(
    count=st.integers(1, 4),
    consumers=st.integers(1, 8),
    lengths=st.lists(st.integers(1, 3_000), min_size=1, max_size=20),
    greed=st.integers(1, 4),
    forgetful=st.integers(2, 9),
)
def test_nobody_starves(count: int, consumers: int, lengths: list[int], greed: int, forgetful: int) -> None:
    """Everybody always wants slots, the first of them several, and comes again when it was told."""
    slots, now, turn = Admission(count), NOW, 0
    names = [NodeId(bytes([number]) * 32) for number in range(1, consumers + 1)]
    due = dict.fromkeys([(name, 0) for name in names] + [(names[0], extra) for extra in range(1, greed)], NOW)
    ends: dict[Lease, int] = {}
    last = dict.fromkeys(names, NOW)
    while now < NOW + 120_000:
        now = min([*due.values(), *ends.values()])
        for lease in [lease for lease, end in ends.items() if end <= now]:
            del ends[lease]
            slots.release(lease)
        for wish in [wish for wish, at in due.items() if at <= now]:
            outcome = slots.lease(wish[0], now)
            turn += 1
            if isinstance(outcome, Busy):
                assert now < outcome.until <= now + MAX_WAIT_MS
                due[wish] = outcome.until
                continue
            last[wish[0]] = now
            due[wish] = now + 1
            if turn % forgetful:
                assert slots.begin(outcome, now)
                ends[outcome] = now + lengths[turn % len(lengths)]
        statistics = slots.statistics()
        assert statistics.running == len(ends)
        assert statistics.running + statistics.reserved <= count
        for name in names:
            assert now - last[name] <= 10_000 * (consumers + greed), "starved"
    for lease in ends:
        slots.release(lease)
    slots.check(names[0], now + LEASE_MS)
    assert counts(slots)[:2] == (0, 0)
