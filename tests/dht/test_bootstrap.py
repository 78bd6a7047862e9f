"""Whom to dial when: the machine alone, in made-up time."""

from __future__ import annotations

from math import inf
from random import Random
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.dht import bootstrap
from aci_p2p.dht.bootstrap import (
    FRESH_S,
    LOOK_AGAIN_S,
    MAX_BACK_OFF_S,
    MAX_CANDIDATES,
    MAX_DEPTH,
    MAX_DIALS,
    MAX_FRESH,
    MAX_RESOLVED,
    MIN_BACK_OFF_S,
    WANTED_PEERS,
    BootstrapReport,
    DnsAddress,
    Joiner,
    peer_of,
)
from aci_p2p.protocol.errors import LocalError, ResourceError
from aci_p2p.protocol.identity import KeyPair, NodeId

OWN: Final = KeyPair(bytes([1]) * 32).node_id
ERROR: Final = ResourceError("nobody there")


def node(number: int) -> NodeId:
    return KeyPair(number.to_bytes(32)).node_id


def at(number: int) -> str:
    """Where a node is."""
    return f"/ip4/192.0.2.1/tcp/{number}/p2p/{node(number)}"


ENOUGH: Final = {node(number) for number in range(100, 100 + WANTED_PEERS)}


@pytest.fixture
def joiner() -> Joiner:
    return Joiner(OWN, Random(5))  # noqa: S311 - the same in every run


def test_all_that_is_known_is_tried_at_once_the_named_first(joiner: Joiner) -> None:
    joiner.offer([at(1), at(2)], 0)
    joiner.name(["/dns/boot.example/tcp/9400", "/dnsaddr/boot.example", at(3)], 0)
    assert not joiner.is_settled(0)
    assert joiner.next_attempts((), 0) == ["/dns/boot.example/tcp/9400", "/dnsaddr/boot.example", at(3), at(1), at(2)]
    # They are under way.
    assert joiner.next_attempts((), 0) == []
    assert not joiner.is_settled(0)


def test_our_own_addresses_are_left_out(joiner: Joiner) -> None:
    ours = f"/ip4/192.0.2.1/tcp/1/p2p/{OWN}"
    joiner.name([ours], 0)
    joiner.offer([ours], 0)
    assert joiner.next_attempts((), 0) == []
    assert joiner.is_settled(0)
    # Of this one it shows only when it is dialled.
    joiner.name(["/dns/we.example/tcp/1"], 0)
    assert joiner.next_attempts((), 0) == ["/dns/we.example/tcp/1"]
    joiner.forget("/dns/we.example/tcp/1")
    assert joiner.next_attempts((), 1e6) == []
    assert joiner.report() == ()


def test_attempts_begin_one_wave_after_the_other(joiner: Joiner) -> None:
    joiner.offer([at(number) for number in range(1, 40)], 0)
    first = joiner.next_attempts((), 0)
    assert first == [at(number) for number in range(1, MAX_FRESH + 1)]
    joiner.failed(first[0], ERROR, 0)
    joiner.connected(first[1], 0)
    assert joiner.next_attempts({node(2)}, 0) == [at(MAX_FRESH + 1), at(MAX_FRESH + 2)]
    # Those that have not ended by then hold up the others no more.
    assert joiner.next_due({node(2)}, 0) == FRESH_S
    assert joiner.next_attempts({node(2)}, FRESH_S - 1e-3) == []
    assert len(joiner.next_attempts({node(2)}, FRESH_S)) == MAX_FRESH


def test_no_more_attempts_at_once_than_allowed(joiner: Joiner) -> None:
    joiner.offer([at(number) for number in range(1, MAX_DIALS + 50)], 0)
    tried = [address for wave in range(100) for address in joiner.next_attempts((), wave)]
    assert tried == [at(number) for number in range(1, MAX_DIALS + 1)]
    # Named ones do not wait for the others, nor these for them.
    named = [f"/ip4/192.0.2.2/tcp/{number}" for number in range(1, MAX_DIALS + 50)]
    joiner.name(named, 100)
    assert joiner.next_due((), 100) == 100
    tried = [address for wave in range(100) for address in joiner.next_attempts((), 100 + wave)]
    assert tried == named[:MAX_DIALS]
    joiner.failed(at(1), ERROR, 200)
    assert joiner.next_due((), 200) == 0
    assert joiner.next_attempts((), 200) == [at(MAX_DIALS + 1)]


