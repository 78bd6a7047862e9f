"""What a neighbour's score leads to in the gossipsub router; `test_score` says what the scores are."""

from __future__ import annotations

import pytest

from aci_p2p.network.delivery import message_id
from aci_p2p.network.libp2p import flood, score
from aci_p2p.network.libp2p import router as gossipsub
from aci_p2p.network.libp2p.upstream import RPC, ControlGraft, ControlIHave, ControlIWant, ControlMessage, ControlPrune
from aci_p2p.network.libp2p.upstream import GossipsubMessage as Message
from aci_p2p.protocol.identity import NodeId
from tests.network.driver import STRANGER, TOPIC
from tests.network.router_node import NOW, PEER, PEERS, Node, graft, ihave, iwant, prune, publication


@pytest.fixture
def node() -> Node:
    """A router that has joined the topic."""
    return Node.joined()


def spoil(node: Node, peer: NodeId, below: float) -> None:
    """Let a neighbour's score fall below a threshold."""
    while node.router.scores.score(peer) >= below:
        node.router.scores.reject(peer, TOPIC)


def test_negative_score_costs_the_place_in_the_mesh(node: Node) -> None:
    node.neighbours(PEER)
    spoil(node, PEER, 0)
    node.take(PEER)
    node.heartbeats(1)
    assert not node.router.mesh(TOPIC)
    (pruned,) = node.take(PEER).control.prune
    assert pruned.backoff == gossipsub.PRUNE_BACKOFF_SECONDS


def test_negative_score_keeps_out_of_the_mesh(node: Node) -> None:
    spoil(node, PEER, 0)
    node.neighbours(PEER)
    assert not node.router.mesh(TOPIC)
    node.receive(PEER, graft())
    assert not node.router.mesh(TOPIC)
    assert node.take(PEER).control.prune
    node.heartbeats(100, NOW + 100)
    assert not node.router.mesh(TOPIC)


def test_zero_is_enough_for_the_mesh(node: Node) -> None:
    node.neighbours(PEER)
    node.receive(PEER, prune(1))
    node.receive(PEER, graft(), NOW + 1)
    assert node.router.mesh(TOPIC) == {PEER}
    assert node.router.scores.score(PEER) == 0


def test_below_the_gossip_threshold_nothing_is_announced_either_way(node: Node) -> None:
    node.neighbours(PEER)
    spoil(node, PEER, score.GOSSIP_THRESHOLD)
    (incoming,) = node.router.receive(PEERS[1], publication(b"hello"), NOW)
    node.heartbeats(1)
    node.router.forward(incoming, PEERS[1])
    node.take(PEER)
    node.heartbeats(1)
    assert not node.take(PEER).control.ihave
    node.receive(PEER, ihave(bytes(32)))
    assert not node.take(PEER).control.iwant
    node.receive(PEER, iwant(incoming.message_id))
    assert not node.take(PEER).publish
    node.router.publish(TOPIC, b"ours", NOW)
    assert [message.data for message in node.take(PEER).publish] == [b"ours"]


def test_below_the_publish_threshold_nothing_is_published(node: Node) -> None:
    node.neighbours(PEER, PEERS[1])
    spoil(node, PEER, score.PUBLISH_THRESHOLD)
    node.take(PEER)
    node.router.publish(TOPIC, b"hello", NOW)
    assert not node.take(PEER).publish
    assert node.take(PEERS[1]).publish
    node.router.leave(TOPIC, NOW)
    node.router.publish(TOPIC, b"hello again", NOW)
    assert node.router._fanout[TOPIC][0] == {PEERS[1]}


def test_a_graylisted_neighbour_is_not_listened_to(node: Node) -> None:
    spoil(node, PEER, score.GRAYLIST_THRESHOLD)
    before = node.router.scores.score(PEER)
    for _ in range(1000):
        assert not node.router.admit(PEER, publication(b"hello"), 10, NOW)
    assert node.router.scores.score(PEER) < before
    assert node.router.scores.banned() == [PEER]
    assert node.router.admit(PEERS[1], publication(b"hello"), 10, NOW)


def test_a_stranger_is_not_listened_to(node: Node) -> None:
    assert not node.router.admit(STRANGER, publication(b"hello"), 10, NOW)


