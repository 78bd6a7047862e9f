"""Asking the running node that a command's options name."""

from __future__ import annotations

from typing import Final

from aci_p2p.cli.options import FOLDERS, Given
from aci_p2p.config import Loaded
from aci_p2p.control import ask

NAMING: Final = (*FOLDERS, "key")
"""Settings that say which node of this machine is meant."""


def ask_node(given: Given, command: str) -> object:
    """The node's answer. Raises NoNode, BadRequest, ConfigError."""
    return ask_at(given.load(), command)


def ask_at(loaded: Loaded, command: str) -> object:
    """The same, with the configuration at hand."""
    return ask(loaded.config.node.control_socket_path, command)
