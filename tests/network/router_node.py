"""A gossipsub router alone, for tests: a machine without I/O, in time that the test decides."""

from __future__ import annotations

from collections import defaultdict
from random import Random
from typing import Self

from aci_p2p.network.libp2p.router import Router
from aci_p2p.network.libp2p.upstream import RPC, ControlGraft, ControlIHave, ControlIWant, ControlMessage, ControlPrune
from aci_p2p.network.libp2p.upstream import GossipsubMessage as Message
from aci_p2p.protocol.identity import NodeId
from tests.network.driver import TOPIC, make_key

NOW = 1000.0
PEERS = [make_key(number).node_id for number in range(1, 31)]
PEER = PEERS[0]


class Node:
    """A router and what it has sent."""

    def __init__(self) -> None:
        self.sent: defaultdict[NodeId, list[RPC]] = defaultdict(list)
        self.router = Router(lambda peer, rpc: self.sent[peer].append(rpc), Random(1))  # noqa: S311

    def take(self, peer: NodeId) -> RPC:
        """Everything sent to a peer since last time, in one."""
        joined = RPC()
        for rpc in self.sent.pop(peer, []):
            joined.MergeFrom(rpc)
        return joined

    def neighbours(self, *peers: NodeId, topic: str = TOPIC) -> None:
        """Peers connect and subscribe to a topic."""
        for peer in peers:
            if peer not in self.router._neighbours:
                self.router.add_peer(peer, "", NOW)
                self.router.greet(peer)
            self.receive(peer, RPC(subscriptions=[RPC.SubOpts(subscribe=True, topicid=topic)]))

    def receive(self, peer: NodeId, rpc: RPC, now: float = NOW) -> list[bytes]:
        """A peer sends something; the payloads that are new."""
        return [incoming.data for incoming in self.router.receive(peer, rpc, now)]

    def heartbeats(self, count: int, now: float = NOW) -> None:
        """So many heartbeats pass."""
        for number in range(count):
            self.router.heartbeat(now + number)

    @classmethod
    def joined(cls) -> Self:
        """A router that has joined the topic, with neighbours that have not."""
        node = cls()
        for peer in PEERS:
            node.router.add_peer(peer, "", NOW)
        node.router.join(TOPIC, NOW)
        node.sent.clear()
        return node


def publication(data: bytes, topic: str = TOPIC) -> RPC:
    """One message."""
    return RPC(publish=[Message(data=data, topicIDs=[topic])])


def graft(topic: str = TOPIC) -> RPC:
    """A neighbour asks to be in our mesh."""
    return RPC(control=ControlMessage(graft=[ControlGraft(topicID=topic)]))


def prune(backoff: int, topic: str = TOPIC) -> RPC:
    """A neighbour leaves our mesh."""
    return RPC(control=ControlMessage(prune=[ControlPrune(topicID=topic, backoff=backoff)]))


def ihave(*identifiers: bytes) -> RPC:
    """A neighbour announces messages."""
    return RPC(control=ControlMessage(ihave=[ControlIHave(topicID=TOPIC, messageIDs=identifiers)]))


def iwant(*identifiers: bytes) -> RPC:
    """A neighbour asks for messages."""
    return RPC(control=ControlMessage(iwant=[ControlIWant(messageIDs=identifiers)]))
