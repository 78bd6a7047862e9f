"""identify 1.0: telling peers which protocols we serve and where we can be dialled, at first and when it changes.

Source: https://github.com/libp2p/specs/tree/master/identify
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import trio
from google.protobuf.message import DecodeError

from aci_p2p.network.api import PeerUnreachable
from aci_p2p.network.libp2p.addresses import TcpAddress, parse_all
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.upstream import Identify as Message
from aci_p2p.network.libp2p.varint import VarintError, prefixed, read_prefixed
from aci_p2p.network.libp2p.yamux import StreamReset, YamuxStream
from aci_p2p.network.limits import MAX_ADDRESSES_PER_PEER
from aci_p2p.protocol.identity import NodeId
from aci_p2p.version import SOFTWARE

PROTOCOL = "/ipfs/id/1.0.0"
"""Stream protocol id: the peer that is asked says who it is."""
PUSH_PROTOCOL = "/ipfs/id/push/1.0.0"
"""Stream protocol id: a peer says unasked what has changed."""
PROTOCOL_VERSION = "aci/1.0.0"
"""Protocol family that we name to peers."""
MAX_IDENTIFY_BYTES = 8 << 10
"""Longest message that we read, bytes (the specification's advice)."""
MAX_PROTOCOLS = 64
"""Protocols of a peer that we look at."""
MAX_AGENT_TEXT = 64
"""Characters of a peer's program name that we keep."""
ASK_SECONDS = 10.0
"""Time for a new peer to say what it serves, seconds."""
PUSH_SECONDS = 5.0
"""Time for one peer to take a push, seconds."""
SETTLE_SECONDS = 1.0
"""How long to wait after a change for others, seconds: a node that starts serves one protocol after the other."""
PUSHES_AT_ONCE = 8
"""Peers that are told of a change at the same time."""

log = logging.getLogger("aci_p2p.network")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a peer says of itself, and of us."""

    protocols: frozenset[str]
    """Protocols that it serves."""
    addresses: tuple[TcpAddress, ...]
    """Where it says it can be dialled."""
    agent: str
    """What it says its program is: printable characters."""
    observed: TcpAddress | None
    """Where it sees us: behind a NAT, the NAT's address and a port of its choice."""


class IdentifyError(Exception):
    """A peer's message is malformed."""


class Identify:
    """Both sides of identify and of its push.

    Whoever wants to know what peers say appends to `on_identified`; `on_silent` tells of peers that do not say.
    """

    def __init__(self, host: Host, nursery: trio.Nursery) -> None:
        """`nursery` holds the tasks that ask new peers."""
        self._host = host
        self._identities: dict[NodeId, Identity] = {}
        self._changed = trio.Event()
        self.on_identified: list[Callable[[NodeId, Identity], None]] = []
        self.on_silent: list[Callable[[NodeId], None]] = []
        host.on_connected.append(lambda connection: nursery.start_soon(self._ask, connection.peer))
        host.on_disconnected.append(self._forget)
        host.on_changed.append(self._notice)

    def _notice(self) -> None:
        self._changed.set()

    def _forget(self, peer: NodeId) -> None:
        self._identities.pop(peer, None)

    def identity(self, peer: NodeId) -> Identity | None:
        """What a connected peer last said; None before it did."""
        return self._identities.get(peer)

    async def run(self) -> None:
        """Tell all peers when our addresses or protocols change, until cancelled."""
        told = self._describe()
        while True:
            await self._changed.wait()
            await trio.sleep(SETTLE_SECONDS)
            self._changed = trio.Event()
            if (description := self._describe()) != told:
                told = description
                await self._push_to_all()

    def _describe(self) -> tuple[frozenset[str], frozenset[TcpAddress]]:
        return frozenset(self._host.protocols), frozenset(self._host.addresses)

    async def _push_to_all(self) -> None:
        limit = trio.CapacityLimiter(PUSHES_AT_ONCE)
        async with trio.open_nursery() as nursery:
            for peer, identity in self._identities.items():
                if PUSH_PROTOCOL in identity.protocols:
                    nursery.start_soon(self._push, peer, limit)

    async def _push(self, peer: NodeId, limit: trio.CapacityLimiter) -> None:
        async with limit:
            if self._host.connection(peer) is None:
                return
            try:
                with trio.fail_after(PUSH_SECONDS):
                    stream = await self._host.open_stream(peer, PUSH_PROTOCOL)
                    try:
                        await stream.write(self._encode(peer))
                    finally:
                        stream.close()
            except (PeerUnreachable, StreamReset, trio.TooSlowError):
                log.debug("%s does not want to know what we serve", peer.short, exc_info=True)

    def _encode(self, peer: NodeId) -> bytes:
        host = self._host
        message = Message(
            protocol_version=PROTOCOL_VERSION,
            agent_version=SOFTWARE,
            public_key=host.node_id.peer_id[2:],
            listen_addrs=[address.to_bytes() for address in host.usable_by(peer, host.addresses)],
            protocols=host.protocols,
        )
        connection = host.connection(peer)
        if connection is not None and connection.relay is None and connection.place.is_ip:
            message.observed_addr = connection.place.to_bytes()
        return prefixed(message.SerializeToString())

    async def serve(self, peer: NodeId, stream: YamuxStream) -> None:
        """Answer one identify stream."""
        await stream.write(self._encode(peer))

    async def serve_push(self, peer: NodeId, stream: YamuxStream) -> None:
        """Take what a peer says unasked; it may leave out what has not changed."""
        with trio.fail_after(PUSH_SECONDS):
            pushed = await _read(stream)
        if (before := self._identities.get(peer)) is not None:
            pushed = replace(
                pushed,
                protocols=pushed.protocols or before.protocols,
                addresses=pushed.addresses or before.addresses,
                agent=pushed.agent or before.agent,
                observed=pushed.observed or before.observed,
            )
        self._learn(peer, pushed)

    async def _ask(self, peer: NodeId) -> None:
        try:
            with trio.fail_after(ASK_SECONDS):
                stream = await self._host.open_stream(peer, PROTOCOL)
                try:
                    identity = await _read(stream)
                finally:
                    stream.reset()
        except Exception:  # a peer that does not say stays out of the routing table
            log.debug("%s does not say what it serves", peer.short, exc_info=True)
            for notify in self.on_silent:
                notify(peer)
            return
        self._learn(peer, identity)

    def _learn(self, peer: NodeId, identity: Identity) -> None:
        connections = self._host.connections.of(peer)
        if not connections:
            return
        self._identities[peer] = identity
        for connection in connections:
            connection.agent = identity.agent
        self._host.learn(peer, self._host.believed(identity.addresses, peer))
        for notify in self.on_identified:
            notify(peer, identity)


async def _read(stream: YamuxStream) -> Identity:
    """Raises IdentifyError when the peer's message is malformed, StreamReset or EndOfStream when it does not come."""
    try:
        message = Message.FromString(await read_prefixed(stream, MAX_IDENTIFY_BYTES))
    except (DecodeError, VarintError) as error:
        msg = "the identify message is malformed"
        raise IdentifyError(msg) from error
    observed = parse_all([message.observed_addr], 1)
    return Identity(
        protocols=frozenset(message.protocols[:MAX_PROTOCOLS]),
        addresses=tuple(parse_all(message.listen_addrs, MAX_ADDRESSES_PER_PEER)),
        agent="".join(filter(str.isprintable, message.agent_version[:MAX_AGENT_TEXT])),
        observed=observed[0] if observed else None,
    )