@pytest.mark.parametrize(
    ("rpc", "entries"),
    [
        (RPC(), 1),
        (RPC(publish=[Message(data=b"1", topicIDs=[TOPIC])] * 4), 4),
        (RPC(subscriptions=[RPC.SubOpts(subscribe=True, topicid="x")] * 4), 4),
        (RPC(control=ControlMessage(ihave=[ControlIHave()] * 4)), 4),
        (RPC(control=ControlMessage(iwant=[ControlIWant()] * 4)), 4),
        (RPC(control=ControlMessage(graft=[ControlGraft()] * 4)), 4),
        (RPC(control=ControlMessage(prune=[ControlPrune()] * 4)), 4),
    ],
    ids=["empty", "messages", "subscriptions", "ihave", "iwant", "graft", "prune"],
)
def test_a_flood_of_anything_is_dropped_and_leads_to_a_ban(node: Node, rpc: RPC, entries: int) -> None:
    admitted = 0
    while node.router.admit(PEER, rpc, 1, NOW):
        admitted += entries
    assert admitted == flood.MAX_ENTRIES
    assert node.router.scores.score(PEER) == 0
    for _ in range(200):
        node.router.admit(PEER, rpc, 1, NOW)
    assert node.router.scores.banned() == [PEER]


def test_a_flood_in_few_bytes_or_many(node: Node) -> None:
    admitted = 0
    while node.router.admit(PEER, RPC(), 1 << 18, NOW):
        admitted += 1 << 18
    assert admitted == flood.MAX_BYTES


def test_a_burst_of_valid_messages_is_admitted_whole(node: Node) -> None:
    """At any rate, from its author and from the others that pass it on."""
    node.neighbours(*PEERS[:3])
    for number in range(10_000):
        rpc = publication(b"%d" % number + bytes(1000))
        size = rpc.ByteSize()
        assert node.router.admit(PEERS[0], rpc, size, NOW)
        (incoming,) = node.router.receive(PEERS[0], rpc, NOW)
        node.router.forward(incoming, PEERS[0])
        for other in PEERS[1:3]:
            assert node.router.admit(other, rpc, size, NOW)
            assert node.router.receive(other, rpc, NOW) == []
    node.heartbeats(1)
    assert node.router.scores.score(PEERS[0]) > node.router.scores.score(PEERS[1]) > 0


def test_copies_of_our_own_messages_are_free(node: Node) -> None:
    for number in range(10_000):
        rpc = publication(b"%d" % number + bytes(1000))
        node.router.publish(TOPIC, rpc.publish[0].data, NOW)
        assert node.router.admit(PEER, rpc, rpc.ByteSize(), NOW)


def test_ignored_messages_are_throttled_without_blame(node: Node) -> None:
    admitted = 0
    for number in range(10_000):
        rpc = publication(b"%d" % number)
        if node.router.admit(PEER, rpc, rpc.ByteSize(), NOW):
            admitted += 1
            (incoming,) = node.router.receive(PEER, rpc, NOW)
            node.router.ignore(incoming, PEER)
    assert admitted == flood.MAX_IGNORED
    assert node.router.scores.score(PEER) == 0


def test_what_was_dropped_is_still_new_from_another(node: Node) -> None:
    spoil(node, PEER, score.GRAYLIST_THRESHOLD)
    assert not node.router.admit(PEER, publication(b"hello"), 10, NOW)
    assert node.receive(PEERS[1], publication(b"hello")) == [b"hello"]


def test_grafts_within_the_backoff_add_up(node: Node) -> None:
    node.neighbours(PEER)
    node.receive(PEER, prune(60))
    for _ in range(6):
        node.receive(PEER, graft())
    assert node.router.scores.score(PEER) == 0
    node.receive(PEER, graft())
    assert node.router.scores.score(PEER) == -1


def test_broken_promises_add_up(node: Node) -> None:
    for number in range(10):
        node.receive(PEER, ihave(bytes([number]).ljust(32)))
    node.router.heartbeat(NOW + gossipsub.PROMISE_SECONDS - 0.1)
    assert node.router.scores.score(PEER) == 0
    node.router.heartbeat(NOW + gossipsub.PROMISE_SECONDS)
    assert node.router.scores.score(PEER) == -16
    node.router.heartbeat(NOW + gossipsub.PROMISE_SECONDS)
    assert node.router.scores.score(PEER) > -16


