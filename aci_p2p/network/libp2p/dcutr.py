"""DCUtR: from a relayed connection to a direct one, by dialling the dialler or by punching holes into both NATs.

Whoever was dialled through a relay first dials the public addresses of the other side. If that fails, both tell each
other over the relayed connection where they are seen from outside, and connect to each other at the same moment, each
from the port at which it listens. The NATs then see an answer where the other side sees a question, which TCP allows
("simultaneous open", RFC 9293 section 3.5). The dialler of the relayed connection is the client on the new one.

That works through NATs that keep the port of what goes out, and not through those that choose one at random.

Source: https://github.com/libp2p/specs/blob/master/relay/DCUtR.md
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import trio
from google.protobuf.message import DecodeError

from aci_p2p.network.api import PeerUnreachable
from aci_p2p.network.libp2p.addresses import TcpAddress, parse_all
from aci_p2p.network.libp2p.connections import Connection
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.identify import Identity
from aci_p2p.network.libp2p.upstream import HolePunch
from aci_p2p.network.libp2p.varint import VarintError, prefixed, read_prefixed
from aci_p2p.network.libp2p.yamux import EndOfStream, StreamReset, YamuxStream
from aci_p2p.network.limits import MAX_ADDRESSES_PER_PEER
from aci_p2p.protocol.identity import NodeId

PROTOCOL = "/libp2p/dcutr"
"""Stream protocol id."""
MAX_MESSAGE_BYTES = 4 << 10
"""Longest message, bytes (the specification's limit)."""
MESSAGE_SECONDS = 10.0
"""Time for the other side to answer, seconds."""
ATTEMPTS = 3
"""How often a hole is tried to be punched (the specification's advice)."""
DIAL_SECONDS = 5.0
"""Time for dialling the dialler, seconds."""
PUNCH_SECONDS = 3.0
"""Time for one attempt, seconds: the clocks of both sides' attempts differ by less than a round trip."""
AGAIN_SECONDS = 0.1
"""Time before another try within an attempt, seconds, when a NAT refuses what the other side has not yet asked for."""
HANDSHAKE_SECONDS = 10.0
"""Time for a punched connection to be one to the peer, seconds."""
MAX_PUNCHED = 4
"""Addresses of the other side that are tried."""
MAX_PUNCHES = 8
"""Peers with which it is tried at once."""

log = logging.getLogger("aci_p2p.network")

_FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}


class DcutrError(Exception):
    """The other side's message is malformed, or not the one that belongs here."""


def _encode(kind: HolePunch.Type.ValueType, addresses: Sequence[TcpAddress] = ()) -> bytes:
    return prefixed(HolePunch(type=kind, ObsAddrs=[one.to_bytes() for one in addresses]).SerializeToString())


async def _read(stream: YamuxStream, expected: HolePunch.Type.ValueType) -> list[TcpAddress]:
    """The addresses in the next message. Raises DcutrError, EndOfStream, StreamReset, trio.TooSlowError."""
    try:
        with trio.fail_after(MESSAGE_SECONDS):
            message = HolePunch.FromString(await read_prefixed(stream, MAX_MESSAGE_BYTES))
    except (DecodeError, VarintError) as error:
        msg = "the message is malformed"
        raise DcutrError(msg) from error
    if message.type != expected:
        msg = "not the message that belongs here"
        raise DcutrError(msg)
    return parse_all(message.ObsAddrs, MAX_ADDRESSES_PER_PEER)


class Opened(NamedTuple):
    """A TCP connection between two NATs."""

    stream: trio.SocketStream
    """The connection."""
    place: TcpAddress
    """The other end."""


class _Found:
    """The first connection that is opened; those that come later are closed."""

    def __init__(self) -> None:
        self.first: Opened | None = None
        self.some = trio.Event()

    def put(self, place: TcpAddress, stream: trio.SocketStream) -> None:
        if self.first is None:
            self.first = Opened(stream, place)
            self.some.set()
        else:
            stream.socket.close()

    def close(self) -> None:
        if self.first is not None:
            self.first.stream.socket.close()