def test_back_off_grows_with_full_jitter(joiner: Joiner) -> None:
    joiner.name([at(1)], 0)
    now, waits = 0.0, list[int]()
    for _ in range(400):
        assert joiner.next_attempts((), now) == [at(1)]
        joiner.failed(at(1), ERROR, now)
        assert joiner.next_attempts((), now + MIN_BACK_OFF_S - 0.01) == []
        wait = next(wait for wait in range(int(MAX_BACK_OFF_S) + 2) if joiner._named[at(1)].due <= now + wait)
        waits.append(wait)
        now += wait
    assert all(wait <= min(2**tries, MAX_BACK_OFF_S) for tries, wait in enumerate(waits, 1))
    # In the end anything up to the longest, evenly.
    late = waits[20:]
    assert max(late) > 0.95 * MAX_BACK_OFF_S
    assert min(late) < 0.05 * MAX_BACK_OFF_S
    assert 0.4 * MAX_BACK_OFF_S < sum(late) / len(late) < 0.6 * MAX_BACK_OFF_S


def test_success_ends_the_back_off(joiner: Joiner) -> None:
    joiner.offer([at(1)], 0)
    for now in range(0, 4_000, 400):
        assert joiner.next_attempts((), now) == [at(1)]
        joiner.failed(at(1), ERROR, now)
    assert joiner.next_attempts((), 5_000) == [at(1)]
    joiner.connected(at(1), 5_000)
    assert joiner.next_attempts({node(1)}, 5_010) == []
    # Lost, but perhaps by many others, too.
    assert joiner.next_attempts({node(9)}, 5_020) == []
    assert joiner.next_attempts({node(9)}, 5_020 + MIN_BACK_OFF_S) == [at(1)]


def test_when_all_peers_are_lost_everything_is_tried_again_soon(joiner: Joiner) -> None:
    joiner.name([at(1)], 0)
    joiner.offer([at(2)], 0)
    joiner.next_attempts((), 0)
    joiner.connected(at(1), 0)
    for now in range(0, 4_000, 400):
        joiner.next_attempts({node(1)}, now)
        joiner.failed(at(2), ERROR, now)
    joiner._named[at(1)].due = joiner._others[at(2)].due = 4_200
    assert joiner.next_attempts({node(1)}, 3_601) == []
    # Not all in one moment: many nodes may have lost the same one.
    assert joiner.next_attempts((), 3_602) == []
    assert set(joiner.next_attempts((), 3_602 + MIN_BACK_OFF_S)) == {at(1), at(2)}


def test_content_with_enough_peers_but_for_a_look_at_the_named(joiner: Joiner) -> None:
    """Through which two halves of a network find each other again."""
    joiner.name([at(1)], 0)
    joiner.offer([at(2)], 0)
    assert joiner.next_attempts(ENOUGH, 0) == [at(1)]
    joiner.connected(at(1), 0)
    assert joiner.next_attempts(ENOUGH, LOOK_AGAIN_S / 2 - 1) == []
    assert joiner.next_attempts(ENOUGH, LOOK_AGAIN_S * 1.5) == [at(1)]
    few = set(list(ENOUGH)[1:])
    assert joiner.next_attempts(few, LOOK_AGAIN_S * 1.5) == [at(2)]


def test_who_is_connected_is_not_dialled(joiner: Joiner) -> None:
    joiner.name([at(1)], 0)
    assert joiner.next_attempts({node(1)}, 0) == []
    assert joiner.report() == (BootstrapReport(at(1), reached=True, attempts=0, failures=()),)


def test_it_says_when_to_look_again(joiner: Joiner) -> None:
    assert joiner.next_due((), 9) == inf
    joiner.name([at(1)], 0)
    joiner.offer([at(2)], 5)
    assert joiner.next_due((), 9) == 0
    joiner.next_attempts((), 5)
    # All are under way.
    assert joiner.next_due((), 9) == inf
    joiner.failed(at(1), ERROR, 6)
    joiner.failed(at(2), ERROR, 6)
    due = joiner.next_due((), 9)
    assert 6 + MIN_BACK_OFF_S <= due <= 6 + 2 * MIN_BACK_OFF_S
    assert joiner.next_attempts((), due - 1e-3) == []
    assert joiner.next_attempts((), due) != []


