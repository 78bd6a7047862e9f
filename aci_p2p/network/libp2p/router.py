"""The gossipsub v1.1 router: who gets which message. Pure: no I/O, time and randomness are passed in.

Takes the place of py-libp2p's `GossipSub`, which keys its message cache by author and sequence number whatever the
message id function says (so unsigned messages collide), refuses IHAVE to pruned peers for a minute, mixes up the
control messages of a heartbeat, and dies of a malformed one.

Messages follow the StrictNoSign policy: no author, sequence number or signature of libp2p's, since ACI's own envelope
inside `data` is signed by its author. The message id is SHA-256(topic, 0, data). A go- or js-libp2p node takes part
when it is configured with StrictNoSign and the same message id function; one with the default StrictSign drops our
messages and has its own rejected here.

Peer exchange is left out: addresses travel as signed records. So is IDONTWANT (v1.2): it spares the duplicates of
messages that take long to transmit, but ours take a kilobyte, and an announcement costs as much as the duplicate.

Sources: https://github.com/libp2p/specs/tree/master/pubsub/gossipsub (v1.0, v1.1; names follow it)
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from aci_p2p.network.delivery import SeenCache, message_id
from aci_p2p.network.libp2p.flood import Admission, FloodGuard
from aci_p2p.network.libp2p.score import (
    ACCEPT_GRAFT_THRESHOLD,
    BACKOFF_PENALTY,
    BROKEN_PROMISE_PENALTY,
    FLOOD_PENALTY,
    GOSSIP_THRESHOLD,
    GRAYLISTED_RPC_PENALTY,
    OPPORTUNISTIC_GRAFT_THRESHOLD,
    PUBLISH_THRESHOLD,
    PeerScores,
    median,
)
from aci_p2p.network.libp2p.upstream import RPC, ControlGraft, ControlIHave, ControlIWant, ControlMessage, ControlPrune
from aci_p2p.network.libp2p.upstream import GossipsubMessage as Message
from aci_p2p.network.limits import MAX_TOPIC_BYTES, MAX_TOPICS_PER_PEER
from aci_p2p.protocol.hashing import DIGEST_BYTES
from aci_p2p.protocol.identity import NodeId

DEGREE = 6
"""Neighbours in a topic's mesh that the router aims for (D)."""
DEGREE_LOW = 4
"""Fewer neighbours than this are filled up (D_low)."""
DEGREE_HIGH = 12
"""With so many neighbours in a mesh, further grafts are refused (D_high)."""
DEGREE_LAZY = 6
"""Neighbours outside the mesh that hear of new messages in a heartbeat (D_lazy)."""
GOSSIP_FACTOR = 0.25
"""Share of the neighbours outside the mesh that hear of new messages, when that is more than D_lazy."""
HEARTBEAT_SECONDS = 1.0
"""Time between heartbeats, seconds."""
HISTORY_LENGTH = 5
"""Heartbeats for which a message can be asked for (mcache_len)."""
HISTORY_GOSSIP = 3
"""Heartbeats for which a message is announced (mcache_gossip)."""
FANOUT_SECONDS = 60.0
"""How long neighbours of a topic that we only publish to are kept, seconds."""
PRUNE_BACKOFF_SECONDS = 60
"""How long two neighbours that parted do not graft again, seconds."""
UNSUBSCRIBE_BACKOFF_SECONDS = 10
"""The same after leaving a topic, seconds."""
MAX_BACKOFF_SECONDS = 600
"""Longest back-off that a peer can ask for, seconds."""
MAX_IHAVE_IDS = 512
"""Message ids that one neighbour may announce, and that we ask of it, in a heartbeat."""
MAX_IHAVES = 16
"""IHAVE messages that one neighbour may send in a heartbeat."""
MAX_RETRANSMISSIONS = 3
"""How often one neighbour gets the same message on request."""
RECENT_MESSAGES = 1_024
"""Recent messages that a new subscriber is sent unasked; its FloodGuard has room for them."""
MAX_CACHE_BYTES = 8 << 20
"""Payload kept for neighbours that ask, bytes; beyond it the oldest messages go before their time."""
PROMISE_SECONDS = 10.0
"""Time for a neighbour to send one of the messages that it announced and we asked for, seconds; overload takes some."""
LATE_SECONDS = 3.0
"""After a pause of so many seconds between heartbeats we are overloaded, and hold no promise against anybody."""
OPPORTUNISTIC_GRAFT_HEARTBEATS = 60
"""Heartbeats between two looks for better neighbours than the mesh has."""
OPPORTUNISTIC_GRAFT_PEERS = 2
"""Neighbours grafted then."""
MESSAGE_OVERHEAD_BYTES = MAX_TOPIC_BYTES + 16
"""What a message takes in an RPC beside its payload, bytes at most: topic, protobuf's tags and lengths."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message that nobody has judged yet."""

    message_id: bytes
    """SHA-256 of topic and data."""
    topic: str
    """Its topic; we are subscribed."""
    data: bytes
    """Its payload, of any size."""
    policy_breach: bool
    """Whether it carries libp2p's author, sequence number or signature, which StrictNoSign forbids."""


