"""The fixtures of the plugin, whether it is installed or not."""

from __future__ import annotations

from aci_p2p.testing.plugin import open_swarm, pytest_collection_modifyitems, swarm

__all__ = ["open_swarm", "pytest_collection_modifyitems", "swarm"]
