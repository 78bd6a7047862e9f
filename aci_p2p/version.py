"""The program's name and version, as it tells its peers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Final


def _version() -> str:
    try:
        return version("aci-p2p")
    except PackageNotFoundError:
        return "0+source"


VERSION: Final = _version()
"""The installed package's version."""
SOFTWARE: Final = f"aci-p2p/{VERSION}"
"""As node records carry it."""
