"""A node's way through NATs, as far as its configuration allows: AutoNAT, relays on both sides, hole punching."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from random import Random

import trio

from aci_p2p.clock import Clock
from aci_p2p.network.config import NetworkConfig
from aci_p2p.network.libp2p import autonat as autonat_module
from aci_p2p.network.libp2p import dcutr as dcutr_module
from aci_p2p.network.libp2p.autonat import AutoNat
from aci_p2p.network.libp2p.circuit import HOP, STOP
from aci_p2p.network.libp2p.connections import Connection
from aci_p2p.network.libp2p.dcutr import HolePuncher
from aci_p2p.network.libp2p.host import Host
from aci_p2p.network.libp2p.identify import Identify, Identity
from aci_p2p.network.libp2p.relay import RelayClient
from aci_p2p.network.libp2p.relay_server import RelayServer
from aci_p2p.network.libp2p.secure import Security
from aci_p2p.protocol.identity import KeyPair, NodeId


class Traversal:
    """What has to do with NATs, put together."""

    def __init__(
        self,
        host: Host,
        identify: Identify,
        key: KeyPair,
        config: NetworkConfig,
        *,
        nursery: trio.Nursery,
        random: Random,
        clock: Clock,
    ) -> None:
        """`nursery` holds the connections that it makes; `clock` says until when reservations hold."""
        self._host = host
        self._identify = identify
        self._config = config
        # Dialling back and punching holes are dialling where peers say.
        self._punches = config.hole_punching and not config.named_only
        self.autonat = AutoNat(host, Security(key), random, identify.identity)
        self.server = RelayServer(host, key, clock)
        self.client = RelayClient(host, clock, random, self._serves_hop)
        self.puncher = HolePuncher(host, nursery, self.autonat.presumed)
        identify.on_identified.append(self._on_identified)
        host.on_connected.append(self._on_connected)
        host.connections.protected.append(self._needed)
        host.dialler.circuit = self.client.dial

    @contextmanager
    def serving(self) -> Generator[None]:
        """Serve the protocols of NAT traversal within the block."""
        with ExitStack() as stack:
            if not self._config.named_only:
                stack.enter_context(self._host.serve(autonat_module.PROTOCOL, self.autonat.serve))
            if self._config.relay_server:
                stack.enter_context(self._host.serve(HOP, self.server.serve))
            if self._config.relay_client:
                stack.enter_context(self._host.serve(STOP, self.client.serve_stop))
            if self._punches:
                stack.enter_context(self._host.serve(dcutr_module.PROTOCOL, self.puncher.serve))
            yield

    async def run(self) -> None:
        """Find out how we can be reached and see to it that we can be, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.autonat.run)
            nursery.start_soon(self.client.renew_circuits)
            if self._config.relay_client:
                nursery.start_soon(self.client.keep_reservations)

    def _serves_hop(self, peer: NodeId) -> bool:
        identity = self._identify.identity(peer)
        return identity is not None and HOP in identity.protocols

    def _on_connected(self, _connection: Connection) -> None:
        self.autonat.wake()

    def _on_identified(self, peer: NodeId, identity: Identity) -> None:
        self.autonat.wake()
        self.client.wake()
        if self._punches:
            self.puncher.identified(peer, identity)

    def _needed(self) -> Iterable[NodeId]:
        """Peers that relay for us, or we for them."""
        yield from (reservation.relay for reservation in self.client.reservations)
        yield from self.server.capacity.reserving