class HolePuncher:
    """Both sides of DCUtR."""

    def __init__(self, host: Host, nursery: trio.Nursery, presumed_addresses: Callable[[], list[TcpAddress]]) -> None:
        """`nursery` holds the punched connections; `presumed_addresses` says where we may be seen from outside."""
        self._host = host
        self._nursery = nursery
        self._presumed_addresses = presumed_addresses
        self._tried: set[Connection] = set()
        self._busy = 0
        self.succeeded = 0
        self.failed = 0

    def identified(self, peer: NodeId, identity: Identity) -> None:
        """A peer has said where it can be dialled: when it is connected through its relay, try for better."""
        connection = self._host.connection(peer)
        self._tried = {one for one in self._tried if not one.muxer.is_closed}
        if connection is None or connection.relay is None or connection.outbound or connection in self._tried:
            return
        if self._busy < MAX_PUNCHES:
            self._tried.add(connection)
            self._nursery.start_soon(self._upgrade, peer, identity)

    async def _upgrade(self, peer: NodeId, identity: Identity) -> None:
        self._busy += 1
        try:
            if await self._dial_dialler(peer, identity) or await self._punch_as_server(peer):
                self.succeeded += 1
            else:
                self.failed += 1
        except (PeerUnreachable, DcutrError, EndOfStream, StreamReset, trio.TooSlowError) as error:
            log.debug("no direct connection to %s: %s", peer.short, error)
            self.failed += 1
        finally:
            self._busy -= 1

    def _acceptable(self, addresses: Sequence[TcpAddress]) -> list[TcpAddress]:
        """Those that a stranger may make us dial: of the Internet, if that is where we are."""
        on_internet = any(address.is_global for address in self._presumed_addresses())
        direct = [one for one in addresses if one.relay is None and one.is_ip and not one.is_loopback]
        return [one for one in direct if one.is_global or not on_internet][:MAX_PUNCHED]

    def _is_direct(self, peer: NodeId) -> bool:
        connection = self._host.connection(peer)
        return connection is not None and connection.relay is None

    async def _dial_dialler(self, peer: NodeId, identity: Identity) -> bool:
        addresses = self._acceptable(identity.addresses)
        if not addresses:
            return False
        try:
            with trio.fail_after(DIAL_SECONDS):
                await self._host.dialler.dial_direct(peer, addresses)
        except (PeerUnreachable, trio.TooSlowError):
            return self._is_direct(peer)
        return True

    async def _punch_as_server(self, peer: NodeId) -> bool:
        """The side that was dialled: it speaks first, and says when."""
        stream = await self._host.open_stream(peer, PROTOCOL)
        try:
            for _ in range(ATTEMPTS):
                asked = trio.current_time()
                await stream.write(_encode(HolePunch.CONNECT, self._presumed_addresses()))
                theirs = self._acceptable(await _read(stream, HolePunch.CONNECT))
                round_trip = trio.current_time() - asked
                await stream.write(_encode(HolePunch.SYNC))
                await trio.sleep(min(round_trip / 2, PUNCH_SECONDS))
                if await self._punch(peer, theirs, is_client=False):
                    return True
        finally:
            stream.reset()
        return False

    async def serve(self, peer: NodeId, stream: YamuxStream) -> None:
        """The side that has dialled: it answers, and is the client."""
        connection = self._host.connection(peer)
        if connection is None or connection.relay is None or not connection.outbound or self._busy >= MAX_PUNCHES:
            stream.reset()
            return
        self._busy += 1
        try:
            for _ in range(ATTEMPTS):
                theirs = self._acceptable(await _read(stream, HolePunch.CONNECT))
                await stream.write(_encode(HolePunch.CONNECT, self._presumed_addresses()))
                await _read(stream, HolePunch.SYNC)
                if await self._punch(peer, theirs, is_client=True):
                    self.succeeded += 1
                    return
            self.failed += 1
        except (DcutrError, trio.TooSlowError) as error:
            log.debug("%s does not punch a hole with us: %s", peer.short, error)
            stream.reset()
        finally:
            self._busy -= 1

    async def _punch(self, peer: NodeId, addresses: Sequence[TcpAddress], *, is_client: bool) -> bool:
        """Connect to where a peer may be, from the port at which we listen; whether there is a direct connection."""
        opened = await self._first_stream(addresses) if addresses else None
        if opened is None:
            return self._is_direct(peer)
        stream, place = opened
        try:
            with trio.fail_after(HANDSHAKE_SECONDS):
                if is_client:
                    await self._host.adopt_outbound(stream, peer, place, None)
                else:
                    self._nursery.start_soon(self._host.adopt_inbound, stream, place, None, peer)
                    while not self._is_direct(peer):  # noqa: ASYNC110 - bounded, and over in a few round trips
                        await trio.sleep(AGAIN_SECONDS)
        except (PeerUnreachable, trio.TooSlowError) as error:
            log.debug("a hole to %s at %s leads nowhere: %s", peer.short, place, error)
        return self._is_direct(peer)

    async def _first_stream(self, addresses: Sequence[TcpAddress]) -> Opened | None:
        """The first TCP connection, opened by us or by the other side from one of these addresses."""
        found = _Found()
        for address in addresses:
            self._host.claims[address.host, address.port] = partial(found.put, address)
        try:
            self._host.share_ports()
            with trio.move_on_after(PUNCH_SECONDS):
                async with trio.open_nursery() as nursery:
                    for address in addresses:
                        nursery.start_soon(self._keep_connecting, address, found)
                    await found.some.wait()
                    nursery.cancel_scope.cancel()
        except BaseException:
            found.close()
            raise
        finally:
            for address in addresses:
                self._host.claims.pop((address.host, address.port), None)
        return found.first

    async def _keep_connecting(self, address: TcpAddress, found: _Found) -> None:
        """Try to connect to an address from where we listen, until it works or is cancelled."""
        bound = [one for one in self._host.bound_addresses if one.protocol == address.protocol and not one.is_loopback]
        while bound:
            try:
                stream = await _connect(bound[0], address)
            except OSError as error:
                log.debug("%s is not reached from %s: %s", address, bound[0], error)
                await trio.sleep(AGAIN_SECONDS)
            else:
                found.put(address, stream)
                return


async def _connect(local: TcpAddress, remote: TcpAddress) -> trio.SocketStream:
    """A TCP connection from an address at which we listen. Raises OSError."""
    sock = trio.socket.socket(_FAMILIES[local.protocol], socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        await sock.bind((local.host, local.port))
        await sock.connect((remote.host, remote.port))
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)
