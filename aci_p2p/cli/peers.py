"""`aci-p2p peers`: to whom the node that runs on this machine is connected."""

from __future__ import annotations

from typing import Final, cast

import click
from rich.table import Table
from rich.text import Text

from aci_p2p.cli.asking import NAMING, ask_node
from aci_p2p.cli.common import json_option, print_json
from aci_p2p.cli.options import Given, configured
from aci_p2p.cli.texts import duration, print_table, short_peer
from aci_p2p.control import PeersReport
from aci_p2p.control.report import PeerEntry
from aci_p2p.protocol.text import printable

_EPILOG: Final = """\b
Examples:
  aci-p2p peers                                           all connections, the oldest first
  aci-p2p peers --json | jq -r '.peers[].address'         for programs
"""
_COLUMNS: Final = ("peer", "address", "dir", "relay", "age", "rtt", "streams", "score", "topics", "program")
_RIGHT: Final = frozenset({"age", "rtt", "streams", "score"})


@click.command("peers", short_help="Show the running node's connections.", epilog=_EPILOG)
@configured(*NAMING)
@json_option
def command(given: Given, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Show to whom the node that runs on this machine is connected, and how. Exit code 4 when none runs."""
    answer = ask_node(given, "peers")
    if as_json:
        print_json(answer)
        return
    peers = cast("PeersReport", answer)["peers"]
    if not peers:
        click.echo("connected to nobody; aci-p2p doctor says why")
        return
    print_table(peers_table(peers))


def peers_table(peers: list[PeerEntry]) -> Table:
    """All columns."""
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in _RIGHT else "left", overflow="fold")
    for peer in peers:
        round_trip = "" if peer["round_trip_ms"] is None else f"{peer['round_trip_ms']:.1f} ms"
        cells = (
            peer["peer"],
            peer["address"].partition("/p2p/")[0],
            peer["direction"],
            short_peer(peer["relay"]) if peer["relay"] else "-",
            duration(peer["age_s"]),
            round_trip,
            str(peer["streams"]),
            f"{peer['score']:.1f}",
            ",".join(peer["topics"]) or "-",
            peer["agent"] or "-",
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
