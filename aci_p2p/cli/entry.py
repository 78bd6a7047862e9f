"""Where the command begins: before anything else is imported, so that Ctrl-C ends it in good order from then on."""

from __future__ import annotations

import sys
from typing import Final

EXIT_INTERRUPTED: Final = 130
"""128 + SIGINT, as shells report it."""


def main() -> None:
    """Run the command line; never returns."""
    try:
        # Here, because it takes a tenth of a second, in which Ctrl-C may come.
        from aci_p2p.cli.loading import loading  # noqa: PLC0415

        with loading():
            from aci_p2p.cli.app import run  # noqa: PLC0415
    except KeyboardInterrupt:
        sys.stderr.write("aci-p2p: interrupted\n")
        sys.exit(EXIT_INTERRUPTED)
    run()
