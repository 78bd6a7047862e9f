"""Our end of every connection: listening, the streams on connections, and the protocols served on them.

Takes the place of py-libp2p's `Swarm` and `BasicHost`, in which an exception in any stream handler ends the host,
an inbound slot is never given back, a dial waits 250 ms for nothing, only one address of a peer is tried, a port can
be shared by accident (SO_REUSEPORT), and silent connections hold every slot for half a minute.

Each connection is one task of the host's nursery, each inbound stream another; all of them end with the host, and
nothing that a peer does raises out of them.
"""

from __future__ import annotations

import errno
import logging
import math
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from random import SystemRandom

import trio

from aci_p2p.network.api import AddressInUse, PeerUnreachable, Reachability
from aci_p2p.network.buckets import TokenBucket
from aci_p2p.network.config import NetworkConfig
from aci_p2p.network.inbound import InboundStreams
from aci_p2p.network.libp2p.address_book import AddressBook
from aci_p2p.network.libp2p.addresses import Scope, TcpAddress, believable, expand_unspecified, homes_of, most_useful
from aci_p2p.network.libp2p.admission import Admission
from aci_p2p.network.libp2p.connections import Connection, Connections, source_of
from aci_p2p.network.libp2p.dialling import Dialler, Reached
from aci_p2p.network.libp2p.holdings import Holdings
from aci_p2p.network.libp2p.negotiation import NegotiationError, select_again, select_inbound, select_outbound
from aci_p2p.network.libp2p.secure import ByteStream, Security
from aci_p2p.network.libp2p.upgrade import HANDSHAKE_SECONDS, multiplex_outbound, secure_outbound, upgrade_inbound
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, YamuxStream
from aci_p2p.network.limits import MAX_KNOWN_PEERS
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import KeyPair, NodeId

NEGOTIATION_SECONDS = 10.0
"""Time to agree on a stream's protocol, seconds."""
TRIM_SECONDS = 10.0
"""Time between two looks at which connections can be closed while there are too many, seconds."""
FAILED_STREAMS_PER_SECOND = 1.0
"""Inbound streams of one peer that may come to nothing in the long run, per second: garbage, protocols that nobody
agrees on, more streams than it may have. Honest peers of other versions ask in vain now and then."""
FAILED_STREAMS_BURST = 256.0
"""Inbound streams of one peer that may come to nothing at once: some are open here yet that the peer has ended."""
HOMES_SECONDS = 60.0
"""How long is remembered in which scopes we live, seconds: looking at the interfaces takes a millisecond."""
BACKLOG = 256
"""TCP connections that the kernel holds for us before we accept them."""

_CLOSING = "this node is shutting down"

log = logging.getLogger("aci_p2p.network")


@dataclass(slots=True)
class _Protocol:
    serve: Callable[[NodeId, YamuxStream], Awaitable[None]]
    background: bool
    scopes: set[trio.CancelScope] = field(default_factory=set[trio.CancelScope])


