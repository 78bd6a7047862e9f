"""Whom the doctor examines: what a node is told, and what the running one says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import trio

from aci_p2p.clock import Clock, system_clock
from aci_p2p.config import NodeConfig
from aci_p2p.control import ClocksReport, NoNode, NotReady, PeersReport, StatusReport, ask
from aci_p2p.control.wire import BadRequest
from aci_p2p.node import OpenNetwork, open_libp2p
from aci_p2p.protocol.errors import AciError


@dataclass(frozen=True, slots=True)
class Subject:
    """A node, running or not."""

    config: NodeConfig
    """What it is told; as `join` would run it."""
    config_file: Path
    """The file that is read if it exists."""
    status: StatusReport | None
    """What the running node says; None: none runs, or it does not answer."""
    silence: AciError | None = None
    """Why a node that runs does not answer; None: it does, or none runs."""
    clock: Clock = system_clock
    """The machine's wall clock, Unix milliseconds."""
    open_network: OpenNetwork = open_libp2p
    """How the doctor looks at the network for itself."""
    ask: Callable[[Path, str], object] = ask
    """How the running node is asked."""

    async def peers(self) -> PeersReport:
        """The running node's connections. Raises NoNode, BadRequest."""
        return cast("PeersReport", await self._ask("peers"))

    async def clocks(self) -> ClocksReport:
        """What the running node's peers say that the time is. Raises NoNode, BadRequest."""
        return cast("ClocksReport", await self._ask("clocks"))

    async def _ask(self, command: str) -> object:
        # Its own timeout ends the thread.
        return await trio.to_thread.run_sync(self.ask, self.config.control_socket_path, command, abandon_on_cancel=True)


def find_subject(config: NodeConfig, config_file: Path) -> Subject:
    """The node that the configuration describes, and what it says if it runs."""
    path = config.control_socket_path
    try:
        return Subject(config, config_file, cast("StatusReport", ask(path, "status")))
    except (BadRequest, NotReady) as error:
        return Subject(config, config_file, None, error)
    except NoNode as error:
        return Subject(config, config_file, None, error if error.runs else None)
