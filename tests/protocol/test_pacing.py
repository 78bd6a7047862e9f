"""A topic carries the same number of asks whatever the number of providers: a pure simulation, and the single rules."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import replace

import pytest

from aci_p2p.protocol.pacing import (
    ASKS_PER_SECOND,
    CHANGE_GAP_MS,
    CREDITS,
    CROWD,
    LIFETIME_MS,
    LISTEN_MS,
    MAX_INTERVAL_MS,
    RENEW_MS,
    WINDOW_MS,
    AskPacer,
    is_urgent,
)
from aci_p2p.protocol.publications import PriceStep
from tests.protocol.asking import ASK, ask_of, chance

MINUTE = 60_000
BUSY = replace(ASK, free_slots=0)


class Topic:
    """Providers that hear all of each other at once, and flap between busy and free if they are told to."""

    def __init__(self, providers: int, *, flapping_ms: int = 0, seed: int = 1) -> None:
        self.random = chance(seed)
        self.now = 0
        self.said: list[tuple[int, int]] = []
        """(milliseconds, provider)."""
        self._live: deque[tuple[int, int]] = deque()
        self._counts: Counter[int] = Counter()
        self._pacers: list[AskPacer] = []
        self._heard: list[int] = []
        self._looks: list[tuple[int, int]] = []
        self._flapping_ms = flapping_ms
        for _ in range(providers):
            self.join()

    def join(self) -> int:
        """One more provider, from now on."""
        self._pacers.append(AskPacer(self.random, self.now))
        self._heard.append(len(self.said))
        heapq.heappush(self._looks, (self.now, len(self._pacers) - 1))
        return len(self._pacers) - 1

    def run(self, until: int) -> None:
        """Let time pass, milliseconds."""
        while self._looks[0][0] < until:
            self.now, provider = heapq.heappop(self._looks)
            self._look(provider)
        self.now = until

    def _look(self, provider: int) -> None:
        pacer = self._pacers[provider]
        while self._live and self._live[0][0] <= self.now - LIFETIME_MS:
            _, gone = self._live.popleft()
            self._counts[gone] -= 1
            if not self._counts[gone]:
                del self._counts[gone]
        ask = ASK
        if self._flapping_ms and (self.now // self._flapping_ms + provider) % 2:
            ask = BUSY
        pacer.observe(len(self.said) - self._heard[provider], len(self._counts) - (provider in self._counts), self.now)
        if pacer.is_due(ask, self.now):
            pacer.published(ask, self.now)
            self.said.append((self.now, provider))
            self._live.append((self.now, provider))
            self._counts[provider] += 1
        self._heard[provider] = len(self.said)
        look = pacer.next_look(ask, self.now)
        if self._flapping_ms:
            look = min(look, (self.now // self._flapping_ms + 1) * self._flapping_ms)
        heapq.heappush(self._looks, (max(look, self.now + 1), provider))

    def per_second(self, begin: int, end: int) -> float:
        """Asks a second between two moments."""
        return sum(begin <= at < end for at, _ in self.said) * 1_000 / (end - begin)

    def book(self, at: int) -> set[int]:
        """Providers with a live ask."""
        return {provider for when, provider in self.said if at - LIFETIME_MS < when <= at}

    def shares(self, begin: int) -> Counter[int]:
        """Asks of each provider since then."""
        return Counter(provider for at, provider in self.said if at >= begin)


@pytest.mark.parametrize(
    "providers", [100, pytest.param(1_000, marks=pytest.mark.slow), pytest.param(10_000, marks=pytest.mark.slow)]
)
def test_many_providers_say_no_more_than_few(providers: int) -> None:
    """At the rate of the topic, all the time, and in bytes as in asks."""
    topic = Topic(providers)
    topic.run(10 * MINUTE)
    rates = [topic.per_second(minute * MINUTE, (minute + 1) * MINUTE) for minute in range(3, 10)]
    assert all(0.85 * ASKS_PER_SECOND < rate < 1.25 * ASKS_PER_SECOND for rate in rates), rates
    assert max(rates) * len(ask_of(1).data) < 2_500
    # All start at once; even then nobody is drowned for more than a moment.
    assert topic.per_second(0, MINUTE) < 15 * ASKS_PER_SECOND
    # The book is full, and shows others a little later.
    books = [topic.book(minute * MINUTE) for minute in (6, 8, 10)]
    assert all(len(book) > min(0.8 * ASKS_PER_SECOND * 60, 0.95 * providers) for book in books)
    if providers > 1_000:
        assert len(books[0] & books[1]) < 0.1 * len(books[0])
    # Nobody speaks for two.
    shares = topic.shares(4 * MINUTE)
    fair = 6 * 60 * ASKS_PER_SECOND / providers
    assert max(shares.values()) < 1.7 * fair + 3
    if fair > 10:
        assert min(shares[provider] for provider in range(providers)) > fair / 2


def test_few_providers_renew_their_asks_before_they_expire() -> None:
    topic = Topic(10)
    topic.run(30 * MINUTE)
    assert topic.per_second(MINUTE, 30 * MINUTE) == pytest.approx(10 * 1_000 / RENEW_MS, rel=0.1)
    assert all(topic.book(minute * MINUTE) == set(range(10)) for minute in range(1, 31))
    # They were there within a second.
    assert topic.book(LISTEN_MS) == set(range(10))


def test_a_hundred_that_change_all_the_time_say_no_more() -> None:
    topic = Topic(100, flapping_ms=3_000)
    topic.run(10 * MINUTE)
    rates = [topic.per_second(minute * MINUTE, (minute + 1) * MINUTE) for minute in range(3, 10)]
    assert all(0.8 * ASKS_PER_SECOND < rate < 1.3 * ASKS_PER_SECOND for rate in rates), rates


@pytest.mark.slow
def test_who_comes_late_gets_its_share() -> None:
    topic = Topic(200)
    topic.run(10 * MINUTE)
    late = {topic.join() for _ in range(20)}
    topic.run(40 * MINUTE)
    assert topic.per_second(30 * MINUTE, 40 * MINUTE) < 1.15 * ASKS_PER_SECOND
    shares = topic.shares(20 * MINUTE)
    mean_late = sum(shares[provider] for provider in late) / 20
    mean_early = sum(count for provider, count in shares.items() if provider not in late) / 200
    assert 0.8 < mean_late / mean_early < 1.25


def test_unequal_shares_become_equal() -> None:
    """Two that hear the same, of which one begins with a thousandth of the other's rate."""
    random = chance(1)
    often, seldom = AskPacer(random, 0), AskPacer(random, 0)
    for pacer, interval in ((often, 25_000.0), (seldom, 3_000_000.0)):
        pacer.published(ASK, 0)
        pacer._interval = interval
    for window in range(1, 200):
        for pacer in (often, seldom):
            pacer.observe(ASKS_PER_SECOND * WINDOW_MS // 1_000, 239, window * WINDOW_MS)
    assert often.interval_ms < seldom.interval_ms < 2.5 * often.interval_ms


def test_nobody_is_silenced_for_ever() -> None:
    pacer = AskPacer(chance(1), 0)
    pacer.published(ASK, 0)
    for second in range(1, 1_000):
        pacer.observe(10_000, 500, second * 1_000)
    assert pacer.interval_ms == MAX_INTERVAL_MS
    for second in range(1_000, 1_200):
        pacer.observe(0, 0, second * 1_000)
    assert pacer.interval_ms == RENEW_MS


# One provider.


def spoken(now: int = 1_000) -> AskPacer:
    """A pacer that has published, and has its interval at the shortest."""
    pacer = AskPacer(chance(1), 0)
    pacer.observe(0, 0, now)
    assert pacer.is_due(ASK, now)
    pacer.published(ASK, now)
    return pacer


def test_the_first_ask_comes_after_listening() -> None:
    for seed in range(20):
        pacer = AskPacer(chance(seed), 0)
        pacer.observe(0, CROWD - 1, 0)
        assert LISTEN_MS // 2 <= pacer.next_look(ASK, 0) <= LISTEN_MS
        assert not pacer.is_due(ASK, LISTEN_MS // 2 - 1)
        assert pacer.is_due(ASK, LISTEN_MS)


def test_among_many_the_first_ask_can_wait() -> None:
    waits: list[int] = []
    for seed in range(50):
        pacer = AskPacer(chance(seed), 0)
        pacer.observe(0, 10 * CROWD, 0)
        waits.append(next(at for at in range(0, 200_000, 1_000) if pacer.is_due(ASK, at)))
    assert max(waits) > 60_000
    assert min(waits) < 20_000


def test_an_ask_is_renewed_at_its_time() -> None:
    pacer = spoken()
    assert not pacer.is_due(ASK, 1_000 + RENEW_MS // 2 - 1)
    assert pacer.is_due(ASK, 1_000 + RENEW_MS * 3 // 2)
    assert pacer.next_look(ASK, 1_000) <= WINDOW_MS


def test_a_change_is_told_at_once_but_not_in_a_hurry() -> None:
    pacer = spoken()
    assert not pacer.is_due(BUSY, 1_000 + CHANGE_GAP_MS - 1)
    assert pacer.is_due(BUSY, 1_000 + CHANGE_GAP_MS)
    assert pacer.next_look(BUSY, 1_000) == 1_000 + CHANGE_GAP_MS


def test_changes_are_paid_for() -> None:
    pacer = AskPacer(chance(1), 0)
    # A topic with so many that each speaks once in a minute.
    pacer.observe(0, 239, 0)
    now = 1_000
    pacer.published(ASK, now)
    told = 0
    for turn in range(1, 100):
        now += CHANGE_GAP_MS
        if pacer.is_due(BUSY if turn % 2 else ASK, now):
            pacer.published(BUSY if turn % 2 else ASK, now)
            told += 1
        if now > 50_000:
            break
    assert told == CREDITS


def test_who_is_in_no_book_has_nothing_urgent_to_say() -> None:
    pacer = AskPacer(chance(1), 0)
    pacer.observe(0, 9_999, 0)
    pacer.published(ASK, 0)
    assert pacer.is_out(LIFETIME_MS - 1)
    assert pacer.is_due(BUSY, LIFETIME_MS - 1)
    assert not pacer.is_out(LIFETIME_MS)
    assert not pacer.is_due(BUSY, LIFETIME_MS)


def test_what_is_taken_back_is_out_no_more() -> None:
    pacer = spoken()
    pacer.published(replace(ASK, slots=0, free_slots=0), 5_000)
    assert not pacer.is_out(5_000)


def test_what_is_urgent() -> None:
    curve = (PriceStep(750, 1_500),)
    for old, new in (
        (ASK, BUSY),
        (BUSY, ASK),
        (ASK, replace(ASK, output_token_price=41)),
        (ASK, replace(ASK, region="us")),
        (replace(ASK, price_curve=curve, free_slots=2), replace(ASK, price_curve=curve, free_slots=1)),
    ):
        assert is_urgent(old, new), (old, new)
    assert not is_urgent(ASK, replace(ASK, free_slots=3, latency_ms=999))
    assert not is_urgent(replace(ASK, price_curve=curve), replace(ASK, price_curve=curve, free_slots=2))
