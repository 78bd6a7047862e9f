"""`aci-p2p providers`: who serves a model."""

from __future__ import annotations

from typing import Final, cast

import click
from rich.table import Table
from rich.text import Text

from aci_p2p.cli.asking import client_beside
from aci_p2p.cli.common import json_option, print_json
from aci_p2p.cli.options import FOLDERS, Given, configured
from aci_p2p.cli.running import Stop, run
from aci_p2p.cli.texts import print_table
from aci_p2p.client import resolve_model
from aci_p2p.config import NodeConfig
from aci_p2p.control import NoNode, NotReady, ask
from aci_p2p.control.providers import ProvidersReport, find_providers
from aci_p2p.node import open_node
from aci_p2p.protocol.errors import ResourceError
from aci_p2p.protocol.pricing import format_amount

_EPILOG: Final = """\b
Examples:
  aci-p2p providers                            of the default model, as the running node finds them
  aci-p2p providers MODEL --bootstrap ADDRESS  without a running node
"""
_OPTIONS: Final = (*FOLDERS, "key", "network", "bootstrap", "offline", "p2p.relay_client", "p2p.mdns")
_RIGHT: Final = frozenset({"context", "free", "prompt token", "output token"})


class NoProviders(ResourceError):
    """Nobody is found who serves the model."""

    code = "no_providers"


@click.command("providers", short_help="Find who serves a model.", epilog=_EPILOG)
@click.argument("model", required=False)
@configured(*_OPTIONS)
@json_option
def command(model: str | None, given: Given, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Find the providers of MODEL, a name or a weights root in hex; exit code 4 when there is none.

    The running node of this machine is asked, and is listed if it serves the model itself; without one, or with
    --bootstrap or --network, the command joins the network itself.
    """
    loaded = given.load()
    root = resolve_model(model or loaded.config.client.model, loaded.config.client_node)
    report = None if given.flags.keys() & {"bootstrap", "network"} else _ask(loaded.config.node, root)
    if report is None:
        report = _search(client_beside(loaded), root)
    if as_json:
        print_json(report)
    elif report["providers"]:
        print_table(_table(report))
    if not report["providers"]:
        msg = f"nobody is found who serves {model or loaded.config.client.model}"
        raise NoProviders(msg, hint="aci-p2p status shows to whom the node is connected")


def _ask(config: NodeConfig, root: bytes) -> ProvidersReport | None:
    """What the running node finds; None when there is none, or none yet."""
    try:
        return cast("ProvidersReport", ask(config.control_socket_path, "providers", root.hex()))
    except (NoNode, NotReady):
        return None


def _search(config: NodeConfig, root: bytes) -> ProvidersReport:
    reports: list[ProvidersReport] = []

    async def work(stop: Stop) -> None:
        async with open_node(config) as node:
            with stop:
                reports.append(await find_providers(node, root.hex()))

    run(work)
    return reports[0]


def _table(report: ProvidersReport) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for name in ("provider", "connected", "context", "free", "prompt token", "output token", "engine"):
        table.add_column(name, justify="right" if name in _RIGHT else "left", overflow="fold")
    for one in report["providers"]:
        cells = (
            one["provider"],
            "this node" if one["this_node"] else "yes" if one["connected"] else "no",
            str(one["context"]),
            f"{one['free_slots']} of {one['slots']}",
            format_amount(int(one["input_token_price"])),
            format_amount(int(one["output_token_price"])),
            f"{one['engine']}, {one['quantisation']}",
        )
        table.add_row(*map(Text, cells))
    return table
