"""SIGHUP: a running node reads its configuration again."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import AsyncIterator

from aci_p2p.cli.notify import notify
from aci_p2p.cli.options import Given
from aci_p2p.config import Changes, Config, LogConfig, apply, compare
from aci_p2p.node import Node
from aci_p2p.protocol.errors import AciError

log = logging.getLogger("aci_p2p.config")


def log_level(config: LogConfig) -> int:
    """The level as the logging module counts."""
    return logging.getLevelNamesMapping()[config.level.upper()]


class Reloading:
    """Takes new values as signals come."""

    def __init__(self, given: Given, running: Config, hangups: AsyncIterator[int]) -> None:
        """`running` is what the node was started with, `hangups` gives each SIGHUP."""
        self._given = given
        self._running = running
        self._hangups = hangups
        self._on_terminal = _has_terminal()

    async def run(self, node: Node) -> None:
        """Reload at each SIGHUP; returns when the terminal that the node runs on was closed."""
        async for _ in self._hangups:
            if self._on_terminal and not _has_terminal():
                return
            notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000}")
            await self.reload(node)
            notify("READY=1")

    async def reload(self, node: Node) -> None:
        """Read everything again, and take what can be taken; a configuration that does not hold changes nothing."""
        try:
            new = self._given.load().config
            changes = compare(self._running, new, serving=node.provider is not None)
            await self._take(node, changes, new)
        except AciError as error:
            problem = "; ".join(filter(None, (error.message, error.hint)))
            log.error("the configuration is not taken, the old one stays: %s", problem)  # noqa: TRY400 - one line
            return
        self._running = apply(self._running, changes)
        if changes.live:
            log.info("configuration: %s", "; ".join(map(str, changes.live)))
        if changes.restart:
            log.warning("a restart is needed for: %s", "; ".join(map(str, changes.restart)))
        if not (changes.live or changes.restart):
            log.info("the configuration is as it was")

    async def _take(self, node: Node, changes: Changes, new: Config) -> None:
        old_addresses, new_addresses = self._running.node.bootstrap, new.node.bootstrap
        # What can fail comes first.
        await node.discovery.join([address for address in new_addresses if address not in old_addresses], require=False)
        if changes.touch("provider") and new.node.provider:
            await node.provide(new.node.provider)
        node.discovery.forget([address for address in old_addresses if address not in new_addresses])
        if changes.touch("log"):
            logging.getLogger("aci_p2p").setLevel(log_level(new.log))


def _has_terminal() -> bool:
    """Whether we write to a terminal that is still there; a closed one answers no more."""
    return sys.stdout is not None and os.isatty(1)  # pyright: ignore[reportUnnecessaryComparison] - closed from outside
