"""Whom to ask, what to make of the answer, and how much to give: without I/O, in time that the test decides."""

from __future__ import annotations

from itertools import accumulate, pairwise
from math import inf
from random import Random

import pytest

from aci_p2p.gossip import catchup, flooding
from aci_p2p.gossip.catchup import CatchUp, Quotas
from aci_p2p.gossip.flooding import FloodWitness
from aci_p2p.protocol.catchup import MAX_FETCH, NO_EPOCH, Head, News, Since
from aci_p2p.protocol.envelope import Header, Sealer
from aci_p2p.protocol.identity import KeyPair
from aci_p2p.protocol.messages import Abort, AbortCode
from aci_p2p.protocol.replay import MAX_PER_SENDER
from aci_p2p.protocol.wire import Malformed

NOW = 1000.0
EPOCH, OTHER_EPOCH = b"an epoch", b"another!"
PEERS = [KeyPair(number.to_bytes(32)).node_id for number in range(1, 6)]
PEER, OTHER = PEERS[:2]
NOTHING = News(EPOCH, 0, 0, ())


def identifiers(*numbers: int) -> tuple[bytes, ...]:
    """Message ids, one for each number."""
    return tuple(number.to_bytes(32) for number in numbers)


@pytest.fixture
def place() -> CatchUp:
    return CatchUp(Random(1))  # noqa: S311 - the same moments in every run


def succeed(place: CatchUp, now: float, *, fetched: int = 0, news: News = NOTHING) -> None:
    """An exchange with the neighbour ends well."""
    place.succeeded(PEER, news, wanted=fetched, fetched=fetched, now=now)


# Whom to ask.


def test_nobody_is_asked_when_nobody_is_there(place: CatchUp) -> None:
    assert place.next_peer([], NOW) is None
    assert place.next_due([]) == inf


def test_new_neighbours_are_asked_one_a_second(place: CatchUp) -> None:
    asked = [place.next_peer(PEERS, NOW + number) for number in range(5)]
    assert set(asked) == set(PEERS)
    assert place.next_peer([*PEERS, KeyPair(bytes(32)).node_id], NOW + 4.5) is None
    assert place.next_peer([*PEERS, KeyPair(bytes(32)).node_id], NOW + 5) == KeyPair(bytes(32)).node_id


def test_one_that_comes_back_is_new(place: CatchUp) -> None:
    assert place.next_peer([PEER], NOW) == PEER
    assert place.next_peer([PEER], NOW + 2) is None
    assert place.next_peer([], NOW + 2) is None
    assert place.next_peer([PEER], NOW + 2.1) == PEER


def pauses(place: CatchUp, count: int, *, fetched: int) -> list[float]:
    """Seconds between two questions to the one neighbour, which each bring so much."""
    now, found = NOW, [NOW]
    while len(found) <= count:
        if place.next_peer([PEER], now) is not None:
            found.append(now)
            succeed(place, now, fetched=fetched)
        due = place.next_due([PEER])
        assert due > now
        assert place.next_peer([PEER], due - 1e-3) is None
        now = due
    return [later - earlier for earlier, later in pairwise(found[1:])]


def test_questions_come_every_few_seconds_with_jitter(place: CatchUp) -> None:
    between = pauses(place, 30, fetched=1)
    assert min(between) >= 0.5 * catchup.PULL_S
    assert max(between) <= 1.5 * catchup.PULL_S
    assert max(between) - min(between) > 2


def test_questions_that_bring_nothing_become_rare_up_to_a_limit(place: CatchUp) -> None:
    between = pauses(place, 60, fetched=0)
    for number, pause in enumerate(between):
        expected = min(catchup.PULL_S * catchup.PULL_GROWTH ** (number + 1), catchup.MAX_PULL_S)
        assert 0.5 * expected <= pause <= 1.5 * expected
    assert max(between) > catchup.MAX_PULL_S
    # A quiet day costs next to nothing.
    assert sum(after <= 24 * 3_600 for after in accumulate(between)) < 25
    # What is found, and what gossip brings, makes them frequent again.
    assert place.heard(NOW)
    assert place.next_due([PEER]) <= NOW + 1.5 * catchup.BUSY_PULL_S
    assert not place.heard(NOW)
    assert max(pauses(place, 10, fetched=1)[1:]) <= 1.5 * catchup.PULL_S


def test_what_gossip_brings_postpones_nothing(place: CatchUp) -> None:
    place.next_peer([PEER], NOW)
    for _ in range(20):
        succeed(place, NOW)
    due = place.next_due([PEER])
    assert not place.heard(due - 0.01)
    assert place.next_due([PEER]) == due


def test_all_neighbours_have_their_turn(place: CatchUp) -> None:
    asked = [place.next_peer(PEERS, NOW + number) for number in range(0, 1000, 30)]
    assert place.next_due(PEERS) < NOW + 1000 + 1.5 * catchup.PULL_S
    assert set(asked) == set(PEERS)


