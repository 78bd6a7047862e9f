"""`aci-p2p market`: what providers ask for a model at this moment."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Final, TypeAlias, cast

import click
import trio
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aci_p2p.cli.asking import status_beside
from aci_p2p.cli.common import json_option, print_json
from aci_p2p.cli.options import FOLDERS, Given, configured
from aci_p2p.cli.output import write_text
from aci_p2p.cli.running import Stop, run
from aci_p2p.cli.texts import amount, table_text
from aci_p2p.client import resolve_model
from aci_p2p.clock import system_clock
from aci_p2p.control import ask
from aci_p2p.control.market import AskEntry, MarketReport, ModelMarket, read_market
from aci_p2p.node import open_node
from aci_p2p.protocol.errors import ResourceError

_EPILOG: Final = """\b
Examples:
  aci-p2p market                            all models that the running node looks at
  aci-p2p market MODEL                      one model
  aci-p2p market --watch MODEL              as it changes, until Ctrl-C
  aci-p2p market MODEL --bootstrap ADDRESS  without a running node
  aci-p2p market --json | jq '.models[].asks[0]'
"""
OPTIONS: Final = (*FOLDERS, "key", "network", "bootstrap", "offline", "p2p.relay_client", "p2p.mdns")
"""Settings of commands that read an order book."""
WATCH_S: Final = 1.0
"""Seconds between two looks at the book: as fast as one reads."""
_COLUMNS: Final = ("provider", "prompt token", "output token", "latency", "free", "region", "age")
_RIGHT: Final = frozenset({"prompt token", "output token", "latency", "free", "age"})
_Read: TypeAlias = Callable[[], Awaitable[MarketReport]]


class NoAsks(ResourceError):
    """Nobody asks anything for the model."""

    code = "no_asks"


@click.command("market", short_help="Show what providers ask for a model.", epilog=_EPILOG)
@click.argument("model", required=False)
@configured(*OPTIONS)
@click.option(
    "--watch", is_flag=True, help="Show it again, a second after each look, until Ctrl-C; with --json a line each time."
)
@json_option
def command(model: str | None, given: Given, watch: bool, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Show the live order book of MODEL, a name or a weights root in hex; exit code 4 when nobody asks anything.

    Prices are those of the moment, at each provider's load. The running node of this machine is asked; without MODEL it
    shows every model that it serves or has looked at lately. Without a running node, or with --bootstrap, the command
    joins the network itself.
    """
    if watch:
        _watch(given, model, as_json=as_json)
        return
    report = market_report(given, model, all_models=True)
    if as_json:
        print_json(report)
    else:
        click.echo(_text(report), nl=False)
    if not any(market["asks"] for market in report["models"]):
        raise nobody_asks(model or "any model that the node looks at")


def market_report(given: Given, model: str | None, *, all_models: bool = False) -> MarketReport:
    """The order book of a model, or of the default one; with `all_models` of all that a running node looks at."""
    reports: list[MarketReport] = []

    async def work(stop: Stop) -> None:
        async with _open_book(given, model, all_models=all_models) as read:
            with stop:
                reports.append(await read())

    run(work)
    return reports[0]


def _text(report: MarketReport) -> str:
    return "".join(f"{market['model_root']}:\n{table_text(_table(market['asks']))}" for market in report["models"])


def _watch(given: Given, model: str | None, *, as_json: bool) -> None:
    console = Console(highlight=False)
    is_drawn = console.is_terminal and not as_json

    async def work(stop: Stop) -> None:
        async with _open_book(given, model, all_models=True) as read:
            with stop, Live(console=console, auto_refresh=False, screen=True) if is_drawn else nullcontext() as live:
                while True:
                    report = await read()
                    if live is not None:
                        live.update(_screen(report), refresh=True)
                    elif as_json:
                        await write_text(sys.stdout, json.dumps({"at_ms": system_clock(), **report}) + "\n")
                    else:
                        await write_text(sys.stdout, f"{time.strftime('%H:%M:%S')}\n{_text(report)}")
                    await trio.sleep(WATCH_S)

    run(work, daemon=True)


@asynccontextmanager
async def _open_book(given: Given, model: str | None, *, all_models: bool) -> AsyncGenerator[_Read]:
    """How to read the order book: that of the running node, or of one that lives within the block."""
    loaded = given.load()
    config = loaded.config.client_node
    root = resolve_model(model or loaded.config.client.model, config).hex()
    wanted = "" if all_models and model is None else root
    path = loaded.config.node.control_socket_path

    async def read_beside() -> MarketReport:
        answer = await trio.to_thread.run_sync(ask, path, "market", wanted, abandon_on_cancel=True)
        return cast("MarketReport", answer)

    if await trio.to_thread.run_sync(status_beside, loaded, abandon_on_cancel=True) is not None:
        yield read_beside
        return
    async with open_node(config) as node:

        async def read_own() -> MarketReport:
            return await read_market(node, root)

        yield read_own


def nobody_asks(model: str) -> NoAsks:
    """The error of a book that is empty."""
    return NoAsks(f"nobody asks anything for {model}", hint="aci-p2p providers shows who serves a model")


def asks_of(report: MarketReport) -> ModelMarket:
    """The only model of a report."""
    (market,) = report["models"]
    return market


def _screen(report: MarketReport) -> Group:
    now = time.strftime("%H:%M:%S")
    parts: list[Text | Table] = [Text(f"{now}  Ctrl-C ends", style="dim")]
    for market in report["models"]:
        parts += [Text(f"{market['model_root']}:"), _table(market["asks"])]
    if not any(market["asks"] for market in report["models"]):
        parts.append(Text("nobody asks anything yet", style="dim"))
    return Group(*parts)


def _table(asks: list[AskEntry]) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in _RIGHT else "left", overflow="fold")
    for one in asks:
        cells = (
            one["provider"] + (" (this node)" if one["own"] else ""),
            amount(one["input_token_price"]),
            amount(one["output_token_price"]),
            f"{one['latency_ms']} ms",
            f"{one['free_slots']} of {one['slots']}",
            one["region"] or "-",
            f"{one['age_s']:.0f} s",
        )
        table.add_row(*map(Text, cells))
    return table
