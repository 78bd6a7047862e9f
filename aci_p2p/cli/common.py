"""What the sub-commands share: options, signals, output."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import click
import trio

from aci_p2p.config import DEFAULT_NETWORK, default_home
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.pricing import parse_amount

F = TypeVar("F", bound=Callable[..., Any])

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def home_option(function: F) -> F:
    """Adds `--home`."""
    return click.option(
        "--home",
        type=click.Path(path_type=Path, file_okay=False),
        default=default_home,
        show_default="$ACI_HOME or ~/.local/share/aci-p2p",
        help="Folder of keys, models and jobs.",
    )(function)


def network_option(function: F) -> F:
    """Adds `--network`."""
    return click.option("--network", default=DEFAULT_NETWORK, show_default=True, help="Network id.")(function)


def json_option(function: F) -> F:
    """Adds `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)


class AmountType(click.ParamType[int]):
    """An amount of ACI, such as 0.00045."""

    name = "ACI"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        """Base units."""
        if isinstance(value, int):
            return value
        try:
            return parse_amount(value)
        except LocalError as error:
            self.fail(f"{error.message}; {error.hint}", param, ctx)


class Stop:
    """How a signal reaches the work: the innermost block first, so that everything around it closes in order."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first signal that came."""
        self._outer = trio.CancelScope()
        self._inner: trio.CancelScope | None = None

    def __enter__(self) -> None:
        """Begin the innermost block: a signal cancels it alone, a second one everything."""
        self._inner = trio.CancelScope()
        self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        inner, self._inner = self._inner, None
        return bool(inner is not None and inner.__exit__(kind, error, trace))

    async def watch(self) -> None:
        """Wait for signals, until cancelled."""
        with trio.open_signal_receiver(*SIGNALS) as signals:
            async for number in signals:
                scope = self._inner if self._inner and self.signal is None else self._outer
                self.signal = signal.Signals(number)
                scope.cancel()

    async def run(self, work: Callable[[Stop], Awaitable[None]]) -> None:
        """Do the work while watching for signals."""
        with self._outer:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.watch)
                await work(self)
                nursery.cancel_scope.cancel()


def run(work: Callable[[Stop], Awaitable[None]], *, daemon: bool = False) -> None:
    """Run a command's work under trio. A signal ends a daemon normally, other commands with KeyboardInterrupt."""
    quiet_libraries()
    stop = Stop()
    trio.run(stop.run, work)
    if stop.signal is not None and not daemon:
        raise KeyboardInterrupt


def quiet_libraries() -> None:
    """Keep libraries' logs off the terminal: what users need to know, the commands say themselves."""
    logging.basicConfig(level=logging.CRITICAL + 1)


def print_json(value: object) -> None:
    """Print a JSON document on standard output."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
