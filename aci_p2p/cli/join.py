"""`aci-p2p join`: run a node until it is stopped."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import click
import trio
from rich.console import Console

from aci_p2p.cli.common import AmountType, home_option, network_option, program
from aci_p2p.cli.running import Stop, run
from aci_p2p.config import (
    DEFAULT_INPUT_PRICE,
    DEFAULT_OUTPUT_PRICE,
    DEFAULT_SLOTS,
    NodeConfig,
    ProviderConfig,
)
from aci_p2p.executor import ModelStore
from aci_p2p.network import NetworkConfig
from aci_p2p.node import Node, open_node
from aci_p2p.protocol.pricing import format_amount

DEFAULT_LISTEN: Final = "/ip4/0.0.0.0/tcp/9400"
"""All interfaces, on a port that firewalls can be opened for."""

_EPILOG = """\b
Examples:
  aci-p2p join                                      serve the models of the store, start a new network
  aci-p2p join --bootstrap ADDRESS --serve MODEL    join a network and serve one model
  aci-p2p join --no-serve                           only help others to find each other
  aci-p2p join --listen /ip4/127.0.0.1/tcp/0        any free port, this machine only
"""


@click.command("join", short_help="Run a node, and serve models.", epilog=_EPILOG)
@click.option("--bootstrap", "-b", multiple=True, help="Multiaddr of a node to join through.")
@click.option("--listen", "-l", multiple=True, default=(DEFAULT_LISTEN,), show_default=True, help="Where to listen.")
@click.option("--serve", "-s", "models", multiple=True, help="Model to serve; by default all in the store.")
@click.option("--no-serve", is_flag=True, help="Serve no model.")
@click.option(
    "--input-price", type=AmountType(), default=DEFAULT_INPUT_PRICE, show_default="0.000001", help="A prompt token."
)
@click.option(
    "--output-price",
    type=AmountType(),
    default=DEFAULT_OUTPUT_PRICE,
    show_default="0.000004",
    help="An output token.",
)
@click.option("--slots", type=click.IntRange(1, 1_024), default=DEFAULT_SLOTS, show_default=True, help="Jobs at once.")
@click.option("--threads", type=click.IntRange(1, 1_024), show_default="cores - 1", help="Threads of the executor.")
@click.option("--verbose", "-v", is_flag=True, help="Log more.")
@click.option("--key", default="node", show_default=True, help="Name of the key to run under.")
@home_option
@network_option
def command(
    bootstrap: tuple[str, ...],
    listen: tuple[str, ...],
    models: tuple[str, ...],
    no_serve: bool,  # noqa: FBT001 - click passes flags so
    input_price: int,
    output_price: int,
    slots: int,
    threads: int | None,
    verbose: bool,  # noqa: FBT001 - click passes flags so
    key: str,
    home: Path,
    network: str,
) -> None:
    """Run a node until Ctrl-C or SIGTERM: it helps others to find each other, and serves models to the market."""
    names = () if no_serve else models or tuple(model.name for model in ModelStore(home / "models").list())
    provider = (
        ProviderConfig(
            models=names, input_token_price=input_price, output_token_price=output_price, slots=slots, threads=threads
        )
        if names
        else None
    )
    config = NodeConfig(
        home=home,
        network=network,
        key=key,
        own_key=True,
        p2p=NetworkConfig(listen=listen),
        bootstrap=bootstrap,
        provider=provider,
    )

    async def work(stop: Stop) -> None:
        await _serve(config, stop, explain=not no_serve)

    run(work, daemon=True, log_level=logging.DEBUG if verbose else logging.INFO)


async def _serve(config: NodeConfig, stop: Stop, *, explain: bool) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if config.provider:
        console.print(f"loading {', '.join(config.provider.models)} ...", style="dim")
    elif explain:
        console.print(f"no model in the store, serving none; fetch one with: {program()} models pull", style="yellow")
    async with open_node(config) as node:
        _introduce(console, node)
        with stop:
            await trio.sleep_forever()
    console.print("stopped")


def _introduce(console: Console, node: Node) -> None:
    """Say who and where the node is; the address lines are what others need."""
    console.print(f"node {node.node_id} is up in network {node.config.network}")
    for address in node.addresses:
        console.print(f"listening on {address}")
    if node.config.bootstrap:
        console.print(f"joined: connected to {len(node.network.peers)} of {len(node.config.bootstrap)} nodes given")
    provider = node.config.provider
    if provider:
        prices = f"{format_amount(provider.input_token_price)} a prompt token, "
        prices += f"{format_amount(provider.output_token_price)} an output token"
        console.print(f"serving {', '.join(provider.models)}: {provider.slots} jobs at once, {prices}")
    console.print(f'ask it with: {program()} infer --bootstrap {node.addresses[0]} "Hello!"', style="dim")