class Host:
    """Our end of every connection."""

    def __init__(self, key: KeyPair, nursery: trio.Nursery, config: NetworkConfig | None = None) -> None:
        """`nursery` holds all tasks of the host; of `config`, the water marks and whom to dial are for here."""
        config = config or NetworkConfig()
        self._named_only = config.named_only
        self.node_id = key.node_id
        self.book = AddressBook(key.node_id, SystemRandom())
        self.connections = Connections(key.node_id, config.low_water, config.high_water)
        self._security = Security(key)
        self.dialler = Dialler(self._security, self.connections, self.book, self._establish)
        self.reachability = Reachability.UNKNOWN
        self._nursery = nursery
        self._protocols: dict[str, _Protocol] = {}
        self.admission = Admission()
        self.holdings = Holdings()
        self._inbound_streams = InboundStreams[YamuxStream](lambda stream: stream.is_in_use)
        self._patience: OrderedDict[NodeId, TokenBucket] = OrderedDict()
        self._bound: list[TcpAddress] = []
        self._listeners: list[trio.SocketListener] = []
        self._homes: tuple[float, dict[str, Scope]] = (-math.inf, {})
        self._announced: dict[str, tuple[TcpAddress, ...]] = {}
        self.claims: dict[tuple[str, int], Callable[[trio.SocketStream], None]] = {}
        self._trimming = False
        self._is_closing = False
        self.handler_failures = 0
        self.on_connected = self.connections.on_connected
        self.on_disconnected = self.connections.on_disconnected
        self.on_moved = self.connections.on_moved
        self.on_changed: list[Callable[[], None]] = []

    @property
    def peers(self) -> tuple[NodeId, ...]:
        """Connected peers."""
        return self.connections.peers

    @property
    def protocols(self) -> tuple[str, ...]:
        """Protocols that we serve."""
        return tuple(self._protocols)

    @property
    def addresses(self) -> list[TcpAddress]:
        """Where we can be dialled, the most useful addresses first."""
        announced = [address for several in self._announced.values() for address in several]
        return most_useful(dict.fromkeys([*announced, *self._listening()]))

    def _listening(self) -> list[TcpAddress]:
        return [
            address for bound in self._bound for address in expand_unspecified(bound.protocol, bound.host, bound.port)
        ]

    @property
    def bound_addresses(self) -> tuple[TcpAddress, ...]:
        """Where we listen, as bound: with port, but `0.0.0.0` for every interface."""
        return tuple(self._bound)

    def announce(self, reason: str, addresses: Sequence[TcpAddress]) -> None:
        """Add addresses at which others can dial us to those where we listen; replaces what the reason had before."""
        if self._announced.get(reason, ()) != tuple(addresses):
            self._announced[reason] = tuple(addresses)
            self._notify_changed()

    def set_reachability(self, reachability: Reachability) -> None:
        """Whether others can open connections to us, as it has turned out."""
        if self.reachability is not reachability:
            self.reachability = reachability
            self._notify_changed()

    def share_ports(self) -> None:
        """From now on let our own sockets dial from the ports at which we listen (SO_REUSEPORT).

        Another program still cannot listen there, but for one of the same user that asks for the same.
        """
        for listener in self._listeners:
            listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    def _notify_changed(self) -> None:
        for notify in self.on_changed:
            notify()

    def connection(self, peer: NodeId) -> Connection | None:
        """The connection to use for a peer."""
        return self.connections.preferred(peer)

    def learn(self, peer: NodeId, addresses: Sequence[TcpAddress], *, hearsay: bool = False) -> None:
        """See `AddressBook.learn`; in vain when only named peers are dialled."""
        if not self._named_only:
            self.book.learn(peer, addresses, hearsay=hearsay)

    def known(self, peer: NodeId) -> tuple[TcpAddress, ...]:
        """See `AddressBook.known`."""
        return self.book.known(peer)

    def usable_by(self, peer: NodeId, addresses: Sequence[TcpAddress]) -> list[TcpAddress]:
        """Those of the addresses that make sense to a peer: loopback only when it is on this machine itself."""
        connection = self.connections.preferred(peer)
        is_local = connection is not None and connection.is_local
        return [address for address in addresses if is_local or not address.is_loopback]

    def believed(self, addresses: Sequence[TcpAddress], teller: NodeId | None = None) -> list[TcpAddress]:
        """Those of the addresses that we dial on the word of a peer, see `addresses.believable`.

        Without a `teller`, whoever it was, it came to us over one of our connections.
        """
        now = trio.current_time()
        if now >= self._homes[0] + HOMES_SECONDS:
            self._homes = now, homes_of(self._listening())
        homes = self._homes[1]
        if teller is None:
            scopes = [*homes.values(), *(connection.scope for connection in self.connections.all)]
        else:
            scopes = [connection.scope for connection in self.connections.of(teller)]
        return believable(addresses, max(scopes, default=Scope.PUBLIC), homes)

    async def listen(self, address: TcpAddress) -> None:
        """Accept connections at an address. Raises AddressInUse, LocalError."""
        if not address.is_ip or address.relay is not None:
            msg = f"cannot listen on {address}: give an IP address"
            raise LocalError(msg)
        try:
            listeners = await trio.open_tcp_listeners(address.port, host=address.host, backlog=BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                msg = f"{address} is in use by another program"
                raise AddressInUse(msg, hint="choose another port, or 0 for any free one") from error
            msg = f"cannot listen on {address}: {error.strerror or error}"
            raise LocalError(msg) from error
        for listener in listeners:
            host, port = listener.socket.getsockname()[:2]
            self._homes = -math.inf, {}
            self._bound.append(TcpAddress(address.protocol, host, port, None))
            self._listeners.append(listener)
            self._nursery.start_soon(self._accept, listener)

    async def _accept(self, listener: trio.SocketListener) -> None:
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError:
                    # Out of file descriptors, most likely: drop the handshake that has waited longest, and try again.
                    self.admission.end_oldest()
                    await trio.sleep(0.1)
                    continue
                if self._is_closing:
                    await stream.aclose()
                    return
                self._nursery.start_soon(self._handle_inbound, stream)

    async def _handle_inbound(self, stream: trio.SocketStream) -> None:
        try:
            ip, port = stream.socket.getpeername()[:2]
        except OSError:
            await stream.aclose()
            return
        if (claim := self.claims.get((ip, port))) is not None:
            claim(stream)
            return
        source = source_of(ip)
        place = TcpAddress("ip6" if ":" in ip else "ip4", ip, port)
        try:
            connection = await self._upgrade_inbound(stream, place, source)
            if connection is not None:
                await self._serve_connection(connection)
        except Exception:  # whatever a stranger sends ends its own connection and nothing else
            log.debug("the connection from %s failed", ip, exc_info=True)
        finally:
            await stream.aclose()

    async def _upgrade_inbound(
        self,
        stream: ByteStream,
        place: TcpAddress,
        source: str,
        relay: NodeId | None = None,
        expected: NodeId | None = None,
    ) -> Connection | None:
        """A connection of a stream that a peer opened, entered in the table; None when it is not taken."""
        if not self.admission.admits(source):
            return None
        connection: Connection | None = None
        with self.admission.handshaking(source):
            if self.connections.has_room_for(source):
                peer, muxer = await upgrade_inbound(self._security, stream)
                # Others may have come in the meantime.
                if expected in {None, peer} and self._takes(peer) and self.connections.has_room_for(source):
                    opened = trio.current_time()
                    connection = Connection(peer, muxer, False, place, source, opened, relay)  # noqa: FBT003
                    self._add(connection)
        return connection

    def _takes(self, peer: NodeId) -> bool:
        return peer != self.node_id and not self._is_closing and not self.connections.is_banned(peer)

    async def adopt_inbound(
        self, stream: ByteStream, place: TcpAddress, relay: NodeId | None, expected: NodeId
    ) -> None:
        """Serve a connection over a stream that a peer opened to us through a relay or a hole in our NAT, till it ends.

        The stream is closed then, at once when it is not the `expected` peer's. `place` is where it came from. Never
        raises for what the peer does.
        """
        try:
            connection = await self._upgrade_inbound(stream, place, _source(place, relay), relay, expected)
            if connection is not None:
                await self._serve_connection(connection)
        except Exception:  # as for connections over TCP
            log.debug("the connection from %s failed", place, exc_info=True)
        finally:
            await stream.aclose()

    async def adopt_outbound(
        self, stream: ByteStream, peer: NodeId, place: TcpAddress, relay: NodeId | None
    ) -> Connection:
        """Make a connection of a stream that we opened to a peer through a relay, or a hole in its NAT.

        The stream is closed with the connection, or at once on failure. Raises PeerUnreachable.
        """
        secure = await secure_outbound(self._security, stream, peer, place.transport)
        return await self._establish(Reached(secure, place, _source(place, relay), relay))

    async def _establish(self, reached: Reached) -> Connection:
        """The connection to whom we have reached. Raises PeerUnreachable."""
        place = reached.place.transport
        peer = reached.secure.peer
        muxer = await multiplex_outbound(reached.secure, place)
        if self._is_closing:
            await reached.secure.close()
            raise PeerUnreachable(_CLOSING)
        connection = Connection(peer, muxer, True, reached.place, reached.source, trio.current_time(), reached.relay)  # noqa: FBT003
        self._add(connection)
        self._nursery.start_soon(self._serve_connection, connection)
        try:
            # Once it answers, the peer counts us among its connections, too.
            with trio.fail_after(HANDSHAKE_SECONDS):
                await muxer.ping()
        except (StreamReset, trio.TooSlowError) as error:
            await muxer.close()
            msg = f"{place} closes the connection"
            raise PeerUnreachable(msg) from error
        self.book.prefer(peer, reached.place)
        return connection

    def _add(self, connection: Connection) -> None:
        self.book.connected(connection.peer)
        for lost in self.connections.add(connection):
            self._nursery.start_soon(lost.muxer.close)
        kept = self.connections.preferred(connection.peer)
        if kept is not None and kept.outbound:
            for extra in self.connections.of(connection.peer):
                if extra is not kept and not extra.muxer.is_closed:
                    self._nursery.start_soon(self._retire, extra, kept)
        if self.connections.is_over and not self._trimming:
            self._trimming = True
            self._nursery.start_soon(self._trim)

    async def _retire(self, extra: Connection, kept: Connection) -> None:
        """Close a connection that another to the same peer has replaced, when nothing is left on it.

        The side that dialled the one that is kept does this. Once the peer has answered on it, it uses it; what the
        peer has opened on the extra one before, we know of when it has answered there, too.
        """
        with suppress(StreamReset):
            await kept.muxer.ping()
            await extra.muxer.ping()
            await extra.muxer.wait_idle()
            if not kept.muxer.is_closed:
                await extra.muxer.close()

    async def _trim(self) -> None:
        """Close the least useful connections, until there are not too many any more."""
        try:
            while self.connections.is_over:
                async with trio.open_nursery() as nursery:
                    for connection in self.connections.superfluous():
                        nursery.start_soon(connection.muxer.close)
                await trio.sleep(TRIM_SECONDS)
        finally:
            self._trimming = False

    async def _serve_connection(self, connection: Connection) -> None:
        """Hold a connection until it ends."""
        try:
            await connection.muxer.run(lambda stream: self._accept_stream(connection, stream), self.holdings)
        except Exception:  # a broken connection is a disconnected peer
            log.debug("the connection to %s broke", connection.peer.short, exc_info=True)
        finally:
            self.connections.remove(connection)

    async def dial(self, peer: NodeId, addresses: Sequence[TcpAddress] = ()) -> Connection:
        """The connection to a peer, made when there is none. Raises PeerUnreachable, DialledOurselves."""
        if self._is_closing:
            await trio.lowlevel.checkpoint()
            raise PeerUnreachable(_CLOSING)
        return await self.dialler.dial(peer, addresses)

    async def throw_out(self, peer: NodeId) -> None:
        """Close all connections to a peer and have nothing to do with it for a while."""
        self.connections.ban(peer)
        for connection in self.connections.of(peer):
            await connection.muxer.close()

    async def open_stream(self, peer: NodeId, protocol: str, *, eager: bool = False) -> YamuxStream:
        """Open a stream to a peer, dialling it if needed. Raises PeerUnreachable. `eager`: see `select_again`."""
        dialled = await self.dial(peer)
        connection = self.connections.preferred(peer) or dialled
        try:
            stream = connection.muxer.open_stream()
        except StreamReset as error:
            msg = f"{peer.short} takes no more streams from us"
            raise PeerUnreachable(msg) from error
        connection.used = trio.current_time()
        if (served := self._protocols.get(protocol)) is None or not served.background:
            stream.mark_in_use()
        try:
            with trio.fail_after(NEGOTIATION_SECONDS):
                select = partial(select_again, accepted=connection.accepted) if eager else select_outbound
                await select(stream, protocol)
        except (NegotiationError, EndOfStream, StreamReset, trio.TooSlowError) as error:
            stream.reset()
            msg = f"{peer.short} does not serve {protocol}"
            raise PeerUnreachable(msg) from error
        except BaseException:
            stream.reset()
            raise
        return stream

    @contextmanager
    def serve(
        self, protocol: str, serve: Callable[[NodeId, YamuxStream], Awaitable[None]], *, background: bool = False
    ) -> Generator[None]:
        """Serve a protocol within the block; what is being served then is cancelled. Raises LocalError when taken.

        Streams of a `background` protocol do not keep a connection from being closed when there are too many.
        """
        if protocol in self._protocols:
            msg = f"{protocol} is already served"
            raise LocalError(msg)
        served = self._protocols[protocol] = _Protocol(serve, background)
        self._notify_changed()
        try:
            yield
        finally:
            del self._protocols[protocol]
            self._notify_changed()
            for scope in tuple(served.scopes):
                scope.cancel()

    def _accept_stream(self, connection: Connection, stream: YamuxStream) -> bool:
        peer = connection.peer
        if self._is_closing:
            return False
        if self._inbound_streams.is_full_for(peer):
            self._note_failed_stream(peer)
            return False
        scope = self._inbound_streams.add(peer, stream)
        if scope is not None:
            self._nursery.start_soon(self._serve_stream, peer, stream, scope)
        return scope is not None

    async def _serve_stream(self, peer: NodeId, stream: YamuxStream, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await self._negotiate_and_serve(peer, stream)
            if scope.cancelled_caught:
                stream.reset()
        finally:
            self._inbound_streams.remove(peer, stream)

    async def _negotiate_and_serve(self, peer: NodeId, stream: YamuxStream) -> None:
        try:
            with trio.fail_after(NEGOTIATION_SECONDS):
                served = self._protocols.get(await select_inbound(stream, self._protocols))
        except Exception:  # a stream without a protocol is nobody's but the peer's
            log.debug("a stream from %s asked for nothing that we serve", peer.short, exc_info=True)
            self._note_failed_stream(peer)
            served = None
        if served is None:
            stream.reset()
        else:
            await self._run_server(served, peer, stream)

    async def _run_server(self, protocol: _Protocol, peer: NodeId, stream: YamuxStream) -> None:
        if not protocol.background:
            stream.mark_in_use()
        scope = trio.CancelScope()
        protocol.scopes.add(scope)
        try:
            with scope:
                await protocol.serve(peer, stream)
        except (EndOfStream, StreamReset):
            pass
        except Exception:  # a server never raises into the host's task tree
            log.debug("serving %s failed", peer.short, exc_info=True)
            self.handler_failures += 1
            self._note_failed_stream(peer)
            stream.reset()
        finally:
            protocol.scopes.discard(scope)
            stream.close()

    def _note_failed_stream(self, peer: NodeId) -> None:
        """An inbound stream came to nothing; a peer of which too many do is thrown out."""
        now = trio.current_time()
        if peer not in self._patience:
            self._patience[peer] = TokenBucket.full(FAILED_STREAMS_PER_SECOND, FAILED_STREAMS_BURST, now)
        self._patience.move_to_end(peer)
        has_patience = self._patience[peer].take(1, now)
        # What is full again need not be remembered.
        refilled = now - FAILED_STREAMS_BURST / FAILED_STREAMS_PER_SECOND
        while len(self._patience) > MAX_KNOWN_PEERS or next(iter(self._patience.values())).updated < refilled:
            self._patience.popitem(last=False)
        if not has_patience and not self._is_closing and not self.connections.is_banned(peer):
            log.info("%s is thrown out: too many of its streams come to nothing", peer.short)
            self.connections.ban(peer)
            self._nursery.start_soon(self.throw_out, peer)

    async def close(self) -> None:
        """Say good-bye on all connections, and make no more."""
        self._is_closing = True
        async with trio.open_nursery() as nursery:
            for connection in self.connections.all:
                nursery.start_soon(connection.muxer.close)


def _source(place: TcpAddress, relay: NodeId | None) -> str:
    return source_of(place.host) if relay is None else f"relay {relay}"
