"""How an imagined network behaves: latency, jitter, loss, duplication, reordering, bandwidth, NATs. Pure.

Used by the in-memory network and by the simulator. Round trips between regions are those of public cloud measurements,
rounded; what matters for the protocol is their order of magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Final

from aci_p2p.protocol.errors import LocalError

REGIONS: Final = ("europe", "america", "asia")
"""Regions of the default model."""
ONE_WAY_MS: Final = ((10, 45, 90), (45, 20, 75), (90, 75, 25))
"""Milliseconds from region to region, one way."""


class Nat(Enum):
    """What stands between a node and the others (RFC 4787's mapping behaviour)."""

    OPEN = "open"
    """Nothing: everybody can dial it."""
    CONE = "cone"
    """Endpoint-independent mapping: can be dialled by hole punching."""
    SYMMETRIC = "symmetric"
    """Endpoint-dependent mapping: reachable through a relay only."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node stands in the imagined network."""

    region: int = 0
    """Index into the model's regions."""
    nat: Nat = Nat.OPEN
    """What is in front of it."""


@dataclass(frozen=True, slots=True)
class NetworkModel:
    """Probabilities are per message and link."""

    one_way_ms: tuple[tuple[int, ...], ...] = ONE_WAY_MS
    """Milliseconds from region to region, one way; a square matrix."""
    jitter: float = 0.1
    """Share of the latency by which a message may be later."""
    loss: float = 0.0
    """Probability that a datagram-like message (gossip) is lost."""
    duplication: float = 0.0
    """Probability that such a message arrives twice."""
    reordering: float = 0.0
    """Probability that such a message is held back, for up to ten times the latency."""
    bandwidth: int = 12_500_000
    """Bytes per second of each link: 100 Mbit/s."""
    cone_share: float = 0.0
    """Share of the nodes behind a cone NAT."""
    symmetric_share: float = 0.0
    """Share of the nodes behind a symmetric NAT."""

    def __post_init__(self) -> None:
        """Raises LocalError for values that make no network."""
        size = len(self.one_way_ms)
        if not size or any(len(row) != size or min(row) < 0 for row in self.one_way_ms):
            msg = "latencies are a square matrix of milliseconds"
            raise LocalError(msg)
        chances = (self.loss, self.duplication, self.reordering, self.cone_share + self.symmetric_share)
        if min(chances) < 0 or max(chances) > 1 or self.jitter < 0 or self.bandwidth <= 0:
            msg = "probabilities and shares are between 0 and 1, bandwidth and jitter are not negative"
            raise LocalError(msg)

    def place(self, random: Random) -> Place:
        """Where a new node stands."""
        region, drawn = random.randrange(len(self.one_way_ms)), random.random()
        if drawn < self.symmetric_share:
            return Place(region, Nat.SYMMETRIC)
        return Place(region, Nat.CONE if drawn < self.symmetric_share + self.cone_share else Nat.OPEN)

    def delay_s(self, source: Place, target: Place, size: int, random: Random) -> float:
        """Seconds that `size` bytes take from one node to another, loss and reordering apart."""
        base = self.one_way_ms[source.region][target.region] / 1000
        return base * (1 + self.jitter * random.random()) + size / self.bandwidth

    def deliveries_s(self, source: Place, target: Place, size: int, random: Random) -> list[float]:
        """Delays in seconds after which a datagram-like message arrives: none when lost, two when duplicated."""
        if random.random() < self.loss:
            return []
        delays = [self.delay_s(source, target, size, random)]
        if random.random() < self.reordering:
            delays[0] += random.uniform(1, 10) * self.one_way_ms[source.region][target.region] / 1000
        if random.random() < self.duplication:
            delays.append(self.delay_s(source, target, size, random) + delays[0])
        return delays


LAN: Final = NetworkModel(one_way_ms=((0,),), jitter=0.0, bandwidth=125_000_000)
"""Hosts in one room."""
WIDE_AREA: Final = NetworkModel()
"""Three continents, nothing lost."""
ROUGH: Final = NetworkModel(
    jitter=1.0, loss=0.05, duplication=0.02, reordering=0.05, cone_share=0.3, symmetric_share=0.1
)
"""Three continents on a bad day."""


def can_dial(source: Place, target: Place) -> bool:
    """Whether a direct connection can be made, hole punching included."""
    if target.nat is Nat.OPEN:
        return True
    return Nat.SYMMETRIC not in {source.nat, target.nat}
