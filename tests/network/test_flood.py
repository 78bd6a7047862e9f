"""The accounts that bound what a neighbour may send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.network.buckets import TokenBucket
from aci_p2p.network.libp2p import flood
from aci_p2p.network.libp2p.flood import Admission, FloodGuard
from tests.network.driver import make_key

NOW = 1000.0
PEERS = [make_key(number).node_id for number in range(1, 10)]
PEER, OTHER = PEERS[:2]


@pytest.fixture
def guard() -> FloodGuard:
    """Two neighbours."""
    guard = FloodGuard()
    guard.add_peer(PEER, NOW)
    guard.add_peer(OTHER, NOW)
    return guard


def spend(guard: FloodGuard, now: float = NOW, *, entries: int = 1, size: int = 1) -> int:
    """RPCs that the neighbour gets admitted at once."""
    admitted = 0
    while guard.admit(PEER, entries, size, now) is Admission.ADMITTED:
        admitted += 1
    return admitted


def test_worthless_entries_are_bounded_at_once_and_on_average(guard: FloodGuard) -> None:
    assert spend(guard) == flood.MAX_ENTRIES
    assert guard.admit(PEER, 1, 1, NOW) is Admission.FLOODING
    assert spend(guard, NOW + 1) == flood.ENTRIES_PER_SECOND
    assert spend(guard, NOW + 1000) == flood.MAX_ENTRIES
    assert guard.admit(OTHER, 1, 1, NOW) is Admission.ADMITTED


def test_worthless_bytes_are_bounded_at_once_and_on_average(guard: FloodGuard) -> None:
    assert spend(guard, size=1 << 16) == flood.MAX_BYTES / (1 << 16)
    assert spend(guard, NOW + 1, size=1 << 16) == flood.BYTES_PER_SECOND / (1 << 16)
    assert spend(guard, NOW + 1000, size=1 << 16) == flood.MAX_BYTES / (1 << 16)


def test_an_overdraft_is_worked_off(guard: FloodGuard) -> None:
    guard.admit(PEER, int(flood.MAX_ENTRIES), 1, NOW)
    assert guard.admit(PEER, 512, 1, NOW + 0.5) is Admission.ADMITTED
    assert guard.admit(PEER, 1, 1, NOW + 5) is Admission.FLOODING
    assert guard.admit(PEER, 1, 1, NOW + 6) is Admission.ADMITTED


def test_valid_messages_are_free_at_any_rate_from_every_neighbour(guard: FloodGuard) -> None:
    for _ in range(10 * int(flood.MAX_ENTRIES)):
        assert guard.admit(PEER, 1, 1000, NOW) is Admission.ADMITTED
        guard.circulates(1000)
        assert guard.admit(OTHER, 1, 1000, NOW) is Admission.ADMITTED


def test_a_copy_for_each_is_free_and_more_are_not(guard: FloodGuard) -> None:
    admitted = 0
    for _ in range(100_000):
        guard.circulates(10)
        copies = [guard.admit(PEER, 1, 10, NOW) for _ in range(2)]
        admitted += 1
        if Admission.FLOODING in copies:
            break
    assert admitted == flood.MAX_ENTRIES + 1


def test_credit_does_not_pile_up(guard: FloodGuard) -> None:
    for _ in range(10 * int(flood.MAX_ENTRIES)):
        guard.circulates(1)
    assert spend(guard) == 2 * flood.MAX_ENTRIES


def test_ignored_messages_are_throttled_and_not_punished(guard: FloodGuard) -> None:
    ignored = 0
    while (admission := guard.admit(PEER, 1, 100, NOW)) is Admission.ADMITTED:
        guard.circulates(100)
        guard.ignore(PEER)
        ignored += 1
    assert admission is Admission.THROTTLED
    assert ignored == flood.MAX_IGNORED
    for _ in range(10_000):
        assert guard.admit(PEER, 1, 100, NOW) is Admission.THROTTLED
    assert guard.admit(PEER, 1, 100, NOW + 0.01) is Admission.ADMITTED
    guard.ignore(PEER)
    assert guard.admit(PEER, 1, 100, NOW + 0.01) is Admission.THROTTLED
    assert guard.admit(OTHER, 1, 1, NOW) is Admission.ADMITTED
    guard.ignore(PEERS[5])


def test_reconnecting_does_not_fill_an_account(guard: FloodGuard) -> None:
    spend(guard)
    guard.remove_peer(PEER, NOW)
    guard.add_peer(PEER, NOW)
    assert spend(guard) == 0
    guard.remove_peer(PEER, NOW)
    guard.add_peer(PEER, NOW + 1)
    assert spend(guard, NOW + 1) == flood.ENTRIES_PER_SECOND


def test_accounts_of_those_who_left_are_kept_within_limits(guard: FloodGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flood, "MAX_KNOWN_PEERS", 3)
    for number, peer in enumerate(PEERS):
        if peer not in {PEER, OTHER}:
            guard.add_peer(peer, NOW)
        guard.remove_peer(peer, NOW + number)
    assert list(guard._retained) == PEERS[-3:]
    guard.add_peer(PEER, NOW)
    guard.remove_peer(PEER, NOW + 8 + flood.RETAIN_SECONDS)
    assert list(guard._retained) == [PEERS[-1], PEER]


@given(st.lists(st.tuples(st.integers(1, 512), st.floats(0, 5), st.integers(0, 300)), max_size=40))
def test_what_is_admitted_is_bounded(steps: list[tuple[int, float, int]]) -> None:
    """By two full accounts, what has come in since, what circulates, and one RPC that overdraws."""
    guard = FloodGuard()
    guard.add_peer(PEER, NOW)
    now, admitted, circulated = NOW, 0, 0
    for entries, pause, valid in steps:
        now += pause
        for _ in range(valid):
            guard.circulates(1)
        circulated += valid
        if guard.admit(PEER, entries, entries, now) is Admission.ADMITTED:
            admitted += entries
        assert admitted <= flood.MAX_ENTRIES + flood.ENTRIES_PER_SECOND * (now - NOW) + circulated + 512


def test_token_bucket() -> None:
    bucket = TokenBucket.full(2, 10, NOW)
    assert bucket.take(10, NOW)
    assert not bucket.take(1, NOW + 0.25)
    assert bucket.take(1, NOW + 0.5)
    assert not bucket.take(11, NOW + 100)
    assert bucket.take(10, NOW + 100)