@pytest.mark.parametrize("empty_handed", [False, True])
def test_who_fails_is_left_alone_for_longer_each_time(place: CatchUp, *, empty_handed: bool) -> None:
    now = NOW
    for number in range(10):
        if empty_handed:
            place.succeeded(PEER, News(EPOCH, number, 10, ()), wanted=3, fetched=0, now=now)
        else:
            place.failed(PEER, now)
        quiet = min(catchup.MIN_QUIET_S * 2**number, catchup.MAX_QUIET_S)
        assert place.next_peer([PEER], now + quiet - 0.01) is None
        assert place.next_due([PEER]) >= now + quiet
        assert place.next_peer([PEER, OTHER], now + quiet - 0.01) in {OTHER, None}
        now += quiet
        while place.next_peer([PEER], now) is None:
            now += 1
    succeed(place, now, fetched=1)
    place.failed(PEER, now)
    assert place.next_peer([], now) is None
    assert place.next_peer([PEER], now + catchup.MIN_QUIET_S) == PEER


# Our place in a log.


def test_one_goes_on_where_one_left_off(place: CatchUp) -> None:
    assert place.request(PEER) == Since(NO_EPOCH, 0)
    succeed(place, NOW, news=News(EPOCH, 7, 9, identifiers(1)), fetched=1)
    assert place.request(PEER) == Since(EPOCH, 7)
    assert place.request(OTHER) == Since(NO_EPOCH, 0)
    place.failed(PEER, NOW)
    assert place.request(PEER) == Since(EPOCH, 7)


def test_so_many_places_are_remembered(place: CatchUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catchup, "MAX_NEIGHBOURS", 2)
    for peer in PEERS[:3]:
        place.succeeded(peer, News(EPOCH, 7, 7, ()), wanted=0, fetched=0, now=NOW)
    assert [place.request(peer).sequence for peer in PEERS[:3]] == [0, 7, 7]


# What neighbours tell of their logs.


def in_place(place: CatchUp) -> None:
    """We have asked the neighbours, and know the log of one up to its seventh message."""
    for number in range(3):
        place.next_peer([PEER, OTHER], NOW - 3 + number)
    succeed(place, NOW, news=News(EPOCH, 7, 7, ()))


@pytest.mark.parametrize(
    ("head", "asks"),
    [
        (Head(EPOCH, 7, ()), False),
        (Head(EPOCH, 6, identifiers(99)), False),
        (Head(EPOCH, 8, ()), True),
        (Head(EPOCH, 8, identifiers(1)), False),
        (Head(EPOCH, 8, identifiers(99)), True),
        (Head(EPOCH, 9, identifiers(1)), True),
        (Head(EPOCH, 9, identifiers(99, 1, 2)), False),
        (Head(EPOCH, 9, identifiers(1, 99)), True),
        (Head(OTHER_EPOCH, 2, identifiers(1, 2)), False),
        (Head(OTHER_EPOCH, 3, identifiers(1, 2)), True),
        (Head(OTHER_EPOCH, 0, ()), False),
    ],
)
def test_who_is_ahead_is_asked(place: CatchUp, head: Head, *, asks: bool) -> None:
    in_place(place)
    assert place.told(PEER, head, lambda one: one in identifiers(1, 2)) is asks
    assert place.next_due([PEER, OTHER]) < NOW + 1 if asks else place.next_due([PEER, OTHER]) > NOW + 1
    later = NOW + catchup.NEWCOMER_GAP_S
    assert place.next_peer([PEER, OTHER], later) == (PEER if asks else None)
    # Once, until it tells again.
    assert place.next_peer([PEER, OTHER], later + catchup.NEWCOMER_GAP_S) is None


def test_what_is_known_of_a_log_need_not_be_asked_for(place: CatchUp) -> None:
    in_place(place)
    place.told(PEER, Head(EPOCH, 8, identifiers(1)), lambda _: True)
    assert place.request(PEER) == Since(EPOCH, 8)
    place.told(PEER, Head(EPOCH, 99, identifiers(1)), lambda _: True)
    assert place.request(PEER) == Since(EPOCH, 8)


def test_who_is_gone_is_not_ahead(place: CatchUp) -> None:
    in_place(place)
    place.told(PEER, Head(EPOCH, 8, ()), lambda _: True)
    assert place.next_peer([OTHER], NOW) is None
    assert place.next_due([OTHER]) > NOW + 1


@pytest.mark.parametrize(("news", "quiet"), [(News(EPOCH, 7, 7, ()), True), (News(EPOCH, 8, 8, ()), False)])
def test_a_log_that_is_shorter_than_it_was_said_to_be(place: CatchUp, news: News, *, quiet: bool) -> None:
    in_place(place)
    place.told(PEER, Head(EPOCH, 8, ()), lambda _: False)
    place.next_peer([PEER, OTHER], NOW + 1)
    place.succeeded(PEER, news, wanted=0, fetched=0, now=NOW + 1)
    place.told(PEER, Head(EPOCH, 100, ()), lambda _: False)
    assert place.next_peer([PEER], NOW + 3) == (None if quiet else PEER)