def test_no_promise_counts_when_we_are_late_ourselves(node: Node) -> None:
    for number in range(10):
        node.receive(PEER, ihave(bytes([number]).ljust(32)))
    node.router.heartbeat(NOW)
    node.router.heartbeat(NOW + gossipsub.PROMISE_SECONDS)
    assert node.router.scores.score(PEER) == 0
    for number in range(10):
        node.receive(PEER, ihave(bytes([number]).ljust(32)), NOW + gossipsub.PROMISE_SECONDS)
    for second in range(1, 11):
        node.router.heartbeat(NOW + gossipsub.PROMISE_SECONDS + second)
    assert node.router.scores.score(PEER) == -16


def test_a_promise_is_kept_by_one_message_from_anybody(node: Node) -> None:
    for number in range(10):
        kept = message_id(TOPIC, b"%d" % number)
        node.receive(PEER, ihave(kept, bytes([number]).ljust(32)))
        node.receive(PEERS[1], publication(b"%d" % number))
    node.router.heartbeat(NOW + gossipsub.PROMISE_SECONDS)
    assert node.router.scores.score(PEER) == 0


def test_ids_that_are_none_are_not_asked_for(node: Node) -> None:
    node.receive(PEER, ihave(b"", b"short", bytes(33), bytes(32), bytes(32)))
    (asked,) = node.take(PEER).control.iwant
    assert list(asked.messageIDs) == [bytes(32)]


def test_better_neighbours_are_grafted_beside_useless_ones(node: Node) -> None:
    node.neighbours(*PEERS[:10])
    mesh = node.router.mesh(TOPIC)
    assert len(mesh) >= gossipsub.DEGREE_LOW
    outside = [peer for peer in PEERS[:10] if peer not in mesh]
    for peer in outside[:3]:
        for _ in range(20):
            node.router.scores.deliver(peer, TOPIC)
    node.heartbeats(gossipsub.OPPORTUNISTIC_GRAFT_HEARTBEATS - 1)
    assert node.router.mesh(TOPIC) == mesh
    node.heartbeats(1)
    added = node.router.mesh(TOPIC) - mesh
    assert len(added) == gossipsub.OPPORTUNISTIC_GRAFT_PEERS
    assert added < set(outside[:3])
    assert all(node.take(peer).control.graft for peer in added)


def test_a_useful_mesh_is_left_as_it_is(node: Node) -> None:
    node.neighbours(*PEERS[:10])
    mesh = node.router.mesh(TOPIC)
    for _ in range(gossipsub.OPPORTUNISTIC_GRAFT_HEARTBEATS):
        for peer in PEERS[:10]:
            for _ in range(20 if peer not in mesh else 5):
                node.router.scores.deliver(peer, TOPIC)
        node.heartbeats(1)
    assert node.router.mesh(TOPIC) == mesh


def test_time_in_the_mesh_and_first_deliveries_are_scored(node: Node) -> None:
    node.neighbours(PEER)
    node.heartbeats(10)
    time_in_mesh = node.router.scores.score(PEER)
    assert time_in_mesh == pytest.approx(0.1)
    (incoming,) = node.router.receive(PEER, publication(b"hello"), NOW)
    node.router.forward(incoming, PEER)
    node.heartbeats(1)
    assert node.router.scores.score(PEER) > time_in_mesh + 0.4
    node.receive(PEER, prune(60))
    node.heartbeats(1)
    assert node.router.scores.score(PEER) < 0.5
    node.router.leave(TOPIC, NOW)
    node.heartbeats(1)
    assert node.router.scores.score(PEER) == 0


def test_a_bad_name_survives_a_reconnection(node: Node) -> None:
    spoil(node, PEER, score.GRAYLIST_THRESHOLD)
    node.router.remove_peer(PEER, NOW)
    node.router.add_peer(PEER, "", NOW + 1)
    assert not node.router.admit(PEER, publication(b"hello"), 10, NOW + 1)


def test_new_subscriber_gets_so_many_recent_messages(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gossipsub, "RECENT_MESSAGES", 3)
    for number in range(5):
        node.router.publish(TOPIC, b"%d" % number, NOW)
    node.neighbours(PEER)
    assert len(node.take(PEER).publish) == 3


def test_messages_kept_for_others_are_bounded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gossipsub, "MAX_CACHE_BYTES", 30)
    for number in range(5):
        node.router.publish(TOPIC, b"%d" % number + bytes(9), NOW)
    node.neighbours(PEER)
    assert [message.data[:1] for message in node.take(PEER).publish] == [b"2", b"3", b"4"]
    node.heartbeats(gossipsub.HISTORY_LENGTH)
    assert not node.router._cache._messages
    assert node.router._cache._bytes == 0
