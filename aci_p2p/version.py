"""The program's name and version, as it tells its peers."""

from __future__ import annotations

from typing import Final

# The package takes its version from here: a literal, because asking how it was installed takes 20 ms of each start.
VERSION: Final = "0.1.0"
"""This version (PEP 440)."""
SOFTWARE: Final = f"aci-p2p/{VERSION}"
"""As node records carry it."""