# The answer.

SINCE = Since(EPOCH, 5)
HONEST = [
    News(EPOCH, 5, 5, ()),
    News(EPOCH, 7, 7, identifiers(1, 2)),
    News(EPOCH, 9, 9, ()),
    News(EPOCH, 7, 9, identifiers(1)),
    News(OTHER_EPOCH, 1, 1, identifiers(1)),
    News(OTHER_EPOCH, 0, 0, ()),
]
LIES = {
    "goes back": News(EPOCH, 4, 9, identifiers(1)),
    "is ahead": News(EPOCH, 9, 8, identifiers(1)),
    "more messages than numbers": News(EPOCH, 6, 9, identifiers(1, 2)),
    "more messages than numbers, from the start": News(OTHER_EPOCH, 1, 9, identifiers(1, 2)),
    "names a message twice": News(EPOCH, 9, 9, identifiers(1, 1)),
    "ends without reason": News(EPOCH, 6, 9, ()),
}


@pytest.mark.parametrize("news", HONEST)
def test_an_honest_answer(place: CatchUp, news: News) -> None:
    place.judge(SINCE, news)


@pytest.mark.parametrize(("problem", "news"), LIES.items(), ids=LIES)
def test_an_answer_that_no_honest_log_gives(place: CatchUp, problem: str, news: News) -> None:
    with pytest.raises(Malformed, match=problem.partition(",")[0]):
        place.judge(SINCE, news)


def test_what_is_known_is_not_fetched_and_the_rest_in_batches(place: CatchUp) -> None:
    news = News(EPOCH, 100, 100, identifiers(*range(100)))
    batches = place.batches(news, lambda one: one in identifiers(3, 50))
    assert [len(batch) for batch in batches] == [MAX_FETCH] * 3 + [2]
    assert [one for batch in batches for one in batch] == [
        one for one in news.identifiers if one not in identifiers(3, 50)
    ]
    assert place.batches(news, lambda _: True) == []


# Quotas.


def test_questions_are_limited_for_each() -> None:
    quotas = Quotas()
    assert sum(quotas.take_exchange(PEER, NOW) for _ in range(100)) == catchup.EXCHANGES_BURST
    assert quotas.take_exchange(OTHER, NOW)
    assert sum(quotas.take_exchange(PEER, NOW + 3) for _ in range(100)) == 3 * catchup.EXCHANGES_PER_S


def test_bytes_are_limited_for_each() -> None:
    quotas = Quotas()
    megabyte = 1 << 20
    assert sum(quotas.take_bytes(PEER, megabyte, NOW) for _ in range(100)) == catchup.BYTES_BURST / megabyte
    assert quotas.take_bytes(OTHER, megabyte, NOW)
    assert sum(quotas.take_bytes(PEER, megabyte, NOW + 8) for _ in range(100)) == 8 * catchup.BYTES_PER_S / megabyte


def test_so_many_quotas_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catchup, "MAX_NEIGHBOURS", 2)
    quotas = Quotas()
    for peer in PEERS[:3]:
        quotas.take_exchange(peer, NOW)
    assert list(quotas._quotas) == PEERS[1:3]


# Floods.


def headers(number: int, count: int, *, now: int = 0, lifetime_ms: int = 60_000) -> list[Header]:
    """What one author's messages claim."""
    sealer = Sealer(KeyPair((1000 + number).to_bytes(32)), "aci-test")
    body = Abort(bytes(32), AbortCode.BUSY, "")
    return [sealer.seal(body, now, lifetime_ms=lifetime_ms).header for _ in range(count)]


def test_who_brings_more_of_an_author_than_an_honest_node_accepts_is_a_flooder() -> None:
    witness = FloodWitness()
    (header,) = headers(1, 1)
    assert flooding.MAX_FORWARDED > MAX_PER_SENDER
    assert not any(witness.is_flooding(PEER, header, 0) for _ in range(flooding.MAX_FORWARDED))
    assert witness.is_flooding(PEER, header, 59_999)
    assert not witness.is_flooding(OTHER, header, 59_999)
    assert not witness.is_flooding(PEER, headers(2, 1)[0], 59_999)


def test_expired_messages_prove_nothing() -> None:
    """An honest node may forward any number of them in a while, each batch when the one before has expired."""
    witness = FloodWitness()
    for second in range(10):
        for header in headers(1, 1, now=1000 * second, lifetime_ms=1000) * MAX_PER_SENDER:
            assert not witness.is_flooding(PEER, header, 1000 * second)


def test_so_many_pairs_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flooding, "MAX_WITNESSED", 2)
    witness = FloodWitness()
    for number in range(3):
        witness.is_flooding(PEER, headers(number, 1)[0], 0)
    assert len(witness._expiries) == 2
