"""The command line: `aci-p2p`."""

from aci_p2p.cli.entry import main

__all__ = ["main"]
