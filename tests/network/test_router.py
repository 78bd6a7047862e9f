"""The gossipsub router alone: a machine without I/O, in time that the test decides."""

from __future__ import annotations

import pytest

from aci_p2p.network.delivery import message_id
from aci_p2p.network.libp2p import router as gossipsub
from aci_p2p.network.libp2p.upstream import RPC, ControlIHave, ControlIWant, ControlMessage
from aci_p2p.network.libp2p.upstream import GossipsubMessage as Message
from aci_p2p.network.limits import MAX_TOPICS_PER_PEER, SEEN_SECONDS
from tests.network.driver import TOPIC
from tests.network.router_node import NOW, PEER, PEERS, Node, graft, prune, publication


@pytest.fixture
def node() -> Node:
    """A router that has joined the topic."""
    return Node.joined()


def test_new_neighbour_hears_of_our_subscriptions(node: Node) -> None:
    node.router.greet(PEER)
    assert [option.topicid for option in node.take(PEER).subscriptions] == [TOPIC]


def test_neighbours_hear_when_we_join_and_leave() -> None:
    node = Node()
    node.router.add_peer(PEER, "", NOW)
    assert not node.sent
    node.router.join(TOPIC, NOW)
    node.router.leave(TOPIC, NOW)
    assert [(option.topicid, option.subscribe) for option in node.take(PEER).subscriptions] == [
        (TOPIC, True),
        (TOPIC, False),
    ]


def test_subscriber_is_grafted_at_once(node: Node) -> None:
    node.neighbours(PEER)
    assert node.router.mesh(TOPIC) == {PEER}
    assert [one.topicID for one in node.take(PEER).control.graft] == [TOPIC]


def test_graft_is_repeated_when_the_stream_opens_late(node: Node) -> None:
    node.receive(PEER, RPC(subscriptions=[RPC.SubOpts(subscribe=True, topicid=TOPIC)]))
    node.sent.clear()  # the stream was not open yet
    node.router.greet(PEER)
    assert [one.topicID for one in node.take(PEER).control.graft] == [TOPIC]


def test_mesh_is_filled_to_the_degree(node: Node) -> None:
    node.neighbours(*PEERS[:20])
    assert gossipsub.DEGREE_LOW <= len(node.router.mesh(TOPIC)) <= gossipsub.DEGREE
    for peer in list(node.router.mesh(TOPIC))[:3]:
        node.router.remove_peer(peer, NOW)
    node.heartbeats(1)
    assert len(node.router.mesh(TOPIC)) == gossipsub.DEGREE


def test_full_mesh_refuses_a_graft(node: Node) -> None:
    node.neighbours(*PEERS[:14])
    for peer in PEERS[:14]:
        node.receive(peer, graft())
    assert len(node.router.mesh(TOPIC)) == gossipsub.DEGREE_HIGH
    refused = [peer for peer in PEERS[:14] if node.take(peer).control.prune]
    assert len(refused) == 2


def test_graft_for_a_topic_we_have_not_joined_is_ignored(node: Node) -> None:
    node.receive(PEER, graft("test/other"))
    assert not node.sent


def test_graft_without_a_subscription_is_refused(node: Node) -> None:
    node.receive(PEER, graft())
    assert PEER not in node.router.mesh(TOPIC)
    assert node.take(PEER).control.prune


def test_pruned_neighbour_is_left_alone_until_its_backoff_is_over(node: Node) -> None:
    node.neighbours(PEER)
    node.receive(PEER, prune(30))
    assert not node.router.mesh(TOPIC)
    node.router.heartbeat(NOW + 29)
    assert not node.router.mesh(TOPIC)
    node.router.heartbeat(NOW + 30)
    assert node.router.mesh(TOPIC) == {PEER}


def test_backoff_has_a_limit(node: Node) -> None:
    node.neighbours(PEER)
    node.receive(PEER, prune(2**63))
    node.router.heartbeat(NOW + gossipsub.MAX_BACKOFF_SECONDS)
    assert node.router.mesh(TOPIC) == {PEER}


def test_graft_within_the_backoff_is_refused(node: Node) -> None:
    node.neighbours(PEER)
    node.receive(PEER, prune(30))
    node.receive(PEER, graft(), NOW + 10)
    assert not node.router.mesh(TOPIC)
    assert node.take(PEER).control.prune


