"""The log of a topic: numbered, bounded, and what it tells those who ask."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aci_p2p.gossip import log as logs
from aci_p2p.gossip.log import TopicLog
from aci_p2p.protocol.catchup import MAX_LATEST, MAX_NEWS, NO_EPOCH, Head, News, Since

NOW = 1_800_000_000_000
EPOCH, OTHER_EPOCH = b"an epoch", b"another!"
START = Since(NO_EPOCH, 0)


def identifier(number: int) -> bytes:
    """A message id of its own for each number."""
    return number.to_bytes(32)


def fill(log: TopicLog, count: int, *, first: int = 1, lifetime: int = 60_000) -> None:
    """Add numbered messages."""
    for number in range(first, first + count):
        log.add(identifier(number), b"%d" % number, NOW + lifetime, NOW)


@pytest.fixture
def log() -> TopicLog:
    return TopicLog(EPOCH)


def test_an_empty_log_has_no_news(log: TopicLog) -> None:
    assert log.since(START, NOW) == News(EPOCH, 0, 0, ())


def test_its_head_names_the_latest_messages(log: TopicLog) -> None:
    assert log.head() == Head(EPOCH, 0, ())
    fill(log, 2)
    assert log.head() == Head(EPOCH, 2, (identifier(1), identifier(2)))
    fill(log, MAX_LATEST, first=3)
    assert log.head() == Head(EPOCH, MAX_LATEST + 2, tuple(map(identifier, range(3, MAX_LATEST + 3))))
    assert log.sequence == MAX_LATEST + 2


def test_messages_are_told_in_order_and_from_where_one_left_off(log: TopicLog) -> None:
    fill(log, 3)
    assert log.since(START, NOW) == News(EPOCH, 3, 3, tuple(map(identifier, (1, 2, 3))))
    fill(log, 2, first=4)
    assert log.since(Since(EPOCH, 3), NOW) == News(EPOCH, 5, 5, tuple(map(identifier, (4, 5))))
    assert log.since(Since(EPOCH, 5), NOW) == News(EPOCH, 5, 5, ())


def test_another_epoch_begins_anew(log: TopicLog) -> None:
    fill(log, 2)
    assert log.since(Since(OTHER_EPOCH, 7), NOW) == log.since(START, NOW)
    assert log.since(Since(EPOCH, 7), NOW) == News(EPOCH, 2, 2, ())


def test_a_message_is_logged_once(log: TopicLog) -> None:
    fill(log, 1)
    fill(log, 1)
    assert (len(log), log.payload_bytes, log.since(START, NOW).head) == (1, 1, 1)


def test_a_long_answer_comes_in_pages(log: TopicLog) -> None:
    fill(log, MAX_NEWS + 10)
    first = log.since(START, NOW)
    assert (first.sequence, first.head, len(first.identifiers)) == (MAX_NEWS, MAX_NEWS + 10, MAX_NEWS)
    second = log.since(Since(EPOCH, first.sequence), NOW)
    assert second == News(EPOCH, MAX_NEWS + 10, MAX_NEWS + 10, tuple(identifier(MAX_NEWS + n) for n in range(1, 11)))


def test_expired_messages_are_neither_kept_nor_told_nor_given(log: TopicLog) -> None:
    log.add(identifier(1), b"long", NOW + 100, NOW)
    log.add(identifier(2), b"short", NOW + 10, NOW)
    log.add(identifier(3), b"over", NOW, NOW)
    assert identifier(3) not in log
    assert log.get(identifier(2), NOW + 9) == b"short"
    assert log.get(identifier(2), NOW + 10) is None
    assert log.get(identifier(3), NOW) is None
    assert log.since(START, NOW + 9).identifiers == (identifier(1), identifier(2))
    assert log.since(START, NOW + 10) == News(EPOCH, 2, 2, (identifier(1),))
    log.trim(NOW + 99)
    assert (len(log), log.payload_bytes) == (2, 9)
    log.trim(NOW + 100)
    assert (len(log), log.payload_bytes) == (0, 0)
    assert log.since(START, NOW + 100) == News(EPOCH, 2, 2, ())


def test_the_oldest_make_room(log: TopicLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_LOG_MESSAGES", 3)
    fill(log, 5)
    assert log.since(START, NOW).identifiers == tuple(map(identifier, (3, 4, 5)))
    monkeypatch.setattr(logs, "MAX_LOG_BYTES", 10)
    log.add(identifier(6), bytes(9), NOW + 100, NOW)
    assert log.since(START, NOW).identifiers == tuple(map(identifier, (5, 6)))
    assert log.payload_bytes == 10


class LogMachine(RuleBasedStateMachine):
    """Somebody follows a log that grows and expires: nothing unexpired is missed that the log still has."""

    def __init__(self) -> None:
        super().__init__()
        self.log = TopicLog(EPOCH)
        self.now = NOW
        self.added: dict[bytes, int] = {}
        self.told: set[bytes] = set()
        self.place = START

    @rule(count=st.integers(1, 300), lifetime=st.integers(1, 5_000))
    def add(self, count: int, lifetime: int) -> None:
        for _ in range(count):
            name = identifier(len(self.added))
            self.added[name] = self.now + lifetime
            self.log.add(name, bytes(len(self.added) % 7), self.now + lifetime, self.now)

    @rule(milliseconds=st.integers(1, 3_000))
    def pass_time(self, milliseconds: int) -> None:
        self.now += milliseconds

    @rule()
    def ask(self) -> None:
        news = self.log.since(self.place, self.now)
        assert self.place.sequence <= news.sequence <= news.head == len(self.added)
        assert not self.told & set(news.identifiers)
        assert all(self.added[name] > self.now for name in news.identifiers)
        assert list(news.identifiers) == sorted(news.identifiers)
        self.told |= set(news.identifiers)
        self.place = Since(news.epoch, news.sequence)
        if news.sequence == news.head:
            alive = {name for name, expires_at in self.added.items() if expires_at > self.now and name in self.log}
            assert alive <= self.told

    @invariant()
    def bounds(self) -> None:
        assert len(self.log) <= logs.MAX_LOG_MESSAGES
        assert self.log.payload_bytes <= logs.MAX_LOG_BYTES
        self.log.trim(self.now)


TestLogMachine = LogMachine.TestCase
TestLogMachine.settings = settings(max_examples=25, stateful_step_count=25)