def test_who_is_connected_and_who_is_not_wanted_makes_nobody_look(joiner: Joiner) -> None:
    joiner.name([at(1)], 0)
    joiner.offer([at(2)], 0)
    peers = {node(1), *ENOUGH}
    assert joiner.next_attempts(peers, 0) == []
    assert joiner.next_due(peers, 1e6) == inf
    # Lost while there are others: as after any success.
    assert joiner.next_attempts(ENOUGH, 1e6) == []
    assert LOOK_AGAIN_S / 2 <= joiner.next_due(ENOUGH, 1e6) - 1e6 <= LOOK_AGAIN_S * 1.5
    # Lost when peers are wanted: soon.
    joiner.next_attempts(peers, 1e6)
    few = set(list(ENOUGH)[1:])
    assert joiner.next_attempts(few, 2e6) == [at(2)]
    assert joiner.next_due(few, 2e6) - 2e6 <= MIN_BACK_OFF_S


def test_with_all_attempts_under_way_there_is_nothing_to_look_for(joiner: Joiner) -> None:
    joiner.offer([at(number) for number in range(1, MAX_DIALS + 2)], 0)
    for wave in range(MAX_DIALS // MAX_FRESH):
        joiner.next_attempts((), wave)
    assert joiner.next_due((), 100) == inf
    joiner.failed(at(1), ERROR, 100)
    assert joiner.next_due((), 100) == 0


def test_candidates_are_bounded_and_those_that_fail_go_first(joiner: Joiner) -> None:
    many = [f"/ip4/192.0.2.1/tcp/{number}" for number in range(1, MAX_CANDIDATES + 1)]
    joiner.offer(many, 0)
    joiner.offer(["/ip4/192.0.2.2/tcp/1"], 0)
    assert len(joiner._others) == MAX_CANDIDATES
    assert "/ip4/192.0.2.2/tcp/1" not in joiner._others
    for _ in range(2):
        joiner.failed(many[7], ERROR, 0)
    joiner.failed(many[8], ERROR, 0)
    joiner.offer(["/ip4/192.0.2.2/tcp/1", "/ip4/192.0.2.2/tcp/2", "/ip4/192.0.2.2/tcp/3"], 0)
    assert len(joiner._others) == MAX_CANDIDATES
    assert not {many[7], many[8]} & set(joiner._others)
    assert "/ip4/192.0.2.2/tcp/2" in joiner._others
    # Named ones always have room.
    joiner.name(["/ip4/192.0.2.3/tcp/1"], 0)
    assert joiner.next_attempts((), 0)[0] == "/ip4/192.0.2.3/tcp/1"


def test_hearsay_that_is_no_address_is_forgotten(joiner: Joiner) -> None:
    joiner.offer(["nonsense", "/dnsaddr/evil.example"], 0)
    # Nobody makes us ask name servers for what it likes.
    assert joiner.next_attempts((), 0) == ["nonsense"]
    joiner.failed("nonsense", LocalError("no address"), 0)
    assert joiner.next_attempts((), 1e6) == []


# Names that lead to names.


def test_what_is_behind_a_dnsaddr_is_tried_at_once(joiner: Joiner) -> None:
    joiner.name(["/dnsaddr/boot.example"], 0)
    assert joiner.next_attempts((), 0) == ["/dnsaddr/boot.example"]
    joiner.resolved("/dnsaddr/boot.example", [at(1), at(2), f"/ip4/192.0.2.9/tcp/9/p2p/{OWN}"], 1)
    assert joiner.next_attempts((), 1) == [at(1), at(2)]
    joiner.failed(at(1), ERROR, 2)
    assert joiner.report() == (BootstrapReport("/dnsaddr/boot.example", False, 1, ((at(1), ERROR),)),)  # noqa: FBT003
    joiner.connected(at(2), 2)
    assert joiner.report() == (BootstrapReport("/dnsaddr/boot.example", True, 1, ((at(1), ERROR),)),)  # noqa: FBT003
    assert joiner.is_settled(2)


def test_it_is_resolved_again_as_nodes_move(joiner: Joiner) -> None:
    joiner.name(["/dnsaddr/boot.example"], 0)
    joiner.next_attempts((), 0)
    joiner.resolved("/dnsaddr/boot.example", [at(1)], 0)
    joiner.next_attempts((), 0)
    joiner.failed(at(1), ERROR, 0)
    later = LOOK_AGAIN_S * 1.5
    assert set(joiner.next_attempts((), later)) == {"/dnsaddr/boot.example", at(1)}
    joiner.resolved("/dnsaddr/boot.example", [at(2)], later)
    assert joiner.next_attempts((), later) == [at(2)]


def test_names_that_lead_in_circles_end(joiner: Joiner) -> None:
    names = [f"/dnsaddr/{number}.example" for number in range(MAX_DEPTH + 3)]
    joiner.name(names[:1], 0)
    for depth in range(MAX_DEPTH + 1):
        assert joiner.next_attempts((), 0) == [names[depth]]
        joiner.resolved(names[depth], [names[0], names[depth + 1]], 0)
    # One too deep is not followed, nor one that was asked already.
    assert joiner.next_attempts((), 0) == []
    (report,) = joiner.report()
    assert [address for address, _ in report.failures] == [names[MAX_DEPTH]]


def test_a_name_that_leads_nowhere_or_too_far(joiner: Joiner) -> None:
    joiner.name(["/dnsaddr/boot.example"], 0)
    joiner.next_attempts((), 0)
    joiner.resolved("/dnsaddr/boot.example", [], 0)
    ((address, error),) = joiner.report()[0].failures
    assert (address, error.message) == ("/dnsaddr/boot.example", "its TXT records hold no address to dial")
    joiner.next_attempts((), 10)
    many = [f"/ip4/192.0.2.1/tcp/{number}" for number in range(1, MAX_RESOLVED + 10)]
    joiner.resolved("/dnsaddr/boot.example", many, 10)
    assert len(joiner._others) == MAX_RESOLVED


def test_dnsaddr_forms() -> None:
    assert DnsAddress.parse("/dnsaddr/Boot.Example") == DnsAddress("boot.example", None)
    assert DnsAddress.parse(f"/dnsaddr/boot.example/p2p/{OWN}") == DnsAddress("boot.example", OWN)
    assert DnsAddress.parse("/dns4/boot.example/tcp/1") is None
    for wrong in ("/dnsaddr/", "/dnsaddr/a b", "/dnsaddr/a/tcp/1", "/dnsaddr/a/p2p/x", f"/dnsaddr/{'a' * 300}"):
        with pytest.raises(LocalError):
            DnsAddress.parse(wrong)
        with pytest.raises(LocalError):
            Joiner(OWN, Random(1)).name([wrong], 0)  # noqa: S311 - no secret


def test_whom_an_address_leads_to() -> None:
    assert peer_of(at(3)) == node(3)
    assert peer_of(f"/p2p/{OWN}") == OWN
    for silent in ("", "/", "p2p", "/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.1/tcp/1/p2p/x", "/p2p/"):
        assert peer_of(silent) is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 8), st.floats(0, 50)), max_size=80))
