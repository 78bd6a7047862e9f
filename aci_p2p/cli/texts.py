"""Figures as people read them."""

from __future__ import annotations

from typing import Final

import click
from rich.console import Console
from rich.table import Table

from aci_p2p.protocol.pricing import format_amount

_UNITS: Final = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
_MIB: Final = 1 << 20
SHORT_ID: Final = 8
"""Characters of a peer id that tell it from others: the last ones, as in logs."""
SHORT_JOB: Final = 8
"""Characters of a job id: the first ones."""

FILE_WIDTH: Final = 1_000
"""Columns of a table that goes to a file or a pipe: each row stays on its line."""


def duration(seconds: float) -> str:
    """The two largest units: `3 d 4 h`."""
    rest = max(round(seconds), 0)
    parts: list[str] = []
    for unit, size in _UNITS:
        count, rest = divmod(rest, size)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
        if len(parts) == 2:  # noqa: PLR2004 - as said
            break
    return " ".join(part for at, part in enumerate(parts) if at == 0 or not part.startswith("0 "))


def mebibytes(size: int) -> str:
    """Memory."""
    return f"{size / _MIB:.0f} MiB"


def short_peer(peer: str) -> str:
    """A peer id as logs show it."""
    return peer[-SHORT_ID:]


def short_job(job: str) -> str:
    """A job id as logs show it."""
    return job[:SHORT_JOB]


def amount(base_units: str) -> str:
    """An amount that a document gives in base units."""
    return format_amount(int(base_units))


def plural(count: int, noun: str) -> str:
    """`1 job`, `2 jobs`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def print_table(table: Table) -> None:
    """Print a table on standard output."""
    click.echo(table_text(table), nl=False)


def table_text(table: Table) -> str:
    """A table as standard output shows it."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    with console.capture() as captured:
        console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())
