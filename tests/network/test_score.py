"""Peer scores alone: each term of gossipsub's, its limits, and what is kept of a peer that left."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aci_p2p.network.libp2p import score as scoring
from aci_p2p.network.libp2p.score import PeerScores, colocation_prefix, median
from tests.network.driver import STRANGER, TOPIC, make_key

NOW = 1000.0
PEERS = [make_key(number).node_id for number in range(1, 40)]
PEER = PEERS[0]
OTHER_TOPIC = "test/bids"


@pytest.fixture
def scores() -> PeerScores:
    """One neighbour."""
    scores = PeerScores()
    scores.add_peer(PEER, "", NOW)
    return scores


def heartbeats(scores: PeerScores, count: int, now: float = NOW) -> None:
    """So many heartbeats pass."""
    for number in range(count):
        scores.heartbeat(now + number)


def test_neighbours_begin_at_zero_and_strangers_stay_there(scores: PeerScores) -> None:
    scores.deliver(STRANGER, TOPIC)
    scores.reject(STRANGER, TOPIC)
    scores.penalise(STRANGER, 100)
    scores.prune(STRANGER, TOPIC)
    assert scores.score(PEER) == scores.score(STRANGER) == 0
    assert not scores.is_graylisted(PEER)
    assert not scores.banned()


def test_time_in_a_mesh_counts_until_it_is_left(scores: PeerScores) -> None:
    scores.graft(PEER, TOPIC)
    assert scores.score(PEER) == 0
    heartbeats(scores, 10)
    assert scores.score(PEER) == pytest.approx(0.1)
    heartbeats(scores, scoring.TIME_IN_MESH_CAP)
    assert scores.score(PEER) == pytest.approx(3)
    scores.prune(PEER, TOPIC)
    heartbeats(scores, 1)
    assert scores.score(PEER) == 0
    scores.graft(PEER, TOPIC)
    heartbeats(scores, 1)
    assert scores.score(PEER) == pytest.approx(0.01)


def test_first_deliveries_count_and_fade(scores: PeerScores) -> None:
    scores.deliver(PEER, TOPIC)
    assert scores.score(PEER) == 0
    heartbeats(scores, 1)
    assert 0.49 < scores.score(PEER) < 0.5
    heartbeats(scores, 99)
    assert scores.score(PEER) == pytest.approx(0.25)
    for _ in range(1000):
        scores.deliver(PEER, TOPIC)
    heartbeats(scores, 1)
    assert 9.9 < scores.score(PEER) < 10
    heartbeats(scores, 1500)
    assert scores.score(PEER) == 0


def test_all_topics_together_are_worth_so_much(scores: PeerScores) -> None:
    for topic in ("a", "b", "c"):
        scores.graft(PEER, topic)
        for _ in range(100):
            scores.deliver(PEER, topic)
    heartbeats(scores, 1)
    assert scores.score(PEER) == scoring.TOPIC_SCORE_CAP


def test_invalid_messages_cost_their_square_at_once(scores: PeerScores) -> None:
    scores.reject(PEER, TOPIC)
    assert scores.score(PEER) == -0.25
    for _ in range(3):
        scores.reject(PEER, TOPIC)
    assert scores.score(PEER) == -4
    scores.reject(PEER, OTHER_TOPIC)
    assert scores.score(PEER) == -4.25
    heartbeats(scores, 600)
    assert scores.score(PEER) == pytest.approx(-4.25 / 4)


def test_rejects_graylist_where_a_few_are_forgiven(scores: PeerScores) -> None:
    for _ in range(17):
        scores.reject(PEER, TOPIC)
    assert not scores.is_graylisted(PEER)
    scores.reject(PEER, TOPIC)
    assert scores.is_graylisted(PEER)


def test_penalties_cost_nothing_up_to_a_threshold(scores: PeerScores) -> None:
    scores.penalise(PEER, 6)
    assert scores.score(PEER) == 0
    scores.penalise(PEER, 2)
    assert scores.score(PEER) == -4
    heartbeats(scores, 60)
    assert scores.score(PEER) == 0
    scores.penalise(PEER, 4)
    assert scores.score(PEER) == pytest.approx(-4)


def test_who_goes_on_when_graylisted_is_banned(scores: PeerScores) -> None:
    for _ in range(149):
        scores.penalise(PEER, scoring.FLOOD_PENALTY)
    assert not scores.is_graylisted(PEER)
    scores.penalise(PEER, scoring.FLOOD_PENALTY)
    assert scores.is_graylisted(PEER)
    for _ in range(36):
        scores.penalise(PEER, scoring.GRAYLISTED_RPC_PENALTY)
    assert not scores.banned()
    scores.penalise(PEER, scoring.GRAYLISTED_RPC_PENALTY)
    assert scores.banned() == [PEER]


def test_who_stops_when_graylisted_comes_back(scores: PeerScores) -> None:
    scores.penalise(PEER, 16)
    assert scores.is_graylisted(PEER)
    heartbeats(scores, 20)
    assert not scores.is_graylisted(PEER)


def populate(address: str, count: int) -> PeerScores:
    """So many neighbours whose addresses share a prefix."""
    scores = PeerScores()
    for number, peer in enumerate(PEERS[:count]):
        scores.add_peer(peer, address.format(number), NOW)
    scores.heartbeat(NOW)
    return scores


@pytest.mark.parametrize("address", ["8.8.8.{}", "2606:4700::{}", "::ffff:8.8.8.{}", "fe80::1%eth{}"])
def test_colocation(address: str) -> None:
    public = not address.startswith("fe80")
    assert populate(address, 10).score(PEER) == 0
    assert populate(address, 12).score(PEER) == (-4 if public else 0)
    crowd = populate(address, 30)
    assert {crowd.score(peer) for peer in PEERS[:30]} == {scoring.COLOCATION_FLOOR if public else 0}
    for peer in PEERS[10:30]:
        crowd.remove_peer(peer, NOW)
    crowd.heartbeat(NOW)
    assert crowd.score(PEER) == 0


def test_colocation_alone_does_not_silence() -> None:
    """A data centre stays within earshot, and what a neighbour earns outweighs it."""
    assert scoring.COLOCATION_FLOOR > scoring.PUBLISH_THRESHOLD
    crowd = populate("8.8.8.{}", 30)
    crowd.graft(PEER, TOPIC)
    for _ in range(20):
        crowd.deliver(PEER, TOPIC)
    for number in range(300):
        crowd.heartbeat(NOW + number)
        crowd.deliver(PEER, TOPIC)
    crowd.heartbeat(NOW + 300)
    assert crowd.score(PEER) > 0


@pytest.mark.parametrize(
    ("address", "prefix"),
    [
        ("8.8.8.8", "8.8.8.0/24"),
        ("::ffff:8.8.8.8", "8.8.8.0/24"),
        ("2606:4700:0:1:2::3", "2606:4700:0:1::/64"),
        ("127.0.0.1", None),
        ("::1", None),
        ("10.1.2.3", None),
        ("192.168.1.2", None),
        ("fd00::1", None),
        ("fe80::1%eth0", None),
        ("loopback", None),
        ("", None),
        ("boot.aci", None),
    ],
)
def test_prefixes(address: str, prefix: str | None) -> None:
    assert colocation_prefix(address) == prefix


def test_a_bad_name_outlives_a_reconnection(scores: PeerScores) -> None:
    for _ in range(10):
        scores.reject(PEER, TOPIC)
    scores.penalise(PEER, 10)
    bad = scores.score(PEER)
    scores.remove_peer(PEER, NOW)
    assert scores.score(PEER) == 0
    scores.add_peer(PEER, "", NOW)
    assert scores.score(PEER) == bad
    scores.remove_peer(PEER, NOW)
    scores.add_peer(PEER, "", NOW + 60)
    assert bad < scores.score(PEER) < bad / 2
    scores.remove_peer(PEER, NOW + 60)
    scores.add_peer(PEER, "", NOW + 61 + scoring.RETAIN_SECONDS)
    assert scores.score(PEER) == 0


def test_a_good_name_does_not(scores: PeerScores) -> None:
    scores.graft(PEER, TOPIC)
    scores.deliver(PEER, TOPIC)
    heartbeats(scores, 10)
    assert scores.score(PEER) > 0
    scores.remove_peer(PEER, NOW)
    assert scores.retained == 0
    scores.add_peer(PEER, "", NOW)
    assert scores.score(PEER) == 0


def test_bad_names_are_kept_for_a_while_and_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MAX_RETAINED", 3)
    scores = PeerScores()
    for peer in PEERS[:5]:
        scores.add_peer(peer, "", NOW)
        scores.penalise(peer, 10)
        scores.remove_peer(peer, NOW)
    assert scores.retained == 3
    scores.add_peer(PEERS[0], "", NOW)
    scores.add_peer(PEERS[4], "", NOW)
    assert scores.score(PEERS[0]) == 0
    assert scores.score(PEERS[4]) == -16
    scores.heartbeat(NOW + scoring.RETAIN_SECONDS)
    assert scores.retained == 2
    scores.heartbeat(NOW + scoring.RETAIN_SECONDS + 1)
    assert scores.retained == 0


def test_leaving_a_topic_forgets_what_it_earned_and_keeps_what_it_cost(scores: PeerScores) -> None:
    scores.graft(PEER, TOPIC)
    for _ in range(10):
        scores.deliver(PEER, TOPIC)
    scores.reject(PEER, TOPIC)
    scores.leave(TOPIC)
    heartbeats(scores, 1)
    assert scores.score(PEER) == pytest.approx(-0.25, rel=0.01)
    scores.leave(TOPIC)
    heartbeats(scores, 4000)
    assert scores.score(PEER) == 0
    assert not scores._peers[PEER].topics


@pytest.mark.parametrize(("values", "middle"), [([], 0), ([3], 3), ([1, 5, 2], 2), ([4, 1, 3, 2], 3)])
def test_median(values: list[float], middle: float) -> None:
    assert median(values) == middle


class ScoreMachine(RuleBasedStateMachine):
    """Neighbours come, go, serve and misbehave in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = PeerScores()
        self.connected: set[int] = set()
        self.now = NOW

    peers = st.integers(0, 14)
    topics = st.sampled_from([TOPIC, OTHER_TOPIC])

    @rule(number=peers)
    def connect(self, number: int) -> None:
        if number not in self.connected:
            self.scores.add_peer(PEERS[number], f"8.8.8.{number}", self.now)
            self.connected.add(number)

    @rule(number=peers)
    def disconnect(self, number: int) -> None:
        if number in self.connected:
            before = self.scores.score(PEERS[number])
            self.scores.remove_peer(PEERS[number], self.now)
            self.scores.add_peer(PEERS[number], f"8.8.8.{number}", self.now)
            # Coming back never gains more than a place in a crowd costs.
            assert self.scores.score(PEERS[number]) <= max(before, 0) - scoring.COLOCATION_FLOOR
            self.scores.remove_peer(PEERS[number], self.now)
            self.connected.discard(number)

    @rule(number=peers, topic=topics)
    def deliver(self, number: int, topic: str) -> None:
        before = self.scores.score(PEERS[number])
        self.scores.deliver(PEERS[number], topic)
        assert self.scores.score(PEERS[number]) >= before

    @precondition(lambda self: self.connected)
    @rule(data=st.data(), topic=topics)
    def graft(self, data: st.DataObject, topic: str) -> None:
        self.scores.graft(PEERS[data.draw(st.sampled_from(sorted(self.connected)))], topic)

    @rule(number=peers, topic=topics)
    def prune(self, number: int, topic: str) -> None:
        self.scores.prune(PEERS[number], topic)

    @rule(number=peers, topic=topics, count=st.integers(1, 30))
    def reject(self, number: int, topic: str, count: int) -> None:
        before = self.scores.score(PEERS[number])
        for _ in range(count):
            self.scores.reject(PEERS[number], topic)
        assert number not in self.connected or self.scores.score(PEERS[number]) <= before + scoring.TOPIC_SCORE_CAP

    @rule(number=peers, penalty=st.floats(0, 50))
    def penalise(self, number: int, penalty: float) -> None:
        self.scores.penalise(PEERS[number], penalty)

    @rule(count=st.integers(1, 10))
    def pass_time(self, count: int) -> None:
        for _ in range(count):
            self.now += 1
            self.scores.heartbeat(self.now)

    @rule()
    def leave(self) -> None:
        self.scores.leave(TOPIC)

    @invariant()
    def bounds(self) -> None:
        for number, peer in enumerate(PEERS[:15]):
            value = self.scores.score(peer)
            assert value <= scoring.TOPIC_SCORE_CAP
            assert number in self.connected or value == 0
        assert set(self.scores.banned()) <= {PEERS[number] for number in self.connected}
        assert sum(self.scores._prefixes.values()) == len(self.connected)
        assert all(self.scores._prefixes.values())


TestScoreMachine = ScoreMachine.TestCase
TestScoreMachine.settings = settings(max_examples=25, stateful_step_count=30)