@dataclass(slots=True)
class _Neighbour:
    topics: set[str] = field(default_factory=set[str])
    ihaves: int = 0
    wanted: int = 0
    promises: deque[tuple[float, list[bytes]]] = field(default_factory=deque[tuple[float, list[bytes]]])


@dataclass(slots=True)
class _Cached:
    topic: str
    data: bytes
    requests: Counter[NodeId] = field(default_factory=Counter["NodeId"])


class _MessageCache:
    """Messages of the last HISTORY_LENGTH heartbeats, for neighbours that ask."""

    def __init__(self) -> None:
        self._messages: dict[bytes, _Cached] = {}
        self._windows: deque[list[bytes]] = deque([[] for _ in range(HISTORY_LENGTH)])
        self._bytes = 0

    def put(self, identifier: bytes, topic: str, data: bytes) -> None:
        if identifier not in self._messages:
            self._messages[identifier] = _Cached(topic, data)
            self._windows[0].append(identifier)
            self._bytes += len(data)
            while self._bytes > MAX_CACHE_BYTES:
                self._forget(next(iter(self._messages)))

    def _forget(self, identifier: bytes) -> None:
        if (cached := self._messages.pop(identifier, None)) is not None:
            self._bytes -= len(cached.data)

    def get(self, identifier: bytes) -> _Cached | None:
        return self._messages.get(identifier)

    def recent(self, topic: str) -> list[bytes]:
        """Ids of the topic's messages that are announced, the oldest window last."""
        windows = list(self._windows)[:HISTORY_GOSSIP]
        return [
            identifier
            for window in windows
            for identifier in window
            if (cached := self._messages.get(identifier)) is not None and cached.topic == topic
        ]

    def shift(self) -> None:
        for identifier in self._windows.pop():
            self._forget(identifier)
        self._windows.appendleft([])


