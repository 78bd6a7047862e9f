"""`aci-p2p join`: run a node until it is stopped."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Final, TextIO, cast

import click
import trio
from rich.console import Console

from aci_p2p.cli.common import program
from aci_p2p.cli.loading import loading
from aci_p2p.cli.notify import notify
from aci_p2p.cli.options import NODE, Given, configured
from aci_p2p.cli.output import Background, can_be_live
from aci_p2p.cli.reload import Reloading, log_level
from aci_p2p.cli.running import Logs, Stop, run
from aci_p2p.cli.texts import plural
from aci_p2p.config import Loaded, NodeConfig
from aci_p2p.control import Journal
from aci_p2p.control.observer import Observer
from aci_p2p.control.server import open_control
from aci_p2p.node import Node, open_node
from aci_p2p.protocol.pricing import format_amount
from aci_p2p.tasks import open_background

_EPILOG: Final = """\b
Examples:
  aci-p2p join                                      serve the models of the store, start a new network
  aci-p2p join --bootstrap ADDRESS -s MODEL         join a network and serve one model of the store
  aci-p2p join --no-serve                           only help others to find each other
  aci-p2p join --listen /ip4/127.0.0.1/tcp/0        any free port, this machine only
  aci-p2p join --no-live --log-format json          lines for programs, also on a terminal
  ACI_PROVIDER_SLOTS=2 aci-p2p join                 every option is a variable, too, and a setting of the file
"""
CLOSING_S: Final = 15
"""Seconds beyond the grace period in which a node that stops has closed everything."""

log = logging.getLogger("aci_p2p.node")


@dataclass(frozen=True, slots=True)
class _Daemon:
    """What `join` runs."""

    config: NodeConfig
    """As it can be done: without a provider when there is no model."""
    loaded: Loaded
    """As it was given."""
    stop: Stop
    """How signals end it."""
    reloading: Reloading
    """How SIGHUP changes it."""
    console: Console
    """Standard output."""
    journal: Journal
    """What was logged."""
    live: bool
    """Whether to show the one-screen view."""

    async def serve(self) -> None:
        """Run the node until a signal ends it and its jobs are finished or handed back."""
        self._say_what_begins()
        async with (
            # Before the node, which may take a minute to load its models: whoever asks meanwhile is told so.
            open_control(self.config.control_socket_path) as control,
            open_node(self.config, require_bootstrap=False) as node,
        ):
            observer = Observer(node, self.journal, self.loaded.file if self.loaded.found else None)
            with control.answering(observer.commands):
                await self._run(node, observer)
        self.console.print("stopped")

    async def _run(self, node: Node, observer: Observer) -> None:
        async with self._shown(node, observer), open_background() as tasks:
            tasks.start_soon(observer.watch)
            notify("READY=1")
            with self.stop:
                await self.reloading.run(node)
            observer.stopping = True
            with self.stop:
                await _finish_jobs(node)
            # Closing the node hands back what still runs.

    def _say_what_begins(self) -> None:
        provider = self.loaded.config.node.provider
        if self.config.provider and self.config.provider.serve:
            models = ", ".join(self.config.provider.models) or "all models of the store"
            self.console.print(f"loading {models} ...", style="dim")
        elif provider and provider.serve:
            hint = f"no model in the store, serving none; fetch one with: {program()} models pull"
            self.console.print(hint, style="yellow")

    @asynccontextmanager
    async def _shown(self, node: Node, observer: Observer) -> AsyncGenerator[None]:
        if not self.live:
            _introduce(self.console, node)
            yield
            return
        # Imported here: nodes without a terminal do without.
        from aci_p2p.cli.live import open_live  # noqa: PLC0415

        async with open_live(observer, self.journal, sys.stdout):
            yield


@click.command("join", short_help="Run a node, and serve models.", epilog=_EPILOG)
@configured(*NODE)
@click.option("--live/--no-live", default=None, help="Show one screen that is kept current.  [default: on a terminal]")
@click.option("--verbose", "-v", is_flag=True, help="The same as --log-level debug.")
def command(given: Given, live: bool | None, verbose: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Run a node until Ctrl-C or SIGTERM: it helps others to find each other, and serves models to the market.

    Stopped, it takes no more jobs and finishes those that run within the grace period; a second signal hands them back
    at once. SIGHUP makes it read its configuration again: prices, slots, models, bootstrap addresses and the log level
    are taken at once, the rest when it starts again.
    """
    if verbose:
        given.flags["log.level"] = "debug"
    loaded = given.load()
    config, settings = loaded.config.node, loaded.config.log
    if not _has_models(config):
        config = replace(config, provider=None)
    shows = can_be_live(sys.stdout) and (live if live is not None else loaded.origins["log.format"].source == "default")
    journal = Journal()
    with loading():
        # Here, because the event loop would stand still for as long as it takes.
        import_module("aci_p2p.network.libp2p")

    async def work(stop: Stop) -> None:
        with trio.open_signal_receiver(signal.SIGHUP) as hangups, Background(sys.stdout) as output:
            console = Console(file=cast("TextIO", output), highlight=False, soft_wrap=True)
            reloading = Reloading(given, loaded.config, hangups)
            await _Daemon(config, loaded, stop, reloading, console, journal, shows).serve()

    # On the screen, lines of log have their place; elsewhere they go on.
    to_stderr = not (shows and sys.stderr.isatty())
    run(work, daemon=True, logs=Logs(log_level(settings), settings.format, journal, to_stderr))


def _has_models(config: NodeConfig) -> bool:
    """Whether there is something to serve where a node is told to."""
    if config.provider is None or not config.provider.serve or config.provider.models:
        return True
    # Imported here, as what nodes that serve nothing should not pay for.
    from aci_p2p.executor import ModelStore  # noqa: PLC0415

    return bool(ModelStore(config.models_path).list())


async def _finish_jobs(node: Node) -> None:
    """Take no more jobs, and let those that run end within the grace period."""
    role, config = node.provider, node.config.provider
    grace_s = config.grace_s if config else 0
    notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={(grace_s + CLOSING_S) * 1_000_000}")
    if role is None:
        return
    running = len(role.progress())
    log.info("stopping", extra={"fields": {"jobs": running, "grace_s": grace_s}})
    await role.drain(grace_s)
    if left := len(role.progress()):
        log.warning("jobs are handed back: the grace period is over", extra={"fields": {"jobs": left}})


def _introduce(console: Console, node: Node) -> None:
    """Say who and where the node is; the address lines are what others need."""
    console.print(f"node {node.node_id} is up in network {node.config.network}")
    for address in node.addresses:
        console.print(f"listening on {address}")
    if node.config.bootstrap:
        reached = sum(report.reached is True for report in node.discovery.bootstrap_report())
        others = len(node.network.peers) - reached
        more = f", and to {plural(others, 'other')}" if others > 0 else ""
        console.print(f"joined: connected to {reached} of {len(node.config.bootstrap)} nodes given{more}")
    provider = node.config.provider
    if node.provider and provider:
        prices = f"{format_amount(provider.input_token_price)} a prompt token, "
        prices += f"{format_amount(provider.output_token_price)} an output token"
        names = ", ".join(record.model_name for record in node.provider.capabilities())
        console.print(f"serving {names}: {provider.slots} jobs at once, {prices}")
    if not node.addresses:
        console.print("listening nowhere: it only dials")
    elif node.provider:
        console.print(f'ask it with: {program()} infer --bootstrap {node.addresses[0]} "Hello!"', style="dim")
    else:
        console.print(f"join through it with: {program()} join --bootstrap {node.addresses[0]}", style="dim")