def test_prune_does_not_shorten_a_backoff(node: Node) -> None:
    node.neighbours(PEER)
    node.receive(PEER, prune(30))
    node.receive(PEER, prune(1))
    node.receive(PEER, graft(), NOW + 10)
    assert not node.router.mesh(TOPIC)


def test_one_that_comes_back_may_have_forgotten_the_backoff(node: Node) -> None:
    node.neighbours(PEER)
    for _ in range(20):
        # A command ends, and the next one begins: a process with the same key and no memory.
        node.receive(PEER, prune(30))
        node.router.remove_peer(PEER, NOW)
        node.router.add_peer(PEER, "", NOW)
        node.neighbours(PEER)
        node.receive(PEER, graft())
    assert node.router.scores.score(PEER) == 0
    assert node.router.mesh(TOPIC) == {PEER}


def test_unsubscribing_leaves_the_mesh(node: Node) -> None:
    node.neighbours(PEER)
    node.receive(PEER, RPC(subscriptions=[RPC.SubOpts(subscribe=False, topicid=TOPIC)]))
    assert not node.router.mesh(TOPIC)
    assert not node.router.subscribers(TOPIC)


def test_own_message_floods_to_all_subscribers_once(node: Node) -> None:
    node.neighbours(*PEERS[:20])
    node.sent.clear()
    node.router.publish(TOPIC, b"hello", NOW)
    node.router.publish(TOPIC, b"hello", NOW + 1)
    assert set(node.sent) == set(PEERS[:20])
    assert all([message.data for message in node.take(peer).publish] == [b"hello"] for peer in PEERS[:20])


def test_message_carries_nothing_but_topic_and_data(node: Node) -> None:
    node.neighbours(PEER)
    node.take(PEER)
    node.router.publish(TOPIC, b"hello", NOW)
    (message,) = node.take(PEER).publish
    assert {descriptor.name for descriptor, _ in message.ListFields()} == {"data", "topicIDs"}


def test_message_is_new_once(node: Node) -> None:
    assert node.receive(PEERS[0], publication(b"hello")) == [b"hello"]
    assert node.receive(PEERS[1], publication(b"hello")) == []
    assert node.receive(PEERS[1], publication(b"hello"), NOW + SEEN_SECONDS - 1) == []
    assert node.receive(PEERS[1], publication(b"hello"), NOW + SEEN_SECONDS) == [b"hello"]


def test_own_message_that_comes_back_is_not_new(node: Node) -> None:
    node.router.publish(TOPIC, b"hello", NOW)
    assert node.receive(PEER, publication(b"hello")) == []


def test_message_of_another_topic_is_ignored(node: Node) -> None:
    assert node.receive(PEER, publication(b"hello", "test/other")) == []


def test_accepted_message_goes_on_to_the_mesh_but_not_back(node: Node) -> None:
    node.neighbours(*PEERS[:4])
    (incoming,) = node.router.receive(PEER, publication(b"hello"), NOW)
    node.sent.clear()
    node.router.forward(incoming, PEER)
    assert set(node.sent) == set(PEERS[1:4])


@pytest.mark.parametrize("field", ["from_id", "seqno", "signature", "key"])
def test_message_with_fields_of_the_signing_policy_is_a_breach(node: Node, field: str) -> None:
    message = Message(data=b"hello", topicIDs=[TOPIC])
    setattr(message, field, b"x")
    (incoming,) = node.router.receive(PEER, RPC(publish=[message]), NOW)
    assert incoming.policy_breach


def test_message_is_announced_outside_the_mesh_for_three_heartbeats(node: Node) -> None:
    node.neighbours(*PEERS[:20])
    node.router.publish(TOPIC, b"hello", NOW)
    for heartbeat in range(5):
        node.sent.clear()
        node.heartbeats(1)
        told = {peer for peer in PEERS if node.take(peer).control.ihave}
        assert len(told) == (gossipsub.DEGREE_LAZY if heartbeat < gossipsub.HISTORY_GOSSIP else 0)
        assert not told & node.router.mesh(TOPIC)


