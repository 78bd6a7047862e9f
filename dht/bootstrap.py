"""Whom to dial when, so that a node finds the network and finds it again. No I/O: time and randomness are arguments.

Every address that we know of is a candidate with a back-off of its own. Named ones (the user's) are tried first and for
ever, also now and then while all is well: two halves of a network that had lost each other meet again through them.
Others (from the address cache, other nodes, the local network) are tried while peers are wanted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import Final

from aci_p2p.protocol.errors import AciError, LocalError, ResourceError
from aci_p2p.protocol.identity import NodeId

WANTED_PEERS: Final = 4
"""Peers with which a node is content; gossip and Kademlia bring the others."""
MAX_DIALS: Final = 256
"""Attempts at once at named addresses, and as many at others: a cache full of those who are gone hides nobody."""
MAX_FRESH: Final = 16
"""Those of them that have just begun."""
FRESH_S: Final = 0.1
"""Seconds after which an attempt that has not ended holds up the next ones no more."""
MIN_BACK_OFF_S: Final = 1.0
"""Seconds until an address is tried again, at least; the longest wait doubles each time from here."""
MAX_BACK_OFF_S: Final = 300.0
"""Seconds until an address is tried again, at most."""
LOOK_AGAIN_S: Final = 600.0
"""Seconds, on average, between attempts at a named address while peers are not wanted."""
MAX_CANDIDATES: Final = 512
"""Addresses that are not named; above, the one that failed most often goes."""
MAX_DEPTH: Final = 4
"""`/dnsaddr` that lead to others: one of the operator, one for each region, one for each host, and one to spare."""
MAX_RESOLVED: Final = 64
"""Addresses behind one named `/dnsaddr`."""

_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?")


class BootstrapFailed(ResourceError):
    """None of the given bootstrap addresses could be reached."""

    code = "bootstrap_failed"

    def __init__(self, failures: Sequence[tuple[str, AciError]]) -> None:
        """`failures`: each address with what went wrong."""
        tried = "; ".join(f"{address}: {error.message}" for address, error in failures)
        super().__init__(f"no bootstrap node answers ({tried})", hint="check the address, and that the node runs")
        self.failures = tuple(failures)


@dataclass(frozen=True, slots=True)
class DnsAddress:
    """A `/dnsaddr` multiaddr: a name whose TXT records hold multiaddrs."""

    name: str
    """Domain name, in lower case."""
    peer: NodeId | None
    """Only addresses of this peer are meant; None: all."""

    @classmethod
    def parse(cls, address: str) -> DnsAddress | None:
        """Read one; None for a multiaddr of another kind. Raises LocalError for a malformed one."""
        match address.split("/"):
            case ["", "dnsaddr", name] if _HOST_NAME.fullmatch(name):
                return cls(name.lower(), None)
            case ["", "dnsaddr", name, "p2p", peer] if _HOST_NAME.fullmatch(name):
                return cls(name.lower(), NodeId.parse(peer))
            case ["", "dnsaddr", *_]:
                msg = f"{address!r} is not a /dnsaddr address"
                raise LocalError(msg, hint="it looks like /dnsaddr/boot.example.org")
            case _:
                return None


def peer_of(address: str) -> NodeId | None:
    """Whom an address says that it leads to; None when it does not say, or says it badly."""
    *_, protocol, peer = ["", *address.split("/")]
    if protocol != "p2p":
        return None
    try:
        return NodeId.parse(peer)
    except LocalError:
        return None


@dataclass(frozen=True, slots=True)
class BootstrapReport:
    """How it stands with one named address."""

    address: str
    """As the user gave it."""
    reached: bool | None
    """Whether somebody answered at the last attempt; None when none has ended yet."""
    attempts: int
    """Attempts that have failed since somebody answered."""
    failures: tuple[tuple[str, AciError], ...]
    """What went wrong at the last attempt, there or at each of the addresses behind a `/dnsaddr`."""


@dataclass(eq=False, slots=True)
class _Candidate:
    address: str
    peer: NodeId | None
    due: float
    """`inf` while its peer is connected."""
    is_lasting: bool = False
    """Named, or behind a named `/dnsaddr`: tried also while peers are not wanted."""
    depth: int = 0
    is_busy: bool = False
    begun: float = -inf
    is_tried: bool = False
    attempts: int = 0
    failure: AciError | None = None
    parts: set[str] = field(default_factory=set[str])
    """Of a `/dnsaddr`: the addresses that its TXT records held."""


class Joiner:
    """The state of joining: what was tried, what comes next."""

    def __init__(self, own: NodeId, random: Random, *, wanted: int = WANTED_PEERS) -> None:
        """`own`: our identity, whose addresses are left out; `wanted`: peers with which we are content."""
        self._own = own
        self._random = random
        self._wanted = wanted
        self._named: dict[str, _Candidate] = {}
        self._others: dict[str, _Candidate] = {}
        self._had_peers = False

    def name(self, addresses: Iterable[str], now: float) -> None:
        """Add addresses that the user gave, to be tried at once. Raises LocalError for a malformed `/dnsaddr`."""
        for address in addresses:
            DnsAddress.parse(address)
            peer = peer_of(address)
            if peer != self._own:
                self._others.pop(address, None)
                self._named[address] = _Candidate(address, peer, now, is_lasting=True)

    def offer(self, addresses: Iterable[str], now: float) -> None:
        """Add addresses that somebody told us, the best first; what is known already stays as it is."""
        for address in addresses:
            # A /dnsaddr of a stranger would make us ask the name servers whatever it likes.
            if not address.startswith("/dnsaddr/"):
                self._add_other(address, now)

    def _add_other(self, address: str, now: float) -> _Candidate | None:
        """The candidate of an address, a new one if need be; None when there is no room, or it is ours."""
        if (known := self._find(address)) is not None:
            return known
        peer = peer_of(address)
        if peer == self._own:
            return None
        if len(self._others) >= MAX_CANDIDATES:
            replaceable = [one for one in self._others.values() if not one.is_busy and not one.is_lasting]
            worst = max(replaceable, key=lambda candidate: candidate.attempts, default=None)
            if worst is None or not worst.attempts:
                return None
            del self._others[worst.address]
        candidate = self._others[address] = _Candidate(address, peer, now)
        return candidate

    def next_attempts(self, peers: Collection[NodeId], now: float) -> list[str]:
        """Addresses to try now, given who is connected; each is busy until it `connected`, `resolved` or `failed`."""
        if self._had_peers and not peers:
            # All are lost, and what failed while others were there may be all that is left.
            for candidate in self._candidates():
                candidate.attempts = 0
                candidate.due = min(candidate.due, now + self._soon())
        self._had_peers = bool(peers)
        is_content = len(peers) >= self._wanted
        self._note_connected(peers, now)
        every = self._candidates()
        free = MAX_FRESH - len(self._fresh(every, now))
        busy = Counter(candidate.is_lasting for candidate in every if candidate.is_busy)
        chosen: list[str] = []
        for candidate in every:
            if len(chosen) >= free or (is_content and not candidate.is_lasting):
                break
            if not candidate.is_busy and candidate.due <= now and busy[candidate.is_lasting] < MAX_DIALS:
                candidate.is_busy, candidate.begun = True, now
                busy[candidate.is_lasting] += 1
                chosen.append(candidate.address)
        return chosen

    def next_due(self, peers: Collection[NodeId], now: float) -> float:
        """When there is an address to try, seconds, unless something changes before; `inf` for never.

        To be asked after `next_attempts` with the same peers and time.
        """
        every = self._candidates()
        is_content = len(peers) >= self._wanted
        busy = Counter(candidate.is_lasting for candidate in every if candidate.is_busy)
        waiting = (
            one.due
            for one in every
            if not one.is_busy and busy[one.is_lasting] < MAX_DIALS and (one.is_lasting or not is_content)
        )
        due = min(waiting, default=inf)
        fresh = self._fresh(every, now)
        if len(fresh) < MAX_FRESH:
            return due
        return max(due, min(candidate.begun for candidate in fresh) + FRESH_S)

    @staticmethod
    def _fresh(candidates: Sequence[_Candidate], now: float) -> list[_Candidate]:
        """Those of the candidates whose attempt has just begun."""
        return [one for one in candidates if one.is_busy and one.begun + FRESH_S > now]

    def _note_connected(self, peers: Collection[NodeId], now: float) -> None:
        is_content = len(peers) >= self._wanted
        for candidate in self._candidates():
            if candidate.peer in peers:
                if not candidate.is_busy and candidate.due < inf:
                    self._succeed(candidate, now)
                    candidate.due = inf
            elif candidate.due == inf:
                # Lost; others may have lost the same peer in this moment.
                later = self._look_again() if candidate.is_lasting and is_content else self._soon()
                candidate.due = now + later

    def connected(self, address: str, now: float) -> None:
        """Somebody answered there."""
        if (candidate := self._find(address)) is not None:
            self._succeed(candidate, now)

    def resolved(self, address: str, found: Sequence[str], now: float) -> None:
        """The TXT records of a `/dnsaddr` hold these addresses, which are to be tried now."""
        if (candidate := self._find(address)) is None:
            return
        self._succeed(candidate, now)
        candidate.parts = set()
        for part in found[:MAX_RESOLVED]:
            if candidate.depth >= MAX_DEPTH and part.startswith("/dnsaddr/"):
                continue
            if (behind := self._add_other(part, now)) is not None:
                candidate.parts.add(part)
                if not behind.is_lasting:
                    behind.is_lasting, behind.depth = True, candidate.depth + 1
        if not candidate.parts:
            self.failed(address, ResourceError("its TXT records hold no address to dial"), now)

    def failed(self, address: str, error: AciError, now: float) -> None:
        """Nobody answered there, or nobody who should."""
        if (candidate := self._find(address)) is None:
            return
        candidate.is_busy, candidate.is_tried, candidate.failure = False, True, error
        # Kept for a long time, and of many addresses: without the frames that it came through.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        if isinstance(error, LocalError) and not candidate.is_lasting:
            # It is none, or leads to ourselves.
            del self._others[address]
            return
        candidate.attempts += 1
        longest = min(MIN_BACK_OFF_S * 2**candidate.attempts, MAX_BACK_OFF_S)
        candidate.due = now + max(MIN_BACK_OFF_S, self._random.uniform(0, longest))

    def forget(self, address: str) -> None:
        """An address leads to ourselves."""
        self._named.pop(address, None)
        self._others.pop(address, None)

    def report(self) -> tuple[BootstrapReport, ...]:
        """How it stands with the named addresses, in their order."""
        return tuple(self._report(candidate) for candidate in self._named.values())

    def _report(self, candidate: _Candidate) -> BootstrapReport:
        tried = [part for part in self._leaves(candidate, set()) if part.is_tried]
        failures = tuple((part.address, part.failure) for part in tried if part.failure is not None)
        reached = len(failures) < len(tried) if tried else None
        return BootstrapReport(candidate.address, reached, max((part.attempts for part in tried), default=0), failures)

    def _leaves(self, candidate: _Candidate, seen: set[str]) -> list[_Candidate]:
        """The candidate, or those behind it if it is a `/dnsaddr` that was resolved; loops are cut."""
        if candidate.address in seen:
            return []
        seen.add(candidate.address)
        if not candidate.parts:
            return [candidate]
        behind = [self._others.get(part) or self._named.get(part) for part in sorted(candidate.parts)]
        return [leaf for part in behind if part for leaf in self._leaves(part, seen)]

    def is_settled(self, now: float) -> bool:
        """Whether every candidate was tried, and none is being tried or will be in this moment."""
        return not any(candidate.is_busy or candidate.due <= now for candidate in self._candidates())

    def _candidates(self) -> list[_Candidate]:
        every = [*self._named.values(), *self._others.values()]
        return sorted(every, key=lambda candidate: not candidate.is_lasting)

    def _find(self, address: str) -> _Candidate | None:
        return self._named.get(address) or self._others.get(address)

    def _succeed(self, candidate: _Candidate, now: float) -> None:
        candidate.is_busy, candidate.is_tried, candidate.attempts, candidate.failure = False, True, 0, None
        candidate.due = now + (self._look_again() if candidate.is_lasting else MIN_BACK_OFF_S)

    def _look_again(self) -> float:
        return LOOK_AGAIN_S * self._random.uniform(0.5, 1.5)

    def _soon(self) -> float:
        return self._random.uniform(0, MIN_BACK_OFF_S)
