"""Connections: listening, dialling, upgrading, and the streams on them.

Takes the place of py-libp2p's `Swarm` and `BasicHost`, in which an exception in any stream handler ends the host,
an inbound slot is never given back, a dial waits 250 ms for nothing, only one address of a peer is tried, a port can
be shared by accident (SO_REUSEPORT), and silent connections hold every slot for half a minute.

Each connection is one task of the host's nursery, each inbound stream another; all of them end with the host, and
nothing that a peer does raises out of them.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import trio

from aci_p2p.network.api import AddressInUse, ConnectionInfo, KnownPeer, PeerUnreachable
from aci_p2p.network.libp2p.addresses import TcpAddress, expand_unspecified, most_useful
from aci_p2p.network.libp2p.negotiation import NegotiationError, select_inbound, select_outbound
from aci_p2p.network.libp2p.secure import ConnectionLost, Security, TcpChannel
from aci_p2p.network.libp2p.yamux import PROTOCOL as YAMUX
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, Yamux, YamuxStream
from aci_p2p.network.limits import MAX_ADDRESSES_PER_PEER, MAX_KNOWN_PEERS, MAX_STREAMS, MAX_STREAMS_PER_PEER
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import KeyPair, NodeId

MAX_CONNECTIONS = 512
"""Connections kept. Each costs a socket, four tasks and at most 5 MiB of buffers."""
MAX_INBOUND_CONNECTIONS = 384
"""Connections of which peers may have dialled so many: strangers cannot keep us from dialling."""
IDLE_STREAMS = 2
"""Streams of a connection that is not in use: gossip has one each way."""
MAX_CONNECTIONS_PER_ADDRESS = 32
"""Inbound connections kept from one IP address, loopback excepted (a NAT may hide several nodes)."""
MAX_HANDSHAKES = 256
"""Inbound handshakes under way; one more ends the oldest, so that silent connections cannot lock honest ones out."""
MAX_HANDSHAKES_PER_ADDRESS = 16
"""Inbound handshakes under way from one IP address, loopback excepted; one more ends its oldest."""
HANDSHAKE_SECONDS = 10.0
"""Time from a TCP connection to a multiplexed one, seconds: five round trips and two signatures."""
DIAL_SECONDS = 5.0
"""Time for one address to take our TCP connection, seconds."""
NEGOTIATION_SECONDS = 10.0
"""Time to agree on a stream's protocol, seconds."""
BAN_SECONDS = 60.0
"""How long a peer that was thrown out is neither dialled nor let in, seconds."""
BACKLOG = 256
"""TCP connections that the kernel holds for us before we accept them."""

log = logging.getLogger("aci_p2p.network")


@dataclass(eq=False, slots=True)
class Connection:
    """One multiplexed, authenticated connection."""

    peer: NodeId
    """Who is on the other side."""
    muxer: Yamux
    """Its streams."""
    outbound: bool
    """Whether we dialled it."""
    address: str
    """IP address of the other side."""
    place: TcpAddress
    """Where we dialled it, or where it came from."""
    opened: float
    """When it was made, in trio's time."""


@dataclass(slots=True)
class _Protocol:
    serve: Callable[[NodeId, YamuxStream], Awaitable[None]]
    scopes: set[trio.CancelScope] = field(default_factory=set[trio.CancelScope])