class Router:
    """Meshes, subscriptions and recent messages of one node."""

    def __init__(self, send: Callable[[NodeId, RPC], None], random: Random) -> None:
        """`send` queues a message for a neighbour and does not block."""
        self._send = send
        self._random = random
        self._neighbours: dict[NodeId, _Neighbour] = {}
        self._mesh: dict[str, set[NodeId]] = {}
        self._fanout: dict[str, tuple[set[NodeId], float]] = {}
        self._backoff: dict[tuple[str, NodeId], float] = {}
        self._seen = SeenCache()
        self._cache = _MessageCache()
        self._flood = FloodGuard()
        self._heartbeats = 0
        self._last_heartbeat = float("inf")
        self.scores = PeerScores()

    def mesh(self, topic: str) -> frozenset[NodeId]:
        """Neighbours in the topic's mesh."""
        return frozenset(self._mesh.get(topic, set[NodeId]()))

    @property
    def mesh_peers(self) -> frozenset[NodeId]:
        """Neighbours in any mesh."""
        return frozenset[NodeId]().union(*self._mesh.values())

    def add_peer(self, peer: NodeId, address: str, now: float) -> None:
        """A peer has connected from an IP address (empty when it is not the peer's own)."""
        self._neighbours[peer] = _Neighbour()
        self.scores.add_peer(peer, address, now)
        self._flood.add_peer(peer, now)

    def greet(self, peer: NodeId) -> None:
        """A stream to a neighbour is open: tell it our subscriptions, and of which meshes we count it a part."""
        if self._mesh:
            grafts = [ControlGraft(topicID=topic) for topic, mesh in self._mesh.items() if peer in mesh]
            hello = _control(graft=grafts)
            hello.subscriptions.extend(_subscription(topic, subscribe=True) for topic in self._mesh)
            self._send(peer, hello)

    def remove_peer(self, peer: NodeId, now: float) -> None:
        """A neighbour is gone."""
        del self._neighbours[peer]
        self.scores.remove_peer(peer, now)
        self._flood.remove_peer(peer, now)
        for mesh in self._mesh.values():
            mesh.discard(peer)
        for fanout, _ in self._fanout.values():
            fanout.discard(peer)
        # If it comes back it may be another process with the same key, which knows of no back-off.
        self._backoff = {key: until for key, until in self._backoff.items() if key[1] != peer}

    def join(self, topic: str, now: float) -> None:
        """We subscribe to a topic."""
        self._mesh[topic] = set()
        self._fanout.pop(topic, None)
        for peer in self._neighbours:
            self._send(peer, RPC(subscriptions=[_subscription(topic, subscribe=True)]))
        self._fill_mesh(topic, now)

    def leave(self, topic: str, now: float) -> None:
        """We unsubscribe from a topic."""
        for peer in self._mesh.pop(topic):
            self._prune(topic, peer, UNSUBSCRIBE_BACKOFF_SECONDS, now)
        for peer in self._neighbours:
            self._send(peer, RPC(subscriptions=[_subscription(topic, subscribe=False)]))
        self.scores.leave(topic)

    def publish(self, topic: str, data: bytes, now: float) -> None:
        """Our own message goes to every neighbour subscribed to its topic (flood publishing), once."""
        identifier = message_id(topic, data)
        if not self._seen.add(identifier, now):
            return
        self._cache.put(identifier, topic, data)
        rpc = RPC(publish=[Message(data=data, topicIDs=[topic])])
        for peer in self.subscribers(topic):
            if self.scores.score(peer) >= PUBLISH_THRESHOLD:
                self._send(peer, rpc)
        self._flood.circulates(len(data) + MESSAGE_OVERHEAD_BYTES)
        if topic not in self._mesh:
            self._fanout[topic] = (self._fanout_peers(topic), now)

    def admit(self, peer: NodeId, rpc: RPC, size: int, now: float) -> bool:
        """Whether an RPC of `size` bytes is looked at; False when its sender floods us, or is graylisted for it."""
        if peer not in self._neighbours:
            return False
        if self.scores.is_graylisted(peer):
            self.scores.penalise(peer, GRAYLISTED_RPC_PENALTY)
            return False
        entries = len(rpc.publish) + len(rpc.subscriptions)
        if rpc.HasField("control"):
            control = rpc.control
            entries += len(control.ihave) + len(control.iwant) + len(control.graft) + len(control.prune)
        entries = max(1, entries)
        admission = self._flood.admit(peer, entries, size, now)
        if admission is Admission.FLOODING:
            self.scores.penalise(peer, FLOOD_PENALTY * entries)
        return admission is Admission.ADMITTED

    def receive(self, peer: NodeId, rpc: RPC, now: float) -> list[Incoming]:
        """Handle what a neighbour sent; returns its messages that are new, for us to judge."""
        neighbour = self._neighbours.get(peer)
        if neighbour is None:
            return []
        for option in rpc.subscriptions:
            self._subscribe(peer, neighbour, option.topicid, subscribe=option.subscribe, now=now)
        incoming: list[Incoming] = []
        for message in rpc.publish:
            if len(message.topicIDs) != 1 or message.topicIDs[0] not in self._mesh:
                continue
            topic = message.topicIDs[0]
            identifier = message_id(topic, message.data)
            if self._seen.add(identifier, now):
                breach = bool(message.from_id or message.seqno or message.signature or message.key)
                incoming.append(Incoming(identifier, topic, message.data, breach))
        if rpc.HasField("control"):
            self._handle_control(peer, neighbour, rpc.control, now)
        return incoming

    def ignore(self, incoming: Incoming, forwarder: NodeId) -> None:
        """A message was ignored: neighbours may bring it in good faith."""
        self._flood.circulates(len(incoming.data) + MESSAGE_OVERHEAD_BYTES)
        self._flood.ignore(forwarder)

    def forward(self, incoming: Incoming, forwarder: NodeId) -> None:
        """An accepted message goes on to the mesh, except where it came from."""
        self.scores.deliver(forwarder, incoming.topic)
        self._flood.circulates(len(incoming.data) + MESSAGE_OVERHEAD_BYTES)
        self._cache.put(incoming.message_id, incoming.topic, incoming.data)
        rpc = RPC(publish=[Message(data=incoming.data, topicIDs=[incoming.topic])])
        for peer in self._mesh.get(incoming.topic, ()):
            if peer != forwarder:
                self._send(peer, rpc)

    def heartbeat(self, now: float) -> None:
        """Repair the meshes and announce recent messages outside them; to be called every HEARTBEAT_SECONDS."""
        self._heartbeats += 1
        is_late = now - self._last_heartbeat > LATE_SECONDS
        self._last_heartbeat = now
        self.scores.heartbeat(now)
        for peer, neighbour in self._neighbours.items():
            neighbour.ihaves = neighbour.wanted = 0
            if is_late:
                neighbour.promises.clear()
            self._check_promises(peer, neighbour, now)
        self._backoff = {key: until for key, until in self._backoff.items() if until > now}
        for topic, mesh in self._mesh.items():
            for peer in [peer for peer in mesh if self.scores.score(peer) < ACCEPT_GRAFT_THRESHOLD]:
                self._leave_mesh(topic, peer)
                self._prune(topic, peer, PRUNE_BACKOFF_SECONDS, now)
            self._fill_mesh(topic, now)
            if self._heartbeats % OPPORTUNISTIC_GRAFT_HEARTBEATS == 0:
                self._graft_better(topic, now)
        for topic, (_, published) in tuple(self._fanout.items()):
            if now - published > FANOUT_SECONDS:
                del self._fanout[topic]
            else:
                self._fanout[topic] = (self._fanout_peers(topic), published)
        for topic, mesh in [*self._mesh.items(), *((topic, peers) for topic, (peers, _) in self._fanout.items())]:
            self._announce(topic, mesh)
        self._cache.shift()

    def subscribers(self, topic: str) -> list[NodeId]:
        """Neighbours subscribed to a topic."""
        return [peer for peer, neighbour in self._neighbours.items() if topic in neighbour.topics]

    def _fanout_peers(self, topic: str) -> set[NodeId]:
        subscribers = [peer for peer in self.subscribers(topic) if self.scores.score(peer) >= PUBLISH_THRESHOLD]
        known, _ = self._fanout.get(topic, (set[NodeId](), 0.0))
        kept = known.intersection(subscribers)
        others = [peer for peer in subscribers if peer not in kept]
        return kept | set(self._sample(others, DEGREE - len(kept)))

    def _sample(self, peers: list[NodeId], count: int) -> list[NodeId]:
        return self._random.sample(peers, min(max(count, 0), len(peers)))

    def _fill_mesh(self, topic: str, now: float) -> None:
        mesh = self._mesh[topic]
        if len(mesh) < DEGREE_LOW:
            for peer in self._sample(self._eligible(topic, now), DEGREE - len(mesh)):
                self._graft(topic, peer)

    def _graft_better(self, topic: str, now: float) -> None:
        """Opportunistic grafting: when a mesh has filled with neighbours of no use, better ones get in beside them."""
        mesh = self._mesh[topic]
        middle = median(map(self.scores.score, mesh))
        if mesh and middle < OPPORTUNISTIC_GRAFT_THRESHOLD:
            better = [peer for peer in self._eligible(topic, now) if self.scores.score(peer) > middle]
            for peer in self._sample(better, min(OPPORTUNISTIC_GRAFT_PEERS, DEGREE_HIGH - len(mesh))):
                self._graft(topic, peer)

    def _eligible(self, topic: str, now: float) -> list[NodeId]:
        """Subscribers outside the mesh that may be grafted."""
        mesh = self._mesh[topic]
        return [
            peer
            for peer in self.subscribers(topic)
            if peer not in mesh
            and self._backoff.get((topic, peer), 0.0) <= now
            and self.scores.score(peer) >= ACCEPT_GRAFT_THRESHOLD
        ]

    def _graft(self, topic: str, peer: NodeId) -> None:
        self._join_mesh(topic, peer)
        self._send(peer, _control(graft=[ControlGraft(topicID=topic)]))

    def _join_mesh(self, topic: str, peer: NodeId) -> None:
        self._mesh[topic].add(peer)
        self.scores.graft(peer, topic)

    def _leave_mesh(self, topic: str, peer: NodeId) -> None:
        self._mesh[topic].discard(peer)
        self.scores.prune(peer, topic)

    def _prune(self, topic: str, peer: NodeId, backoff: int, now: float) -> None:
        self._backoff[topic, peer] = now + backoff
        self._send(peer, _control(prune=[ControlPrune(topicID=topic, backoff=backoff)]))

    def _announce(self, topic: str, mesh: Iterable[NodeId]) -> None:
        identifiers = self._cache.recent(topic)
        if not identifiers:
            return
        outside = [
            peer for peer in self.subscribers(topic) if peer not in mesh and self.scores.score(peer) >= GOSSIP_THRESHOLD
        ]
        for peer in self._sample(outside, max(DEGREE_LAZY, int(GOSSIP_FACTOR * len(outside)))):
            announced = self._random.sample(identifiers, min(MAX_IHAVE_IDS, len(identifiers)))
            self._send(peer, _control(ihave=[ControlIHave(topicID=topic, messageIDs=announced)]))

    def _subscribe(self, peer: NodeId, neighbour: _Neighbour, topic: str, *, subscribe: bool, now: float) -> None:
        if not subscribe:
            neighbour.topics.discard(topic)
            if topic in self._mesh:
                self._leave_mesh(topic, peer)
        elif _is_text(topic) and len(topic.encode()) <= MAX_TOPIC_BYTES and len(neighbour.topics) < MAX_TOPICS_PER_PEER:
            known = topic in neighbour.topics
            neighbour.topics.add(topic)
            if topic in self._mesh:
                self._fill_mesh(topic, now)
            if not known:
                # What was published while the subscription was on its way.
                self._retransmit(peer, neighbour, self._cache.recent(topic)[:RECENT_MESSAGES])

    def _handle_control(self, peer: NodeId, neighbour: _Neighbour, control: ControlMessage, now: float) -> None:
        for ihave in control.ihave:
            self._handle_ihave(peer, neighbour, ihave, now)
        for iwant in control.iwant:
            self._handle_iwant(peer, neighbour, iwant)
        for graft in control.graft:
            self._handle_graft(peer, neighbour, graft.topicID, now)
        for prune in control.prune:
            if prune.topicID in self._mesh:
                self._leave_mesh(prune.topicID, peer)
                backoff = min(prune.backoff or PRUNE_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS)
                # A back-off may be prolonged by either side, and ended early by none.
                standing = self._backoff.get((prune.topicID, peer), 0.0)
                self._backoff[prune.topicID, peer] = max(standing, now + backoff)

    def _handle_ihave(self, peer: NodeId, neighbour: _Neighbour, ihave: ControlIHave, now: float) -> None:
        neighbour.ihaves += 1
        if ihave.topicID not in self._mesh or neighbour.ihaves > MAX_IHAVES:
            return
        if self.scores.score(peer) < GOSSIP_THRESHOLD:
            return
        announced = dict.fromkeys(ihave.messageIDs)
        unseen = [one for one in announced if len(one) == DIGEST_BYTES and one not in self._seen]
        wanted = unseen[: MAX_IHAVE_IDS - neighbour.wanted]
        if wanted:
            neighbour.wanted += len(wanted)
            neighbour.promises.append((now + PROMISE_SECONDS, wanted))
            self._send(peer, _control(iwant=[ControlIWant(messageIDs=wanted)]))

    def _check_promises(self, peer: NodeId, neighbour: _Neighbour, now: float) -> None:
        """A promise is kept when any of the announced messages has come, from whomever: an outbox may overflow."""
        while neighbour.promises and neighbour.promises[0][0] <= now:
            _, wanted = neighbour.promises.popleft()
            if not any(identifier in self._seen for identifier in wanted):
                self.scores.penalise(peer, BROKEN_PROMISE_PENALTY)

    def _handle_iwant(self, peer: NodeId, neighbour: _Neighbour, iwant: ControlIWant) -> None:
        if self.scores.score(peer) < GOSSIP_THRESHOLD:
            return
        self._retransmit(peer, neighbour, iwant.messageIDs[:MAX_IHAVE_IDS])

    def _retransmit(self, peer: NodeId, neighbour: _Neighbour, identifiers: Iterable[bytes]) -> None:
        for identifier in identifiers:
            cached = self._cache.get(identifier)
            if cached is not None and cached.requests[peer] < MAX_RETRANSMISSIONS and cached.topic in neighbour.topics:
                cached.requests[peer] += 1
                self._send(peer, RPC(publish=[Message(data=cached.data, topicIDs=[cached.topic])]))

    def _handle_graft(self, peer: NodeId, neighbour: _Neighbour, topic: str, now: float) -> None:
        mesh = self._mesh.get(topic)
        if mesh is None or peer in mesh:
            return
        backing_off = self._backoff.get((topic, peer), 0.0) > now
        if backing_off:
            self.scores.penalise(peer, BACKOFF_PENALTY)
        unwanted = self.scores.score(peer) < ACCEPT_GRAFT_THRESHOLD
        if backing_off or unwanted or len(mesh) >= DEGREE_HIGH or topic not in neighbour.topics:
            self._prune(topic, peer, PRUNE_BACKOFF_SECONDS, now)
        else:
            self._join_mesh(topic, peer)


def _is_text(topic: object) -> bool:
    """False for text that is not UTF-8: protobuf hands it out as bytes."""
    return isinstance(topic, str)


def _subscription(topic: str, *, subscribe: bool) -> RPC.SubOpts:
    return RPC.SubOpts(subscribe=subscribe, topicid=topic)


def _control(
    *,
    ihave: Iterable[ControlIHave] = (),
    iwant: Iterable[ControlIWant] = (),
    graft: Iterable[ControlGraft] = (),
    prune: Iterable[ControlPrune] = (),
) -> RPC:
    return RPC(control=ControlMessage(ihave=ihave, iwant=iwant, graft=graft, prune=prune))
