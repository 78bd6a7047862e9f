"""The command line: `aci-p2p`."""

from aci_p2p.cli.app import main

__all__ = ["main"]
