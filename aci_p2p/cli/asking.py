"""Asking the running node that a command's options name, and the network through it."""

from __future__ import annotations

import sys
import time
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
READY_S: Final = 60.0
"""Seconds for a running node to have started, if it is the only way into the network: loading large models takes
longer, but by then its user wants to know."""
LOOK_S: Final = 0.25
"""Seconds between looks at whether it has."""


def ask_node(given: Given, command: str) -> object:
    """The node's answer. Raises NoNode, NotReady, BadRequest, ConfigError."""
    return ask_at(given.load(), command)


def ask_at(loaded: Loaded, command: str) -> object:
    """The same, with the configuration at hand."""
    return ask(loaded.config.node.control_socket_path, command)


def status_beside(loaded: Loaded) -> StatusReport | None:
    """How the node is that runs here; None with --bootstrap, which names another way, and if its network is another.

    One that starts is waited for when it is the only way that is configured: it is up soon, while those in the address
    cache may be gone. Raises NotReady when it takes READY_S seconds.
    """
    if loaded.origins["bootstrap"].source == "flag":
        return None
    client = loaded.config.client_node
    is_only_way = not (client.bootstrap or client.p2p.mdns)
    try:
        status = _wait_until_ready(loaded) if is_only_way else _ask_status(loaded)
    except (NoNode, BadRequest):
        return None
    except NotReady:
        if is_only_way:
            raise
        return None
    return status if status["node"]["network"] == client.network else None


def _ask_status(loaded: Loaded) -> StatusReport:
    return cast("StatusReport", ask(loaded.config.node.control_socket_path, "status", timeout_s=BESIDE_S))


def _wait_until_ready(loaded: Loaded) -> StatusReport:
    """The status of a node once it has started. Raises NoNode, BadRequest, and NotReady after READY_S seconds."""
    give_up = time.monotonic() + READY_S
    told = False
    while True:
        try:
            return _ask_status(loaded)
        except NotReady:
            if time.monotonic() >= give_up:
                raise
        except NoNode as error:
            # One that loads its models may take its time to say so.
            if not (told and error.runs) or time.monotonic() >= give_up:
                raise
        if not told:
            sys.stderr.write("the node that runs here is starting or stopping; waiting for it ...\n")
            told = True
        time.sleep(LOOK_S)


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
