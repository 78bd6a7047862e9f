"""libp2p's ping protocol, for peers that ask. We ask by yamux (`Yamux.ping`), which takes no stream.

Source: https://github.com/libp2p/specs/tree/master/ping
"""

from __future__ import annotations

import trio

from aci_p2p.network.libp2p.yamux import YamuxStream
from aci_p2p.protocol.identity import NodeId

PROTOCOL = "/ipfs/ping/1.0.0"
"""Stream protocol id."""
PING_BYTES = 32
"""Length of a ping and of its answer, bytes."""
IDLE_SECONDS = 60.0
"""A stream on which no ping comes for this long is ended, seconds: peers that ask regularly do so more often."""


async def serve_ping(_peer: NodeId, stream: YamuxStream) -> None:
    """Send back what a peer sends, until it ends or falls silent."""
    with trio.move_on_after(IDLE_SECONDS) as scope:
        while True:
            await stream.write(await stream.read_exactly(PING_BYTES))
            scope.deadline = trio.current_time() + IDLE_SECONDS
