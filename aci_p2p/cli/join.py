"""`aci-p2p join`: run a node until it is stopped."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from typing import TextIO, cast

import click
import trio
from rich.console import Console

from aci_p2p.cli.common import program
from aci_p2p.cli.notify import notify
from aci_p2p.cli.options import NODE, Given, configured
from aci_p2p.cli.output import Background
from aci_p2p.cli.reload import Reloading, log_level
from aci_p2p.cli.running import Stop, run
from aci_p2p.config import NodeConfig
from aci_p2p.executor import ModelStore
from aci_p2p.node import Node, open_node
from aci_p2p.protocol.pricing import format_amount

_EPILOG = """\b
Examples:
  aci-p2p join                                      serve the models of the store, start a new network
  aci-p2p join --bootstrap ADDRESS --serve MODEL    join a network and serve one model
  aci-p2p join --no-serve                           only help others to find each other
  aci-p2p join --listen /ip4/127.0.0.1/tcp/0        any free port, this machine only
  ACI_PROVIDER_SLOTS=2 aci-p2p join                 every option is a variable, too, and a setting of the file
"""


@click.command("join", short_help="Run a node, and serve models.", epilog=_EPILOG)
@configured(*NODE)
@click.option("--verbose", "-v", is_flag=True, help="The same as --log-level debug.")
def command(given: Given, verbose: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Run a node until Ctrl-C or SIGTERM: it helps others to find each other, and serves models to the market.

    SIGHUP makes it read its configuration again: prices, slots, models, bootstrap addresses and the log level are taken
    at once, the rest when it starts again.
    """
    if verbose:
        given.flags["log.level"] = "debug"
    loaded = given.load()
    config = loaded.config.node
    provider = config.provider
    explain = False
    if provider is not None and provider.serve and not (provider.models or ModelStore(config.models_path).list()):
        config, explain = replace(config, provider=None), True

    async def work(stop: Stop) -> None:
        with trio.open_signal_receiver(signal.SIGHUP) as hangups, Background(sys.stdout) as output:
            console = Console(file=cast("TextIO", output), highlight=False, soft_wrap=True)
            await _serve(config, stop, Reloading(given, loaded.config, hangups), console, explain=explain)

    run(work, daemon=True, log_level=log_level(loaded.config.log))


async def _serve(config: NodeConfig, stop: Stop, reloading: Reloading, console: Console, *, explain: bool) -> None:
    if explain:
        console.print(f"no model in the store, serving none; fetch one with: {program()} models pull", style="yellow")
    elif config.provider and config.provider.serve:
        console.print(f"loading {', '.join(config.provider.models) or 'all models of the store'} ...", style="dim")
    async with open_node(config) as node:
        _introduce(console, node)
        notify("READY=1")
        with stop:
            await reloading.run(node)
        notify("STOPPING=1")
    console.print("stopped")


def _introduce(console: Console, node: Node) -> None:
    """Say who and where the node is; the address lines are what others need."""
    console.print(f"node {node.node_id} is up in network {node.config.network}")
    for address in node.addresses:
        console.print(f"listening on {address}")
    if node.config.bootstrap:
        console.print(f"joined: connected to {len(node.network.peers)} of {len(node.config.bootstrap)} nodes given")
    provider = node.config.provider
    if node.provider and provider:
        prices = f"{format_amount(provider.input_token_price)} a prompt token, "
        prices += f"{format_amount(provider.output_token_price)} an output token"
        names = ", ".join(record.model_name for record in node.provider.capabilities())
        console.print(f"serving {names}: {provider.slots} jobs at once, {prices}")
    console.print(f'ask it with: {program()} infer --bootstrap {node.addresses[0]} "Hello!"', style="dim")
