"""Getting into the network and staying in it: the trio shell around `Joiner` and the address cache.

Nothing is looked at by the clock: `Membership.tick` does what is due, `Membership.next_due` says when to come back, and
`Membership.news` tells of what happens before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from random import Random
from typing import Final, TypeVar

import trio

from aci_p2p.clock import Clock
from aci_p2p.dht.address_cache import MAX_FILE_BYTES, AddressCache
from aci_p2p.dht.bootstrap import WANTED_PEERS, BootstrapFailed, BootstrapReport, DnsAddress, Joiner
from aci_p2p.dht.dnsaddr import resolve_dnsaddr
from aci_p2p.files import write_atomically
from aci_p2p.network.api import DialledOurselves, Network
from aci_p2p.protocol.errors import AciError, LocalError, ResourceError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.tasks import Notice

DIAL_TIMEOUT_S: Final = 5.0
"""Seconds for connecting to one address, name resolution and handshake included."""
JOIN_TIMEOUT_S: Final = 12.0
"""Seconds for joining when peers are needed: two attempts at addresses that do not answer."""
START_WAIT_S: Final = 1.0
"""Seconds that a node waits for its first peer before it goes on without."""
GRACE_S: Final = 0.3
"""Seconds from the first peer until joining counts as done: time for the others that answer as well."""
FIRST_SAVE_S: Final = 2.0
"""Seconds from the first peer until the cache is written; doubled each time, up to SAVE_S."""
SAVE_S: Final = 60.0
"""Seconds between two writes of the cache, while it changes."""
HINTS: Final = 32
"""Nodes that others told us of among which we look for peers when we run short of them."""

log = logging.getLogger("aci_p2p.dht")

T = TypeVar("T")


class CacheKeeper:
    """Keeps the address cache in its file. What goes wrong is logged: a node can do without."""

    def __init__(self, path: Path, clock: Clock, *, threads: bool) -> None:
        """`threads`: read and write in a thread."""
        self._path = path
        self._clock = clock
        self._threads = threads
        self._cache = AddressCache()
        self._saved: dict[NodeId, tuple[str, ...]] = {}
        self._gap = FIRST_SAVE_S
        self._next_save = 0.0
        self.next_due = inf
        """When to write, seconds: soon after something has changed, but not at every change; `inf` for never."""

    @property
    def addresses(self) -> list[str]:
        """Where to dial: the best address of each peer, the latest peer first, then the other addresses."""
        peers = self._cache.peers
        others = [address for cached in peers for address in cached.addresses[1:]]
        return [*(cached.addresses[0] for cached in peers), *others]

    async def load(self) -> None:
        """Read the file."""
        try:
            data = await self._off_loop(self._read)
            if data is not None:
                self._cache = AddressCache.decode(data, self._clock())
        except LocalError as error:
            log.warning("%s; starting with an empty one: %s", error.message, self._path)
        self._saved = self._places()

    def note(self, network: Network) -> None:
        """Remember who is connected."""
        connected = set(network.peers)
        dialled = {connection.peer for connection in network.connections() if connection.outbound}
        for known in network.known_peers():
            if known.peer in connected:
                self._cache.note(known.peer, known.addresses, self._clock(), dialled=known.peer in dialled)
        if self._saved == self._places():
            self.next_due = inf
        elif self.next_due == inf:
            self.next_due = max(self._next_save, trio.current_time() + FIRST_SAVE_S)

    async def save(self) -> None:
        """Write the file."""
        self._saved = self._places()
        self.next_due = inf
        self._gap = min(2 * self._gap, SAVE_S)
        self._next_save = trio.current_time() + self._gap
        data = self._cache.encode()
        try:
            await self._off_loop(lambda: write_atomically(self._path, data))
        except LocalError as error:
            log.warning("the address cache is not kept: %s", error.message)

    def _places(self) -> dict[NodeId, tuple[str, ...]]:
        return {cached.peer: cached.addresses for cached in self._cache.peers}

    def _read(self) -> bytes | None:
        try:
            with self._path.open("rb") as file:
                return file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            msg = f"the address cache cannot be read: {error.strerror}"
            raise LocalError(msg) from None

    async def _off_loop(self, work: Callable[[], T]) -> T:
        if self._threads:
            return await trio.to_thread.run_sync(work)
        await trio.lowlevel.checkpoint()
        return work()


class Membership:
    """Our place in the network: dials until there are peers, and again when they are lost."""

    def __init__(
        self,
        network: Network,
        random: Random,
        nursery: trio.Nursery,
        *,
        cache: CacheKeeper | None,
        hints: Callable[[], Sequence[str]],
    ) -> None:
        """`hints`: addresses that other nodes have told us of; `nursery` holds attempts under way."""
        self._network = network
        self._nursery = nursery
        self._cache = cache
        self._hints = hints
        self._joiner = Joiner(network.node_id, random)
        self.news = Notice()
        """Tells that an attempt has ended, or that the caller has to look for another reason."""
        self._is_saving = False
        self._noted: frozenset[NodeId] = frozenset()

    def report(self) -> tuple[BootstrapReport, ...]:
        """How it stands with the named addresses."""
        return self._joiner.report()

    async def join(self, bootstrap: Sequence[str], *, require: bool) -> None:
        """See `Discovery.join`."""
        self._joiner.name(bootstrap, trio.current_time())
        self.news.notify()
        with trio.move_on_after(JOIN_TIMEOUT_S if require else START_WAIT_S) as scope:
            while not self._joiner.is_settled(trio.current_time()):
                # Somebody may be connected already, whom the cache knew.
                if self._network.peers:
                    scope.deadline = min(scope.deadline, trio.current_time() + GRACE_S)
                await self.news.wait()
                self._refuse_malformed(bootstrap)
        self._refuse_malformed(bootstrap)
        failures = [failure for report in self.report() for failure in report.failures]
        if require and failures and not self._network.peers:
            raise BootstrapFailed(failures)

    def _refuse_malformed(self, bootstrap: Sequence[str]) -> None:
        for report in self.report():
            for address, error in report.failures:
                if address in bootstrap and isinstance(error, LocalError):
                    self._joiner.forget(address)
                    raise error

    def forget(self, bootstrap: Sequence[str]) -> None:
        """See `Discovery.forget`."""
        for address in bootstrap:
            self._joiner.forget(address)

    def offer(self, addresses: Sequence[str]) -> None:
        """Addresses that are worth a try when peers are wanted."""
        self._joiner.offer(addresses, trio.current_time())
        self.news.notify()

    async def load(self) -> None:
        """Read the address cache."""
        if self._cache is not None:
            await self._cache.load()
            self._joiner.offer(self._cache.addresses, trio.current_time())

    def tick(self, now: float) -> None:
        """Begin the attempts that are due, and remember who is there."""
        peers = self._network.peers
        if len(peers) < WANTED_PEERS:
            self._joiner.offer(self._hints()[:HINTS], now)
        for address in self._joiner.next_attempts(peers, now):
            self._nursery.start_soon(self._attempt, address)
        if self._joiner.is_settled(now):
            # Without an attempt, if all that is named is connected.
            self.news.notify()
        if self._cache is not None:
            if (connected := frozenset(peers)) != self._noted:
                self._cache.note(self._network)
                self._noted = connected
            if not self._is_saving and now >= self._cache.next_due:
                self._is_saving = True
                self._nursery.start_soon(self._save, self._cache)

    def next_due(self, now: float) -> float:
        """When there is something to do, seconds, unless there are `news` before; right after a `tick(now)`."""
        save = inf if self._cache is None or self._is_saving else self._cache.next_due
        return min(save, self._joiner.next_due(self._network.peers, now))

    async def leave(self) -> None:
        """Write the address cache."""
        if self._cache is not None:
            self._cache.note(self._network)
            with trio.CancelScope(shield=True):
                await self._cache.save()

    async def _save(self, cache: CacheKeeper) -> None:
        try:
            cache.note(self._network)
            await cache.save()
        finally:
            self._is_saving = False
            self.news.notify()

    async def _attempt(self, address: str) -> None:
        try:
            target = DnsAddress.parse(address)
            if target is None:
                await dial(self._network, address)
                self._joiner.connected(address, trio.current_time())
            else:
                found = await resolve_dnsaddr(target)
                self._joiner.resolved(address, found, trio.current_time())
        except DialledOurselves:
            self._joiner.forget(address)
        except AciError as error:
            log.debug("%s: %s", address, error)
            self._joiner.failed(address, error, trio.current_time())
        self.news.notify()


async def dial(network: Network, address: str) -> NodeId:
    """`Network.connect` within DIAL_TIMEOUT_S. Raises AciError."""
    try:
        with trio.fail_after(DIAL_TIMEOUT_S):
            return await network.connect(address)
    except trio.TooSlowError:
        msg = f"no answer within {DIAL_TIMEOUT_S:g} s"
        raise ResourceError(msg) from None
