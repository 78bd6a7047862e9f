"""Finding a peer at one of its addresses: names are resolved, several addresses are tried at once, the first wins.

Attempts begin STAGGER_SECONDS apart (RFC 8305, "happy eyeballs"), sooner when the one before has failed. An attempt
goes as far as proving who answers; only with the winner is a connection made, so that the peer sees one.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import trio

from aci_p2p.network.api import DialledOurselves, PeerUnreachable
from aci_p2p.network.libp2p.address_book import AddressBook
from aci_p2p.network.libp2p.addresses import TcpAddress, may_be_near
from aci_p2p.network.libp2p.connections import Connection, Connections, source_of
from aci_p2p.network.libp2p.secure import SecureChannel, Security
from aci_p2p.network.libp2p.upgrade import secure_outbound
from aci_p2p.protocol.identity import NodeId

DIAL_SECONDS = 5.0
"""Time for one address to take our TCP connection, seconds."""
RESOLVE_SECONDS = 5.0
"""Time to resolve a name, seconds."""
STAGGER_SECONDS = 0.25
"""Time between the beginnings of two attempts, seconds (RFC 8305 section 5)."""
MAX_RESOLVED = 8
"""IP addresses of one name that are tried."""
MAX_ATTEMPTS = 8
"""TCP connections of one search that are tried at once."""
HEAD_START_SECONDS = 2.0
"""How long only direct addresses are tried before those through relays, seconds: a peer that has both is most likely
behind a NAT, and once a relayed connection is up a direct one may follow. None for addresses of networks that are not
ours: they lead out of a NAT's private network only in the company whose routers know it."""

_FAMILIES = {"dns": socket.AF_UNSPEC, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}


@dataclass(frozen=True, slots=True)
class Reached:
    """Somebody answered."""

    secure: SecureChannel
    """The encrypted connection, on which nothing is agreed yet."""
    place: TcpAddress
    """The address that we were asked to dial."""
    source: str
    """Whom it counts against, see `source_of`."""
    relay: NodeId | None = None
    """The relay in between."""


Attempt = Callable[[], Awaitable[Reached | None]]
"""Tries one address; None when nobody answers there who should."""


CircuitDialler = Callable[[NodeId, TcpAddress], Awaitable[Connection]]
"""Makes a connection to a peer through a relay; raises PeerUnreachable."""


class Race:
    """One search for a peer at several addresses."""

    def __init__(self, security: Security, peer: NodeId | None) -> None:
        """`peer`: who has to answer; None: whoever does."""
        self._security = security
        self._peer = peer
        self._limit = trio.CapacityLimiter(MAX_ATTEMPTS)
        self.failures: dict[TcpAddress, str] = {}

    async def run(self, addresses: Sequence[TcpAddress]) -> Reached | None:
        """Try direct addresses; the first to answer as the right peer wins. None when there is none; see `failures`."""
        return await self._first([partial(self._try_address, address) for address in addresses])

    async def _first(self, attempts: Sequence[Attempt]) -> Reached | None:
        winner: Reached | None = None

        async def run(attempt: Attempt, failed: trio.Event) -> None:
            nonlocal winner
            reached = await attempt()
            failed.set()
            if reached is None:
                return
            if winner is None:
                winner = reached
                nursery.cancel_scope.cancel()
            else:
                # It had answered, too, before the cancellation came to this task.
                await reached.secure.close()

        try:
            async with trio.open_nursery() as nursery:
                for attempt in attempts:
                    failed = trio.Event()
                    nursery.start_soon(run, attempt, failed)
                    with trio.move_on_after(STAGGER_SECONDS):
                        await failed.wait()
        except BaseException:
            if winner is not None:
                await winner.secure.close()
            raise
        return winner

    async def _try_address(self, address: TcpAddress) -> Reached | None:
        if address.is_ip:
            return await self._try_ip(address, address.host)
        try:
            hosts = await _resolve(address)
        except PeerUnreachable as error:
            self._note(address, error)
            return None
        return await self._first([partial(self._try_ip, address, host) for host in hosts])

    async def _try_ip(self, address: TcpAddress, host: str) -> Reached | None:
        try:
            async with self._limit:
                return await self._dial_ip(address, host)
        except PeerUnreachable as error:
            self._note(address, error)
            return None

    def _note(self, address: TcpAddress, error: PeerUnreachable) -> None:
        """Of a name, keep what went wrong at each of its IP addresses."""
        said = self.failures.get(address)
        self.failures[address] = error.message if said is None else f"{said}; {error.message}"

    async def _dial_ip(self, address: TcpAddress, host: str) -> Reached:
        place = address.transport if host == address.host else f"{address.transport} ({host})"
        stream = await _open_tcp(host, address.port, place)
        secure = await secure_outbound(self._security, stream, self._peer, place)
        return Reached(secure, address, source_of(host))


