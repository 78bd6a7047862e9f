"""From a stream of bytes, over TCP or through a relay, to a multiplexed connection to an authenticated peer.

A dialler upgrades in two steps. After `secure_outbound` it knows who answers, but the peer does not count it as
connected before `multiplex_outbound`; of several addresses tried at once only the first to answer gets that far.
"""

from __future__ import annotations

import logging

import trio

from aci_p2p.network.api import PeerUnreachable
from aci_p2p.network.libp2p.negotiation import select_inbound, select_outbound
from aci_p2p.network.libp2p.secure import ByteStream, ConnectionLost, SecureChannel, Security
from aci_p2p.network.libp2p.yamux import PROTOCOL as YAMUX
from aci_p2p.network.libp2p.yamux import Yamux
from aci_p2p.protocol.identity import NodeId

HANDSHAKE_SECONDS = 10.0
"""Time for a stream of bytes to become a multiplexed connection, seconds: five round trips and two signatures."""

log = logging.getLogger("aci_p2p.network")


async def secure_outbound(security: Security, stream: ByteStream, peer: NodeId | None, place: str) -> SecureChannel:
    """Find out who is at the other end of a stream that we dialled, and encrypt it.

    `place` is for the message when it fails. Raises PeerUnreachable, also when it is not `peer` (None: anybody); the
    stream is closed then.
    """
    try:
        with trio.fail_after(HANDSHAKE_SECONDS):
            return await security.secure_outbound(stream, peer)
    except (ConnectionLost, trio.TooSlowError) as error:
        await stream.aclose()
        msg = f"{place} does not complete the handshake"
        raise PeerUnreachable(msg) from error
    except Exception as error:
        log.debug("the handshake with %s failed", place, exc_info=True)
        await stream.aclose()
        msg = f"{place} is not {'a peer' if peer is None else peer.short} speaking libp2p"
        raise PeerUnreachable(msg) from error
    except BaseException:
        await stream.aclose()
        raise


async def multiplex_outbound(secure: SecureChannel, place: str) -> Yamux:
    """Agree on yamux. Raises PeerUnreachable; the connection is closed then."""
    try:
        with trio.fail_after(HANDSHAKE_SECONDS):
            await select_outbound(secure, YAMUX)
    except Exception as error:
        log.debug("the handshake with %s failed", place, exc_info=True)
        await secure.close()
        msg = f"{place} does not complete the handshake"
        raise PeerUnreachable(msg) from error
    except BaseException:
        await secure.close()
        raise
    return Yamux(secure, is_initiator=True)


async def upgrade_inbound(security: Security, stream: ByteStream) -> tuple[NodeId, Yamux]:
    """Answer a dialler. Raises whatever a stranger's bytes lead to; whoever opened the stream closes it."""
    secure = await security.secure_inbound(stream)
    await select_inbound(secure, (YAMUX,))
    return secure.peer, Yamux(secure, is_initiator=False)
