"""Which peers a lookup asks, in which order. Pure.

A lookup goes several ways at once that share no peer: a peer that names accomplices only leads its own way astray, and
whoever wants to hide a record must stand on all of them.

Source: Baumgart and Mies, "S/Kademlia" (2007), section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable

from aci_p2p.network.libp2p.kad_table import BUCKET_SIZE, closest
from aci_p2p.protocol.identity import NodeId

PATHS = 3
"""Ways of one lookup that share no peer."""


class _Path:
    def __init__(self) -> None:
        self.waiting: set[NodeId] = set()
        self.asking: set[NodeId] = set()
        self.answered: set[NodeId] = set()


class Lookup:
    """One lookup: on each path, ever nearer peers are asked until the nearest alive have all answered."""

    def __init__(self, target: int, peers: Iterable[NodeId], avoided: Iterable[NodeId]) -> None:
        """`peers`: where to begin; they are dealt out to the paths by distance. `avoided` are never asked."""
        self._target = target
        self._avoided = set(avoided)
        start = closest(set(peers) - self._avoided, target, BUCKET_SIZE)
        self._paths = [_Path() for _ in range(min(PATHS, len(start)))]
        for index, peer in enumerate(start):
            self._paths[index % len(self._paths)].waiting.add(peer)
        self._share = -(-BUCKET_SIZE // max(len(self._paths), 1))
        self._asked: set[NodeId] = set()

    @property
    def paths(self) -> range:
        """The paths, by number."""
        return range(len(self._paths))

    def next_peer(self, path: int) -> NodeId | None:
        """The nearest peer on a path that nobody has asked yet, while it is among the nearest alive there.

        None when there is none now; more may come while some on the path are being asked.
        """
        way = self._paths[path]
        way.waiting -= self._asked
        for peer in closest(way.waiting | way.asking | way.answered, self._target, self._share):
            if peer in way.waiting:
                way.waiting.discard(peer)
                way.asking.add(peer)
                self._asked.add(peer)
                return peer
        return None

    def is_over(self, path: int) -> bool:
        """Whether nobody on a path is being asked; then `next_peer` has said its last."""
        return not self._paths[path].asking

    def answered(self, path: int, peer: NodeId, closer: Iterable[NodeId]) -> None:
        """A peer has answered, with peers closer to the target."""
        way = self._paths[path]
        way.asking.discard(peer)
        way.answered.add(peer)
        way.waiting.update(set(closer) - self._asked - self._avoided)

    def failed(self, path: int, peer: NodeId) -> None:
        """A peer has not answered."""
        self._paths[path].asking.discard(peer)

    def closest_answered(self) -> list[NodeId]:
        """Peers that answered on whatever path, nearest first, at most BUCKET_SIZE."""
        return closest((peer for way in self._paths for peer in way.answered), self._target, BUCKET_SIZE)
