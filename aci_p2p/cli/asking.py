"""Asking the running node that a command's options name."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, cast

from aci_p2p.cli.options import FOLDERS, Given
from aci_p2p.config import Loaded, NodeConfig
from aci_p2p.control import NoNode, StatusReport, ask
from aci_p2p.control.wire import BadRequest

NAMING: Final = (*FOLDERS, "key")
"""Settings that say which node of this machine is meant."""
BESIDE_S: Final = 2.0
"""Seconds for a running node to say where it listens; a command that can do without it waits no longer."""


def ask_node(given: Given, command: str) -> object:
    """The node's answer. Raises NoNode, BadRequest, ConfigError."""
    return ask_at(given.load(), command)


def ask_at(loaded: Loaded, command: str) -> object:
    """The same, with the configuration at hand."""
    return ask(loaded.config.node.control_socket_path, command)


def client_beside(loaded: Loaded) -> NodeConfig:
    """The node of a command that asks the network: unless --bootstrap says where, through the one that runs here."""
    config = loaded.config.client_node
    if loaded.origins["bootstrap"].source == "flag":
        return config
    try:
        path = loaded.config.node.control_socket_path
        status = cast("StatusReport", ask(path, "status", timeout_s=BESIDE_S))
    except (NoNode, BadRequest):
        return config
    if status["node"]["network"] != config.network:
        return config
    return replace(config, bootstrap=(*status["addresses"], *config.bootstrap))
