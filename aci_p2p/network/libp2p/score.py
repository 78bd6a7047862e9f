"""Peer scores as gossipsub v1.1 defines them: what a neighbour's gossip has earned it. Pure: time is an argument.

Of the specification's terms these are kept, under its names:

- P1, time in mesh, and P2, first message deliveries: what a useful neighbour gains, capped, so that good behaviour can
  not be banked against a later attack;
- P4, invalid messages, which no honest node forwards;
- P6, IP colocation: peers beyond a handful in one /24 or /64 are likely one operator's;
- P7, behaviour penalty: floods, GRAFTs during a back-off, announcements that are not honoured.

P3 and P3b, deficits of mesh deliveries, are left out: they need to know how much traffic a topic should have, and ours
come in bursts with silence in between, in which every honest neighbour would be found wanting. P5 is the application's.

Source: https://github.com/libp2p/specs/blob/master/pubsub/gossipsub/gossipsub-v1.1.md#peer-scoring
"""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from aci_p2p.network.limits import MAX_KNOWN_PEERS
from aci_p2p.protocol.identity import NodeId

TIME_IN_MESH_WEIGHT = 0.01
"""P1: points for each heartbeat in a topic's mesh."""
TIME_IN_MESH_CAP = 300
"""P1: heartbeats that count; five minutes tell who stays."""
FIRST_DELIVERIES_WEIGHT = 0.5
"""P2: points for each valid message that a neighbour brought first."""
FIRST_DELIVERIES_CAP = 20
"""P2: deliveries that count, so that a fast neighbour is not worth more than three or four slower ones."""
FIRST_DELIVERIES_DECAY = 0.5 ** (1 / 100)
"""P2: factor a heartbeat; half of it is gone after 100 s."""
TOPIC_SCORE_CAP = 20.0
"""Most that all topics together are worth: one flood outweighs it."""
INVALID_MESSAGES_WEIGHT = -0.25
"""P4: points for the square of a topic's invalid messages. A few are forgiven, 18 are not."""
INVALID_MESSAGES_DECAY = 0.5 ** (1 / 600)
"""P4: factor a heartbeat; half is gone after ten minutes, so that a drip below any rate limit adds up."""
COLOCATION_WEIGHT = -1.0
"""P6: points for the square of the peers beyond COLOCATION_THRESHOLD in one prefix."""
COLOCATION_THRESHOLD = 10
"""P6: peers of one /24 or /64 that cost nothing: a lab, an office behind a NAT."""
COLOCATION_FLOOR = -12.0
"""P6: its lowest value. It keeps peers out of meshes, but what a neighbour earns can outweigh it, and it never
disconnects: a data centre is no attack."""
BEHAVIOUR_PENALTY_WEIGHT = -1.0
"""P7: points for the square of the penalties beyond BEHAVIOUR_PENALTY_THRESHOLD."""
BEHAVIOUR_PENALTY_THRESHOLD = 6.0
"""P7: penalties that cost nothing: a GRAFT may cross a PRUNE on its way, a restart breaks promises."""
BEHAVIOUR_PENALTY_DECAY = 0.5 ** (1 / 60)
"""P7: factor a heartbeat; half is gone after a minute."""
DECAY_TO_ZERO = 0.01
"""Counters below this are zero."""

GOSSIP_THRESHOLD = -10.0
"""Below this we neither announce messages to a peer nor believe its announcements."""
PUBLISH_THRESHOLD = -20.0
"""Below this our own messages do not go to a peer."""
GRAYLIST_THRESHOLD = -80.0
"""Below this whatever a peer sends is dropped unread."""
BAN_THRESHOLD = -160.0
"""Below this a peer is thrown out: it was graylisted and went on."""
ACCEPT_GRAFT_THRESHOLD = 0.0
"""Below this a peer has no place in our meshes."""
OPPORTUNISTIC_GRAFT_THRESHOLD = 1.0
"""A mesh whose median is below this takes in better neighbours."""

