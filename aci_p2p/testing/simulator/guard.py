"""What a simulated node holds against its gossip neighbours: the accounts and scores of real ones.

Heartbeats are made up for when somebody misbehaves, and what honest neighbours earn (P1, P2) is left out: a flooder has
less credit here than in a real mesh, by TOPIC_SCORE_CAP at most.
"""

from __future__ import annotations

from typing import Final

from aci_p2p.network.libp2p.flood import Admission, FloodGuard
from aci_p2p.network.libp2p.score import FLOOD_PENALTY, GRAYLISTED_RPC_PENALTY, RETAIN_SECONDS, PeerScores
from aci_p2p.protocol.envelope import header_of
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.validation import Decision, MessageRefused, Reason

MS_PER_S: Final = 1_000


class NeighbourGuard:
    """Decides for one node which neighbour's messages it still looks at."""

    def __init__(self) -> None:
        self._flood = FloodGuard()
        self._scores = PeerScores()
        self._known: set[NodeId] = set()
        self._is_stained = False
        self._last_beat = 0

    def admits(self, peer: NodeId, size: int, now: int) -> bool:
        """Whether a message of so many bytes is looked at (`now`: Unix milliseconds)."""
        seconds = now // MS_PER_S
        if peer not in self._known:
            self._known.add(peer)
            self._flood.add_peer(peer, seconds)
            self._scores.add_peer(peer, "", seconds)
        self._beat(seconds)
        if self._scores.is_graylisted(peer):
            self._scores.penalise(peer, GRAYLISTED_RPC_PENALTY)
            return False
        admission = self._flood.admit(peer, 1, size, now / MS_PER_S)
        if admission is Admission.FLOODING:
            self._stain(seconds)
            self._scores.penalise(peer, FLOOD_PENALTY)
        return admission is Admission.ADMITTED

    def accepted(self, size: int) -> None:
        """A message was accepted: its copies from others cost them nothing."""
        self._flood.circulates(size)

    def refused(self, peer: NodeId, topic: str, data: bytes, error: MessageRefused, now: int) -> None:
        """A check has refused a neighbour's message (`now`: Unix milliseconds)."""
        validation = error.validation
        floods = validation.reason is Reason.FLOODED and header_of(data).sender == peer
        if validation.decision is Decision.REJECT or floods:
            self._stain(now // MS_PER_S)
            self._scores.reject(peer, topic)
        else:
            self._flood.circulates(len(data))
            self._flood.ignore(peer)

    def _stain(self, seconds: int) -> None:
        if not self._is_stained:
            self._is_stained, self._last_beat = True, seconds

    def _beat(self, seconds: int) -> None:
        """Let counters decay by the heartbeats since the last look."""
        if self._is_stained:
            for _ in range(min(seconds - self._last_beat, int(RETAIN_SECONDS))):
                self._scores.heartbeat(seconds)
            self._last_beat = seconds
