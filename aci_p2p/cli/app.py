"""The `aci-p2p` command: its sub-commands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Final, cast

import click

from aci_p2p.cli.entry import EXIT_INTERRUPTED
from aci_p2p.cli.loading import loading
from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.protocol.text import printable_lines
from aci_p2p.version import VERSION

EXIT_INTERNAL: Final = 70
"""EX_SOFTWARE of sysexits.h: a bug of ours."""

_OUTPUT_FAILS: Final = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""The reader of our output closed it early, or the file that it goes to cannot take it."""

_COMMANDS: Final = (
    "batch", "config", "demo", "doctor", "infer", "jobs", "join", "keys", "market", "models", "peers", "price",
    "providers", "simulate", "status", "verify", "why",
)  # fmt: skip

_EPILOG: Final = """\b
Examples:
  aci-p2p demo                                 a whole market on this machine
  aci-p2p join                                 serve a model
  aci-p2p infer "Hello!"                       ask it
  aci-p2p batch questions.txt                  ask it each line of a file
  aci-p2p verify answer.aciproof               check an answer offline
  aci-p2p jobs                                 what was asked and served
  aci-p2p why JOB                              why a job's provider was chosen
  aci-p2p market                               what providers ask
  aci-p2p status                               how the running node is doing
  aci-p2p doctor                               what is wrong, and what to do
  aci-p2p config show                          what is set, and where
"""


class _LazyGroup(click.Group):
    """Imports a sub-command when it is used: `verify` then needs neither numpy nor libp2p."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in _COMMANDS:
            return None
        with loading():
            command = import_module(f"aci_p2p.cli.{cmd_name}").command
        assert isinstance(command, click.Command)  # each module defines one
        return command


@click.group(
    cls=_LazyGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(VERSION, prog_name="aci-p2p")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="Configuration file of the command.")
def app(config_file: Path | None) -> None:
    """Peer-to-peer, verifiable AI inference: ask models of the network, serve yours, check every answer."""


def run() -> None:
    """Run the command line; never returns."""
    try:
        _prepare_output()
        code = app.main(prog_name="aci-p2p", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - the edge: everything becomes a line and a code
        code = _report(error)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # All is done: Ctrl-C while Python tidies up ends it without a word.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code if isinstance(code, int) else 0)


def _prepare_output() -> None:
    if cast("object", sys.stdout) is None:
        # It was closed before we began.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as we run
    # A terminal that cannot show a character gets another one for it, not an error.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="replace")


def _report(error: BaseException) -> int:
    """Print the line of an error; its exit code."""
    causes = _leaves(error)
    for cause in causes:
        if isinstance(cause, SystemExit):
            return cause.code if isinstance(cause.code, int) else 1
        if isinstance(cause, KeyboardInterrupt | click.Abort):
            _say("interrupted")
            return EXIT_INTERRUPTED
        if isinstance(cause, click.ClickException):
            return _report_usage(cause)
        if isinstance(cause, AciError):
            _say(cause.message + (f"; {cause.hint}" if cause.hint else ""))
            return cause.exit_code
        if isinstance(cause, OSError) and cause.errno in _OUTPUT_FAILS:
            return _report_output(cause)
    if os.environ.get("ACI_DEBUG"):
        raise error
    cause = causes[0]
    _say(f"internal error: {type(cause).__name__}: {cause}; please report it, with the output of ACI_DEBUG=1")
    return EXIT_INTERNAL


def _report_usage(error: click.ClickException) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        # Its message is the help of a command that needs another one.
        click.echo(error.format_message(), err=True)
        return error.exit_code
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f"; see {context.command_path} --help" if context else ""
    _say(error.format_message().rstrip(".") + hint)
    return error.exit_code


def _report_output(error: OSError) -> int:
    # Python's own flush at exit must not complain again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return 1
    _say(f"cannot write the output: {error.strerror}")
    return LocalError.exit_code


def _say(message: str) -> None:
    click.echo("aci-p2p: " + " ".join(printable_lines(message).split()), err=True)


def _leaves(error: BaseException) -> list[BaseException]:
    """The errors of a group of groups, or the error itself."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    parts = cast("BaseExceptionGroup[BaseException]", error).exceptions
    return [leaf for part in parts for leaf in _leaves(part)]