FLOOD_PENALTY = 0.1
"""P7 for each message or control entry beyond what FloodGuard allows: 150 of them graylist, 190 ban."""
GRAYLISTED_RPC_PENALTY = 0.1
"""P7 for each RPC from a graylisted peer, so that who goes on is thrown out and who stops comes back."""
BACKOFF_PENALTY = 1.0
"""P7 for a GRAFT during the back-off."""
BROKEN_PROMISE_PENALTY = 1.0
"""P7 for an announcement of which nothing came when we asked."""
MALFORMED_PENALTY = 1.0
"""P7 for an RPC that is none; the stream ends with it."""

RETAIN_SECONDS = 600.0
"""How long the bad name of a peer that left is kept, seconds: reconnecting does not clear it."""
MAX_RETAINED = MAX_KNOWN_PEERS
"""Bad names kept; the oldest are forgotten first."""


@dataclass(slots=True)
class _TopicStats:
    in_mesh: bool = False
    mesh_time: int = 0
    first_deliveries: float = 0.0
    invalid: float = 0.0

    def score(self) -> float:
        return (
            TIME_IN_MESH_WEIGHT * self.mesh_time
            + FIRST_DELIVERIES_WEIGHT * self.first_deliveries
            + INVALID_MESSAGES_WEIGHT * self.invalid**2
        )


@dataclass(slots=True)
class _PeerStats:
    prefix: str | None = None
    topics: dict[str, _TopicStats] = field(default_factory=dict[str, _TopicStats])
    penalty: float = 0.0
    score: float = 0.0
    left: float = 0.0

    def topic(self, name: str) -> _TopicStats:
        stats = self.topics.get(name)
        if stats is None:
            stats = self.topics[name] = _TopicStats()
        return stats

    def decay(self, heartbeats: int) -> None:
        self.penalty = _decayed(self.penalty, BEHAVIOUR_PENALTY_DECAY, heartbeats)
        for topic in self.topics.values():
            topic.first_deliveries = _decayed(topic.first_deliveries, FIRST_DELIVERIES_DECAY, heartbeats)
            topic.invalid = _decayed(topic.invalid, INVALID_MESSAGES_DECAY, heartbeats)


