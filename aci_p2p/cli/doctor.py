"""`aci-p2p doctor`: what is wrong, and what to do."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Final

import click
from rich.console import Console
from rich.status import Status

from aci_p2p.cli.common import json_option, print_json
from aci_p2p.cli.options import NODE, Given, configured
from aci_p2p.cli.running import Stop, run
from aci_p2p.cli.texts import plural
from aci_p2p.doctor import ORDER, Finding, Level, diagnose, find_subject
from aci_p2p.protocol.text import printable

_EPILOG: Final = """\b
Examples:
  aci-p2p doctor                           the node of this machine, running or not
  aci-p2p doctor --bootstrap ADDRESS       whether it could join there
  aci-p2p doctor --json | jq .healthy      for programs
"""
_COLORS: Final = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "red"}
_LEVEL_WIDTH: Final = max(len(level) for level in Level)
_NAME_WIDTH: Final = max(len(name) for name in ORDER)


@click.command("doctor", short_help="Find out what is wrong, and what to do.", epilog=_EPILOG)
@configured(*NODE)
@json_option
def command(given: Given, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Check everything that a node needs: clock, key, ports, DNS, bootstrap nodes, relays, models, disk and more.

    Each line says what is wrong and what to do. It needs no running node and no special rights, and changes nothing.
    Exit code 1 when there is a problem, 0 when there are only warnings.
    """
    loaded = given.load()
    subject = find_subject(loaded.config.node, loaded.file)
    shown = _Shown(quiet=as_json)
    findings: list[Finding] = []

    async def work(_: Stop) -> None:
        findings.extend(await diagnose(subject, shown.report))

    with shown:
        run(work)
    problems = [finding for finding in findings if finding.level is Level.PROBLEM]
    if as_json:
        document = [
            {"check": one.check, "level": one.level.value, "message": one.message, "action": one.action}
            for one in findings
        ]
        print_json({"healthy": not problems, "findings": document})
    else:
        warnings = sum(finding.level is Level.WARNING for finding in findings)
        click.echo(f"{plural(len(problems), 'problem')}, {plural(warnings, 'warning')}")
    if problems:
        sys.exit(1)


@dataclass(slots=True)
class _Shown:
    """Prints each check's findings, in the order of the checks, and what is still being checked."""

    quiet: bool
    """Print nothing."""
    _found: dict[str, list[Finding]] = field(default_factory=dict[str, list[Finding]])
    _next: int = 0
    _status: Status | None = None

    def __enter__(self) -> None:
        console = Console(stderr=True, highlight=False)
        if not self.quiet and console.is_terminal:
            self._status = console.status(self._waiting())
            self._status.start()

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def report(self, name: str, findings: list[Finding]) -> None:
        """A check has ended."""
        self._found[name] = findings
        while self._next < len(ORDER) and ORDER[self._next] in self._found:
            if not self.quiet:
                self._print(self._found[ORDER[self._next]])
            self._next += 1
        if self._status:
            self._status.update(self._waiting())

    def _print(self, findings: list[Finding]) -> None:
        for finding in findings:
            level = click.style(finding.level.value.ljust(_LEVEL_WIDTH), fg=_COLORS[finding.level])
            click.echo(f"{level}  {finding.check.ljust(_NAME_WIDTH)}  {printable(finding.message)}")
            if finding.action:
                click.echo(f"{' ' * (_LEVEL_WIDTH + _NAME_WIDTH + 4)}-> {printable(finding.action)}")

    def _waiting(self) -> str:
        return "checking " + ", ".join(name for name in ORDER if name not in self._found)