def test_pruned_neighbour_still_hears_of_messages(node: Node) -> None:
    node.neighbours(PEER)
    node.receive(PEER, prune(60))
    (incoming,) = node.router.receive(PEERS[1], publication(b"hello"), NOW)
    node.router.forward(incoming, PEERS[1])
    node.sent.clear()
    node.heartbeats(1)
    (ihave,) = node.take(PEER).control.ihave
    assert list(ihave.messageIDs) == [message_id(TOPIC, b"hello")]


def test_announced_message_is_asked_for_unless_it_was_seen(node: Node) -> None:
    node.router.publish(TOPIC, b"known", NOW)
    known, unknown = message_id(TOPIC, b"known"), message_id(TOPIC, b"unknown")
    node.receive(PEER, RPC(control=ControlMessage(ihave=[ControlIHave(topicID=TOPIC, messageIDs=[known, unknown])])))
    (iwant,) = node.take(PEER).control.iwant
    assert list(iwant.messageIDs) == [unknown]


def test_what_is_asked_of_one_neighbour_is_bounded(node: Node) -> None:
    for start in range(20):
        identifiers = [bytes([start, number]).ljust(32) for number in range(100)]
        ihave = ControlIHave(topicID=TOPIC, messageIDs=identifiers)
        node.receive(PEER, RPC(control=ControlMessage(ihave=[ihave])))
    assert sum(len(one.messageIDs) for one in node.take(PEER).control.iwant) == gossipsub.MAX_IHAVE_IDS
    node.heartbeats(1)
    node.receive(PEER, RPC(control=ControlMessage(ihave=[ControlIHave(topicID=TOPIC, messageIDs=[b"new".ljust(32)])])))
    assert node.take(PEER).control.iwant


def test_recent_message_is_sent_on_request_a_few_times(node: Node) -> None:
    node.neighbours(PEER)
    node.router.publish(TOPIC, b"hello", NOW)
    node.take(PEER)
    iwant = RPC(control=ControlMessage(iwant=[ControlIWant(messageIDs=[message_id(TOPIC, b"hello")] * 10)]))
    node.receive(PEER, iwant)
    assert len(node.take(PEER).publish) == gossipsub.MAX_RETRANSMISSIONS
    node.heartbeats(gossipsub.HISTORY_LENGTH)
    node.neighbours(PEERS[1])
    node.take(PEERS[1])
    node.receive(PEERS[1], iwant)
    assert not node.take(PEERS[1]).publish


def test_late_subscriber_gets_recent_messages(node: Node) -> None:
    node.router.publish(TOPIC, b"hello", NOW)
    node.neighbours(PEER)
    assert [message.data for message in node.take(PEER).publish] == [b"hello"]


def test_subscriptions_of_one_peer_are_bounded(node: Node) -> None:
    for number in range(2 * MAX_TOPICS_PER_PEER):
        node.neighbours(PEER, topic=f"test/{number}")
    assert len(node.router._neighbours[PEER].topics) == MAX_TOPICS_PER_PEER


def test_publishing_without_joining_keeps_a_fanout() -> None:
    node = Node()
    node.neighbours(*PEERS[:20])
    node.router.publish(TOPIC, b"hello", NOW)
    assert len(node.router._fanout[TOPIC][0]) == gossipsub.DEGREE
    node.router.heartbeat(NOW + gossipsub.FANOUT_SECONDS)
    assert node.router._fanout
    node.router.heartbeat(NOW + gossipsub.FANOUT_SECONDS + 1)
    assert not node.router._fanout


def test_leaving_prunes_the_mesh(node: Node) -> None:
    node.neighbours(PEER)
    node.take(PEER)
    node.router.leave(TOPIC, NOW)
    rpc = node.take(PEER)
    assert [(one.topicID, one.backoff) for one in rpc.control.prune] == [(TOPIC, gossipsub.UNSUBSCRIBE_BACKOFF_SECONDS)]
    assert not node.router.mesh(TOPIC)


def test_nothing_is_kept_of_a_peer_that_left(node: Node) -> None:
    node.neighbours(PEER)
    node.router.remove_peer(PEER, NOW)
    assert node.receive(PEER, RPC(subscriptions=[RPC.SubOpts(subscribe=True, topicid=TOPIC)])) == []
    assert not node.router.subscribers(TOPIC)
    assert not node.router.mesh(TOPIC)
    node.heartbeats(1, NOW + gossipsub.MAX_BACKOFF_SECONDS + 1)
    assert not node.router._backoff