class Host:
    """Our end of every connection."""

    def __init__(self, key: KeyPair, nursery: trio.Nursery) -> None:
        """`nursery` holds all tasks of the host."""
        self.node_id = key.node_id
        self._security = Security(key)
        self._nursery = nursery
        self._connections: dict[NodeId, list[Connection]] = {}
        self._known: OrderedDict[NodeId, tuple[TcpAddress, ...]] = OrderedDict()
        self._connected: OrderedDict[NodeId, None] = OrderedDict()
        self._banned: OrderedDict[NodeId, float] = OrderedDict()
        self._dials: dict[NodeId, trio.Event] = {}
        self._protocols: dict[str, _Protocol] = {}
        self._handshakes: OrderedDict[trio.CancelScope, str] = OrderedDict()
        self._inbound_streams: dict[NodeId, int] = {}
        self._bound: list[TcpAddress] = []
        self.handler_failures = 0
        self.on_connected: list[Callable[[Connection], None]] = []
        self.on_disconnected: list[Callable[[NodeId], None]] = []

    @property
    def peers(self) -> tuple[NodeId, ...]:
        """Connected peers."""
        return tuple(self._connections)

    def describe_connections(self) -> tuple[ConnectionInfo, ...]:
        """See `Network.connections`."""
        now = trio.current_time()
        return tuple(
            ConnectionInfo(
                peer=one.peer,
                address=str(one.place),
                outbound=one.outbound,
                relay=None,
                age_s=now - one.opened,
                round_trip_ms=None,
                streams=one.muxer.stream_count,
                agent="",
                score=0.0,
            )
            for one in sorted(self._all_connections(), key=lambda one: one.opened)
        )

    def known_peers(self) -> tuple[KnownPeer, ...]:
        """See `Network.known_peers`."""
        return tuple(
            KnownPeer(peer, tuple(address.owned_by(peer) for address in self.known(peer)))
            for peer in reversed(self._connected)
            if self.known(peer)
        )

    @property
    def protocols(self) -> tuple[str, ...]:
        """Protocols that we serve."""
        return tuple(self._protocols)

    @property
    def addresses(self) -> list[TcpAddress]:
        """Where we can be dialled, the most useful addresses first."""
        return most_useful(
            address for bound in self._bound for address in expand_unspecified(bound.protocol, bound.host, bound.port)
        )

    async def listen(self, address: TcpAddress) -> None:
        """Accept connections at an address. Raises AddressInUse, LocalError."""
        if not address.protocol.startswith("ip"):
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
            self._bound.append(TcpAddress(address.protocol, host, port, None))
            self._nursery.start_soon(self._accept, listener)

    async def _accept(self, listener: trio.SocketListener) -> None:
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError:
                    # Out of file descriptors, most likely: drop the handshake that has waited longest, and try again.
                    self._end_oldest_handshake(None)
                    await trio.sleep(0.1)
                    continue
                self._nursery.start_soon(self._handle_inbound, stream)

    def _end_oldest_handshake(self, address: str | None) -> None:
        for scope, other in self._handshakes.items():
            if address is None or other == address:
                scope.cancel()
                del self._handshakes[scope]
                return

    @contextmanager
    def _handshaking(self, address: str) -> Generator[None]:
        """Bound inbound handshakes in time and number."""
        of_address = sum(other == address for other in self._handshakes.values())
        if of_address >= MAX_HANDSHAKES_PER_ADDRESS and not _is_loopback(address):
            self._end_oldest_handshake(address)
        elif len(self._handshakes) >= MAX_HANDSHAKES:
            self._end_oldest_handshake(None)
        with trio.move_on_after(HANDSHAKE_SECONDS) as scope:
            self._handshakes[scope] = address
            try:
                yield
            finally:
                self._handshakes.pop(scope, None)

    async def _handle_inbound(self, stream: trio.SocketStream) -> None:
        try:
            address, port = stream.socket.getpeername()[:2]
        except OSError:
            await stream.aclose()
            return
        channel = TcpChannel(stream, is_initiator=False)
        connection: Connection | None = None
        try:
            with self._handshaking(address):
                if self._has_room_for(address):
                    secure = await self._security.secure_inbound(channel)
                    await select_inbound(secure, (YAMUX,))
                    place = TcpAddress("ip6" if ":" in address else "ip4", address, port)
                    muxer = Yamux(secure, is_initiator=False)
                    connection = Connection(secure.peer, muxer, False, address, place, trio.current_time())  # noqa: FBT003
            if connection is not None and connection.peer != self.node_id and not self._is_banned(connection.peer):
                self._add(connection)
                await self._serve_connection(connection)
        except Exception:  # whatever a stranger sends ends its own connection and nothing else
            log.debug("the connection from %s failed", address, exc_info=True)
        finally:
            await stream.aclose()

    def _all_connections(self) -> list[Connection]:
        return [connection for several in self._connections.values() for connection in several]

    def _has_room_for(self, address: str) -> bool:
        """Whether another inbound connection is taken."""
        inbound = [connection for connection in self._all_connections() if not connection.outbound]
        if len(inbound) >= MAX_INBOUND_CONNECTIONS:
            return False
        if _is_loopback(address):
            return True
        return sum(connection.address == address for connection in inbound) < MAX_CONNECTIONS_PER_ADDRESS

    async def _make_room(self) -> None:
        """Before another connection is dialled, close the oldest idle one if need be; raises PeerUnreachable."""
        connections = self._all_connections()
        if len(connections) < MAX_CONNECTIONS:
            return
        idle = [one for one in connections if one.outbound and one.muxer.stream_count <= IDLE_STREAMS]
        if not idle:
            msg = f"all {MAX_CONNECTIONS} connections are in use"
            raise PeerUnreachable(msg)
        await idle[0].muxer.close()

    async def _serve_connection(self, connection: Connection) -> None:
        """Hold a connection until it ends."""
        try:
            await connection.muxer.run(lambda stream: self._accept_stream(connection.peer, stream))
        except Exception:  # a broken connection is a disconnected peer
            log.debug("the connection to %s broke", connection.peer.short, exc_info=True)
        finally:
            self._remove(connection)

    def _add(self, connection: Connection) -> None:
        several = self._connections.setdefault(connection.peer, [])
        for other in several:
            # A second connection in the same direction: the peer lost the first one and has come back.
            if other.outbound == connection.outbound:
                self._nursery.start_soon(other.muxer.close)
        several.append(connection)
        self._connected[connection.peer] = None
        self._connected.move_to_end(connection.peer)
        if len(self._connected) > MAX_KNOWN_PEERS:
            self._connected.popitem(last=False)
        if len(several) == 1:
            for notify in self.on_connected:
                notify(connection)

    def _remove(self, connection: Connection) -> None:
        several = self._connections[connection.peer]
        several.remove(connection)
        if not several:
            del self._connections[connection.peer]
            for notify in self.on_disconnected:
                notify(connection.peer)

    def connection(self, peer: NodeId) -> Connection | None:
        """The connection to use for a peer.

        When both sides have dialled each other at once, both use the one that the smaller identity dialled.
        """
        usable = [one for one in self._connections.get(peer, []) if not one.muxer.is_closed]
        return max(usable, key=lambda one: one.outbound == (self.node_id < peer), default=None)

    def learn(self, peer: NodeId, addresses: Sequence[TcpAddress], *, hearsay: bool = False) -> None:
        """Remember where a peer may be dialled: at most MAX_ADDRESSES_PER_PEER, what the peer itself says first.

        `hearsay` (from another peer) never displaces an address that is known already.
        """
        usable = [address for address in addresses if address.port and address.peer in {None, peer}]
        if peer == self.node_id or not usable:
            return
        known = self._known.get(peer, ())
        merged = dict.fromkeys([*known, *usable] if hearsay else [*usable, *known])
        self._known[peer] = tuple(merged)[:MAX_ADDRESSES_PER_PEER]
        self._known.move_to_end(peer)
        if len(self._known) > MAX_KNOWN_PEERS:
            self._known.popitem(last=False)

    def known(self, peer: NodeId) -> tuple[TcpAddress, ...]:
        """Where a peer may be dialled."""
        return self._known.get(peer, ())

    def usable_by(self, peer: NodeId, addresses: Sequence[TcpAddress]) -> list[TcpAddress]:
        """Those of the addresses that make sense to a peer: loopback only when it is on this machine itself."""
        connection = self.connection(peer)
        is_local = connection is not None and _is_loopback(connection.address)
        return [address for address in addresses if is_local or not address.is_loopback]

    async def dial(self, peer: NodeId, addresses: Sequence[TcpAddress] = ()) -> Connection:
        """The connection to a peer, made when there is none. Raises PeerUnreachable."""
        await trio.lowlevel.checkpoint()
        while True:
            if (connection := self.connection(peer)) is not None:
                return connection
            if (dial := self._dials.get(peer)) is None:
                break
            await dial.wait()
        if peer == self.node_id:
            msg = "cannot connect to ourselves"
            raise LocalError(msg)
        if self._is_banned(peer):
            msg = f"{peer.short} was thrown out for what it sent; not dialled for a while"
            raise PeerUnreachable(msg)
        self._dials[peer] = trio.Event()
        try:
            await self._make_room()
            return await self._dial_each(peer, addresses or self.known(peer))
        finally:
            self._dials.pop(peer).set()

    async def _dial_each(self, peer: NodeId, addresses: Sequence[TcpAddress]) -> Connection:
        failures: list[str] = []
        for address in addresses:
            try:
                return await self._dial_address(peer, address)
            except PeerUnreachable as error:
                failures.append(error.message)
        msg = f"{peer.short} cannot be reached: {'; '.join(failures) or 'no address is known'}"
        raise PeerUnreachable(msg)

    async def _dial_address(self, peer: NodeId, address: TcpAddress) -> Connection:
        place = address.transport
        try:
            with trio.fail_after(DIAL_SECONDS):
                stream = await trio.open_tcp_stream(address.host, address.port)
        except trio.TooSlowError:
            msg = f"{place} does not answer"
            raise PeerUnreachable(msg) from None
        except OSError as error:
            msg = f"{place} cannot be dialled: {_reason(error)}"
            raise PeerUnreachable(msg) from error
        try:
            with trio.fail_after(HANDSHAKE_SECONDS):
                secure = await self._security.secure_outbound(TcpChannel(stream, is_initiator=True), peer)
                await select_outbound(secure, YAMUX)
        except (ConnectionLost, trio.TooSlowError) as error:
            await stream.aclose()
            msg = f"{place} does not complete the handshake"
            raise PeerUnreachable(msg) from error
        except Exception as error:
            log.debug("the handshake with %s failed", place, exc_info=True)
            await stream.aclose()
            msg = f"{place} is not {peer.short} speaking libp2p"
            raise PeerUnreachable(msg) from error
        except BaseException:
            await stream.aclose()
            raise
        muxer = Yamux(secure, is_initiator=True)
        connection = Connection(peer, muxer, True, address.host, address, trio.current_time())  # noqa: FBT003
        self._add(connection)
        self._nursery.start_soon(self._serve_connection, connection)
        try:
            # Once it answers, the peer counts us among its connections, too.
            with trio.fail_after(HANDSHAKE_SECONDS):
                await connection.muxer.ping()
        except (StreamReset, trio.TooSlowError) as error:
            await connection.muxer.close()
            msg = f"{place} closes the connection"
            raise PeerUnreachable(msg) from error
        return connection

    def _is_banned(self, peer: NodeId) -> bool:
        return self._banned.get(peer, 0.0) > trio.current_time()

    async def throw_out(self, peer: NodeId) -> None:
        """Close all connections to a peer and have nothing to do with it for BAN_SECONDS."""
        self._banned[peer] = trio.current_time() + BAN_SECONDS
        self._banned.move_to_end(peer)
        if len(self._banned) > MAX_KNOWN_PEERS:
            self._banned.popitem(last=False)
        for connection in tuple(self._connections.get(peer, ())):
            await connection.muxer.close()

    async def open_stream(self, peer: NodeId, protocol: str) -> YamuxStream:
        """Open a stream to a peer, dialling it if needed. Raises PeerUnreachable."""
        connection = await self.dial(peer)
        try:
            stream = connection.muxer.open_stream()
        except StreamReset as error:
            msg = f"{peer.short} takes no more streams from us"
            raise PeerUnreachable(msg) from error
        try:
            with trio.fail_after(NEGOTIATION_SECONDS):
                await select_outbound(stream, protocol)
        except (NegotiationError, EndOfStream, StreamReset, trio.TooSlowError) as error:
            stream.reset()
            msg = f"{peer.short} does not serve {protocol}"
            raise PeerUnreachable(msg) from error
        except BaseException:
            stream.reset()
            raise
        return stream

    @contextmanager
    def serve(self, protocol: str, serve: Callable[[NodeId, YamuxStream], Awaitable[None]]) -> Generator[None]:
        """Serve a protocol within the block; what is being served then is cancelled. Raises LocalError when taken."""
        if protocol in self._protocols:
            msg = f"{protocol} is already served"
            raise LocalError(msg)
        served = self._protocols[protocol] = _Protocol(serve)
        try:
            yield
        finally:
            del self._protocols[protocol]
            for scope in tuple(served.scopes):
                scope.cancel()

    def _accept_stream(self, peer: NodeId, stream: YamuxStream) -> bool:
        count = self._inbound_streams.get(peer, 0)
        if count >= MAX_STREAMS_PER_PEER or sum(self._inbound_streams.values()) >= MAX_STREAMS:
            return False
        self._inbound_streams[peer] = count + 1
        self._nursery.start_soon(self._serve_stream, peer, stream)
        return True

    async def _serve_stream(self, peer: NodeId, stream: YamuxStream) -> None:
        try:
            with trio.fail_after(NEGOTIATION_SECONDS):
                served = self._protocols.get(await select_inbound(stream, self._protocols))
        except Exception:  # a stream without a protocol is nobody's but the peer's
            log.debug("a stream from %s asked for nothing that we serve", peer.short, exc_info=True)
            served = None
        try:
            if served is None:
                stream.reset()
            else:
                await self._run_server(served, peer, stream)
        finally:
            self._inbound_streams[peer] -= 1
            if not self._inbound_streams[peer]:
                del self._inbound_streams[peer]

    async def _run_server(self, protocol: _Protocol, peer: NodeId, stream: YamuxStream) -> None:
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
            stream.reset()
        finally:
            protocol.scopes.discard(scope)
            stream.close()

    async def close(self) -> None:
        """Say good-bye on all connections."""
        async with trio.open_nursery() as nursery:
            for several in self._connections.values():
                for connection in several:
                    nursery.start_soon(connection.muxer.close)


def _reason(error: OSError) -> str:
    """Why a connection failed, in few words: trio wraps the errors of all addresses that it tried."""
    cause: BaseException = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cast("BaseExceptionGroup[BaseException]", cause).exceptions[-1]
    if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, socket.gaierror):
        return os.strerror(cause.errno).lower()
    return str(error.strerror or error)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
