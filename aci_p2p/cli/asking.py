"""Asking the running node that a command's options name, and the network through it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, cast

import click

from aci_p2p.cli.options import FOLDERS, Given
from aci_p2p.config import Loaded, NodeConfig
from aci_p2p.control import NoNode, NotReady, StatusReport, ask
from aci_p2p.control.wire import BadRequest

if TYPE_CHECKING:
    from pathlib import Path

    from aci_p2p.client import Answer

NAMING: Final = (*FOLDERS, "key")
"""Settings that say which node of this machine is meant."""
BESIDE_S: Final = 2.0
"""Seconds for a running node to say where it listens; a command that can do without it waits no longer."""


def ask_node(given: Given, command: str) -> object:
    """The node's answer. Raises NoNode, NotReady, BadRequest, ConfigError."""
    return ask_at(given.load(), command)


def ask_at(loaded: Loaded, command: str) -> object:
    """The same, with the configuration at hand."""
    return ask(loaded.config.node.control_socket_path, command)


def status_beside(loaded: Loaded) -> StatusReport | None:
    """How the node is that runs here; None with --bootstrap, which names another way, and if its network is another.

    Raises NotReady while the node starts, when it is the only way that is configured: it is up soon, while those in
    the address cache may be gone.
    """
    if loaded.origins["bootstrap"].source == "flag":
        return None
    try:
        path = loaded.config.node.control_socket_path
        status = cast("StatusReport", ask(path, "status", timeout_s=BESIDE_S))
    except (NoNode, BadRequest):
        return None
    except NotReady:
        if loaded.config.client_node.bootstrap or loaded.config.client_node.p2p.mdns:
            return None
        raise
    return status if status["node"]["network"] == loaded.config.client_node.network else None


def client_beside(loaded: Loaded) -> NodeConfig:
    """The node of a command that asks the network: unless --bootstrap says where, through the one that runs here."""
    config, status = loaded.config.client_node, status_beside(loaded)
    return config if status is None else replace(config, bootstrap=(*status["addresses"], *config.bootstrap))


def check_reachable(config: NodeConfig) -> None:
    """Raises click.UsageError when nobody is known who could be asked."""
    if not (config.bootstrap or config.p2p.mdns or config.address_cache_path.exists()):
        msg = "no node is known to ask, and none runs here: start one with aci-p2p join, or name one with --bootstrap, "
        msg += "ACI_BOOTSTRAP or bootstrap in the configuration file"
        raise click.UsageError(msg)


def proof_path(config: NodeConfig, answer: Answer) -> Path:
    """Where an answer's proof is kept, unless the user says where."""
    return config.home / "proofs" / f"{answer.receipt.body.job_id.hex()[:16]}.aciproof"