class Dialler:
    """Makes connections, at most one at a time to each peer."""

    def __init__(
        self,
        security: Security,
        connections: Connections,
        book: AddressBook,
        establish: Callable[[Reached], Awaitable[Connection]],
    ) -> None:
        """`establish` makes a connection of whom was reached; raises PeerUnreachable."""
        self._security = security
        self._connections = connections
        self._book = book
        self._establish = establish
        self._dials: dict[NodeId, trio.Event] = {}
        self.circuit: CircuitDialler | None = None
        self.dials = 0
        self.failures = 0

    async def dial(self, peer: NodeId, addresses: Sequence[TcpAddress] = ()) -> Connection:
        """The connection to a peer, made when there is none. Raises PeerUnreachable, DialledOurselves.

        Given addresses are tried in any case, known ones only when they have not failed lately.
        """
        await trio.lowlevel.checkpoint()
        while True:
            if (connection := self._connections.preferred(peer)) is not None:
                return connection
            if (dial := self._dials.get(peer)) is None:
                break
            await dial.wait()
        self._check(peer)
        with self._dialling(peer):
            await self._connections.make_room()
            candidates = addresses or self._book.due(peer, trio.current_time())
            return await self._dial_each(peer, candidates)

    async def dial_direct(self, peer: NodeId, addresses: Sequence[TcpAddress]) -> Connection:
        """A new direct connection to a peer that is connected through a relay. Raises PeerUnreachable."""
        self._check(peer)
        return await self._dial_each(peer, [address for address in addresses if address.relay is None])

    async def dial_anybody(self, address: TcpAddress) -> Connection:
        """The connection to whoever answers at an address. Raises PeerUnreachable, DialledOurselves."""
        await self._connections.make_room()
        self.dials += 1
        race = Race(self._security, None)
        reached = await race.run((address,))
        if reached is None:
            self.failures += 1
            raise PeerUnreachable(race.failures[address])
        peer = reached.secure.peer
        try:
            while (dial := self._dials.get(peer)) is not None:
                await dial.wait()
            self._check(peer)
            connection = self._connections.preferred(peer)
        except BaseException:
            await reached.secure.close()
            raise
        if connection is not None:
            await reached.secure.close()
            return connection
        with self._dialling(peer):
            return await self._establish(reached)

    def _check(self, peer: NodeId) -> None:
        if peer == self._connections.own:
            msg = "cannot connect to ourselves"
            raise DialledOurselves(msg)
        if self._connections.is_banned(peer):
            msg = f"{peer.short} was thrown out for what it sent; not dialled for a while"
            raise PeerUnreachable(msg)

    @contextmanager
    def _dialling(self, peer: NodeId) -> Generator[None]:
        self._dials[peer] = trio.Event()
        try:
            yield
        finally:
            self._dials.pop(peer).set()

    async def _dial_each(self, peer: NodeId, addresses: Sequence[TcpAddress]) -> Connection:
        self.dials += 1
        direct = [address for address in addresses if address.relay is None]
        circuits = [address for address in addresses if address.relay is not None]
        failures: dict[TcpAddress, str] = {}
        try:
            circuits_first = bool(circuits) and not may_be_near(direct)
            if not circuits_first:
                with trio.move_on_after(HEAD_START_SECONDS if circuits else math.inf):
                    if (connection := await self._dial_directly(peer, direct, failures)) is not None:
                        return connection
            for address in circuits:
                if (connection := self._connections.preferred(peer)) is not None:
                    return connection
                try:
                    return await self._dial_circuit(peer, address)
                except PeerUnreachable as error:
                    failures[address] = error.message
            if circuits_first and (connection := await self._dial_directly(peer, direct, failures)) is not None:
                return connection
        finally:
            for address in failures:
                self._book.failed(peer, address, trio.current_time())
        self.failures += 1
        reasons = "; ".join(failures.values()) or self._silence(peer)
        msg = f"{peer.short} cannot be reached: {reasons}"
        raise PeerUnreachable(msg)

    def _silence(self, peer: NodeId) -> str:
        return "all its addresses have failed lately" if self._book.known(peer) else "no address is known"

    async def _dial_directly(
        self, peer: NodeId, addresses: Sequence[TcpAddress], failures: dict[TcpAddress, str]
    ) -> Connection | None:
        remaining = list(addresses)
        while remaining:
            race = Race(self._security, peer)
            reached = await race.run(remaining)
            failures.update(race.failures)
            if reached is None:
                return None
            try:
                return await self._establish(reached)
            except PeerUnreachable as error:
                failures[reached.place] = error.message
                remaining = [address for address in remaining if address not in failures]
        return None

    async def _dial_circuit(self, peer: NodeId, address: TcpAddress) -> Connection:
        if self.circuit is None:
            msg = f"{address.transport} leads through a relay, and we use none"
            raise PeerUnreachable(msg)
        return await self.circuit(peer, address)


async def _resolve(address: TcpAddress) -> list[str]:
    """The IP addresses of a name, of both families in turn. Raises PeerUnreachable."""
    try:
        with trio.fail_after(RESOLVE_SECONDS):
            found = await trio.socket.getaddrinfo(
                address.host, address.port, family=_FAMILIES[address.protocol], type=socket.SOCK_STREAM
            )
    except trio.TooSlowError:
        msg = f"{address.transport} cannot be resolved in time"
        raise PeerUnreachable(msg) from None
    except (OSError, UnicodeError) as error:
        msg = f"{address.transport} cannot be resolved: {getattr(error, 'strerror', None) or error}"
        raise PeerUnreachable(msg) from error
    hosts = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    first = [host for host in hosts if (":" in host) == (":" in hosts[0])]
    second = [host for host in hosts if host not in first]
    in_turn = [host for pair in zip(first, second, strict=False) for host in pair]
    return [*in_turn, *first[len(second) :], *second[len(first) :]][:MAX_RESOLVED]


async def _open_tcp(host: str, port: int, place: str) -> trio.SocketStream:
    """A TCP connection to an IP address. Raises PeerUnreachable."""
    try:
        with trio.fail_after(DIAL_SECONDS):
            return await trio.open_tcp_stream(host, port)
    except trio.TooSlowError:
        msg = f"{place} does not answer"
        raise PeerUnreachable(msg) from None
    except OSError as error:
        msg = f"{place} cannot be dialled: {_reason(error)}"
        raise PeerUnreachable(msg) from error


def _reason(error: OSError) -> str:
    """Why a connection failed, in few words: trio wraps the errors of all addresses that it tried."""
    cause: BaseException = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cast("BaseExceptionGroup[BaseException]", cause).exceptions[-1]
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno).lower()
    return str(error.strerror or error)
