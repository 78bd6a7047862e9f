"""Progress bars on the terminal, for work that takes long."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from aci_p2p.executor import Progress, Report


@contextmanager
def drawn() -> Generator[Report]:
    """A report that draws one bar for each stage on standard error, if that is a terminal, within the block."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total or None)
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total or None)

        yield report