def test_whatever_happens_the_machine_holds(steps: list[tuple[int, int, float]]) -> None:
    """Never more attempts than allowed, never the same twice at once, never an end to trying what is named."""
    joiner = Joiner(OWN, Random(7))  # noqa: S311 - the same in every run
    joiner.name([at(1), "/dnsaddr/boot.example"], 0)
    now, busy, peers = 0.0, set[str](), set[NodeId]()
    for what, number, passed in steps:
        now += passed
        if what == 0:
            new = joiner.next_attempts(peers, now)
            assert not busy & set(new)
            assert len(new) == len(set(new))
            busy |= set(new)
            assert len(busy) <= MAX_DIALS
        elif what == 1:
            joiner.offer([at(number)], now)
        elif what == 2:
            peers ^= {node(number)}
        elif busy:
            address = sorted(busy)[number % len(busy)]
            busy.discard(address)
            if what == 3:
                joiner.failed(address, ERROR, now)
            elif address.startswith("/dnsaddr"):
                joiner.resolved(address, [at(number)], now)
            else:
                joiner.connected(address, now)
    for address in busy:
        joiner.failed(address, ERROR, now)
    rest = joiner.next_attempts((), now + 10) + joiner.next_attempts((), now + 1_000)
    assert {at(1), "/dnsaddr/boot.example"} <= set(rest)
    assert bootstrap.MAX_BACK_OFF_S < 1_000


def test_failures_are_kept_without_frames(joiner: Joiner) -> None:
    address = at(1)
    joiner.name([address], 0)
    joiner.next_attempts(set(), 0)
    try:
        try:
            int("")
        except ValueError as cause:
            msg = "refused"
            raise ResourceError(msg) from cause
    except ResourceError as error:
        joiner.failed(address, error, 1)
    ((_, failure),) = joiner.report()[0].failures
    assert failure.message == "refused"
    assert (failure.__traceback__, failure.__cause__, failure.__context__) == (None, None, None)