class PeerScores:
    """The scores of all neighbours, and the bad names of those that left."""

    def __init__(self) -> None:
        self._peers: dict[NodeId, _PeerStats] = {}
        self._retained: OrderedDict[NodeId, _PeerStats] = OrderedDict()
        self._prefixes: Counter[str] = Counter()

    def add_peer(self, peer: NodeId, address: str, now: float) -> None:
        """A peer has connected from an IP address (empty when unknown or a relay's); `now` in seconds."""
        stats = self._retained.pop(peer, None)
        if stats is None or now - stats.left > RETAIN_SECONDS:
            stats = _PeerStats()
        stats.decay(int(now - stats.left))
        stats.prefix = colocation_prefix(address)
        if stats.prefix is not None:
            self._prefixes[stats.prefix] += 1
        self._peers[peer] = stats
        self._rescore(stats)

    def remove_peer(self, peer: NodeId, now: float) -> None:
        """A peer has left; what it has earned is forgotten, what it has done wrong is kept for RETAIN_SECONDS."""
        stats = self._peers.pop(peer)
        if stats.prefix is not None:
            self._prefixes[stats.prefix] -= 1
            self._prefixes += Counter()
        stats.prefix = None
        stats.topics = {
            name: _TopicStats(invalid=topic.invalid) for name, topic in stats.topics.items() if topic.invalid
        }
        if stats.topics or stats.penalty:
            stats.left = now
            self._retained[peer] = stats
            if len(self._retained) > MAX_RETAINED:
                self._retained.popitem(last=False)

    def score(self, peer: NodeId) -> float:
        """A neighbour's score; 0 for strangers. Losses show at once, gains and P6 at the next heartbeat."""
        stats = self._peers.get(peer)
        return stats.score if stats else 0.0

    def graft(self, peer: NodeId, topic: str) -> None:
        """A neighbour joins a topic's mesh (P1)."""
        self._peers[peer].topic(topic).in_mesh = True

    def prune(self, peer: NodeId, topic: str) -> None:
        """A neighbour leaves a topic's mesh; its time in it is forgotten."""
        stats = self._peers.get(peer)
        if stats is not None and topic in stats.topics:
            stats.topics[topic].in_mesh = False
            stats.topics[topic].mesh_time = 0

    def leave(self, topic: str) -> None:
        """We have left a topic: forget what it has earned anybody."""
        for stats in self._peers.values():
            if (topic_stats := stats.topics.pop(topic, None)) is not None and topic_stats.invalid:
                stats.topics[topic] = _TopicStats(invalid=topic_stats.invalid)

    def deliver(self, peer: NodeId, topic: str) -> None:
        """A neighbour was the first to bring a valid message (P2)."""
        stats = self._peers.get(peer)
        if stats is not None:
            topic_stats = stats.topic(topic)
            topic_stats.first_deliveries = min(topic_stats.first_deliveries + 1.0, FIRST_DELIVERIES_CAP)

    def reject(self, peer: NodeId, topic: str) -> None:
        """A neighbour has brought an invalid message (P4)."""
        stats = self._peers.get(peer)
        if stats is not None:
            stats.topic(topic).invalid += 1.0
            self._rescore(stats)

    def penalise(self, peer: NodeId, penalty: float) -> None:
        """A neighbour has misbehaved (P7)."""
        stats = self._peers.get(peer)
        if stats is not None:
            stats.penalty += penalty
            self._rescore(stats)

    def heartbeat(self, now: float) -> None:
        """Let counters decay, and count time in meshes; once a second (`now` in seconds)."""
        for stats in self._peers.values():
            stats.decay(1)
            for name in tuple(stats.topics):
                topic = stats.topics[name]
                if topic.in_mesh:
                    topic.mesh_time = min(topic.mesh_time + 1, TIME_IN_MESH_CAP)
                elif not topic.first_deliveries and not topic.invalid:
                    del stats.topics[name]
            self._rescore(stats)
        while self._retained and now - next(iter(self._retained.values())).left > RETAIN_SECONDS:
            self._retained.popitem(last=False)

    def is_graylisted(self, peer: NodeId) -> bool:
        """Whether whatever a neighbour sends is to be dropped."""
        return self.score(peer) < GRAYLIST_THRESHOLD

    def banned(self) -> list[NodeId]:
        """Neighbours to be thrown out."""
        return [peer for peer, stats in self._peers.items() if stats.score < BAN_THRESHOLD]

    @property
    def retained(self) -> int:
        """Bad names kept of peers that left."""
        return len(self._retained)

    def _rescore(self, stats: _PeerStats) -> None:
        topics = min(sum(topic.score() for topic in stats.topics.values()), TOPIC_SCORE_CAP)
        surplus = max(0, self._prefixes[stats.prefix] - COLOCATION_THRESHOLD) if stats.prefix else 0
        colocation = max(COLOCATION_WEIGHT * surplus**2, COLOCATION_FLOOR)
        excess = max(0.0, stats.penalty - BEHAVIOUR_PENALTY_THRESHOLD)
        stats.score = topics + colocation + BEHAVIOUR_PENALTY_WEIGHT * excess**2


def median(scores: Iterable[float]) -> float:
    """The middle score, the upper one of two; 0 of none."""
    ordered = sorted(scores)
    return ordered[len(ordered) // 2] if ordered else 0.0


def colocation_prefix(address: str) -> str | None:
    """The /24 or /64 of a public IP address, for P6.

    None for others: loopback, private and link-local networks are one operator's anyway, and nobody enters them from
    outside to gain identities.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if not ip.is_global:
        return None
    return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 64), strict=False))  # noqa: PLR2004


def _decayed(counter: float, factor: float, heartbeats: int) -> float:
    counter *= factor**heartbeats
    return counter if counter >= DECAY_TO_ZERO else 0.0
