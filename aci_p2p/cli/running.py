"""Running a command's work under trio, and ending it by a signal in good order."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import trio

from aci_p2p.cli.output import Background
from aci_p2p.control.journal import Journal, LineFormatter

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
"""What ends a command."""


class Stop:
    """How a signal reaches the work: the innermost block first, so that everything around it closes in order."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first signal that came."""
        self._outer = trio.CancelScope()
        self._inner: trio.CancelScope | None = None

    def __enter__(self) -> None:
        """Begin the innermost block: a signal cancels it alone, one that comes before it has ended everything.

        After it another one may begin, for the next signal.
        """
        self._inner = trio.CancelScope()
        self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        inner, self._inner = self._inner, None
        return bool(inner is not None and inner.__exit__(kind, error, trace))

    async def watch(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Wait for signals, until cancelled."""
        with trio.open_signal_receiver(*SIGNALS) as signals:
            task_status.started()
            async for number in signals:
                inner = self._inner
                scope = inner if inner and not inner.cancel_called else self._outer
                self.signal = signal.Signals(number)
                scope.cancel()

    async def run(self, work: Callable[[Stop], Awaitable[None]]) -> None:
        """Do the work while watching for signals."""
        with self._outer:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.watch)
                await work(self)
                nursery.cancel_scope.cancel()


@dataclass(frozen=True, slots=True)
class Logs:
    """Where our own logs go."""

    level: int = logging.CRITICAL + 1
    """The least that is logged, as the logging module counts; by default nothing."""
    form: str = "text"
    """Of a line on standard error: text, logfmt or json."""
    journal: Journal | None = None
    """Keeps the last ones."""
    to_stderr: bool = True
    """Whether they are written to standard error."""


NO_LOGS: Final = Logs()
"""Of commands that say themselves what happens."""


def run(work: Callable[[Stop], Awaitable[None]], *, daemon: bool = False, logs: Logs = NO_LOGS) -> None:
    """Run a command's work under trio. A signal ends a daemon normally, other commands with KeyboardInterrupt."""
    stop = Stop()
    with _logging(logs):
        trio.run(stop.run, work)
    if stop.signal is not None and not daemon:
        raise KeyboardInterrupt


@contextmanager
def _logging(logs: Logs) -> Generator[None]:
    """Log within the block, without ever waiting for the terminal; libraries' own logs are kept off it."""
    logging.basicConfig(level=logging.CRITICAL + 1)
    ours = logging.getLogger("aci_p2p")
    ours.propagate = False
    ours.setLevel(logs.level)
    with Background(sys.stderr) as output, ExitStack() as stack:
        handlers: list[logging.Handler] = [logs.journal] if logs.journal else []
        if logs.to_stderr:
            lines = logging.StreamHandler(output)
            lines.setFormatter(LineFormatter(logs.form))
            handlers.append(lines)
        for handler in handlers:
            ours.addHandler(handler)
            stack.callback(ours.removeHandler, handler)
        yield
