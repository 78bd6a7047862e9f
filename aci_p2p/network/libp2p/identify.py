"""identify 1.0: telling a new peer which protocols we serve and where we can be dialled.

Source: https://github.com/libp2p/specs/tree/master/identify
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError
from libp2p.identity.identify.pb.identify_pb2 import Identify

from aci_p2p.network.libp2p.addresses import TcpAddress, parse_all
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.varint import prefixed, read_prefixed
from aci_p2p.network.libp2p.yamux import YamuxStream
from aci_p2p.network.limits import MAX_ADDRESSES_PER_PEER
from aci_p2p.protocol.identity import NodeId

PROTOCOL = "/ipfs/id/1.0.0"
"""Stream protocol id."""
PROTOCOL_VERSION = "aci/1.0.0"
"""Protocol family that we name to peers."""
AGENT_VERSION = "aci-p2p"
"""Program that we name to peers."""
MAX_IDENTIFY_BYTES = 8 << 10
"""Longest answer that we read, bytes (the specification's advice)."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a peer says of itself."""

    protocols: frozenset[str]
    """Protocols that it serves."""
    addresses: tuple[TcpAddress, ...]
    """Where it says it can be dialled."""


class IdentifyError(Exception):
    """A peer's answer is malformed."""


async def serve_identify(host: Host, peer: NodeId, stream: YamuxStream) -> None:
    """Answer one identify stream."""
    answer = Identify(
        protocol_version=PROTOCOL_VERSION,
        agent_version=AGENT_VERSION,
        public_key=host.node_id.peer_id[2:],
        listen_addrs=[address.to_bytes() for address in host.usable_by(peer, host.addresses)],
        protocols=host.protocols,
    )
    await stream.write(prefixed(answer.SerializeToString()))


async def request_identify(host: Host, peer: NodeId) -> Identity:
    """Ask a connected peer; raises when it does not answer well."""
    stream = await host.open_stream(peer, PROTOCOL)
    try:
        answer = Identify.FromString(await read_prefixed(stream, MAX_IDENTIFY_BYTES))
    except DecodeError as error:
        msg = "the identify message is malformed"
        raise IdentifyError(msg) from error
    finally:
        stream.reset()
    return Identity(frozenset(answer.protocols), tuple(parse_all(answer.listen_addrs, MAX_ADDRESSES_PER_PEER)))
