"""The error tree: every error says whose fault it is.

`LocalError` is ours or our user's (fix the input), `RemoteError` is a peer's (blame it), `ResourceError` is nobody's
(something needed is not there now: try again or elsewhere). Code below the edge raises these with typed fields; the
command line and the client API translate them once, into a line and an exit code. After h11's `LocalProtocolError`
and `RemoteProtocolError`.
"""

from __future__ import annotations

from typing import ClassVar


class AciError(Exception):
    """Base of every error that ACI raises on purpose."""

    code: ClassVar[str] = "error"
    """Stable machine-readable name, for `--json` and logs."""
    exit_code: ClassVar[int] = 1
    """Exit status of the command line."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        """`message` is one line saying what happened; `hint` is one line saying what to do, or empty."""
        super().__init__(message)
        self.message = message
        self.hint = hint


class LocalError(AciError):
    """This node, its configuration or its user is at fault."""

    code = "local"
    exit_code = 2


class RemoteError(AciError):
    """A peer is at fault: it broke the protocol or its promise."""

    code = "remote"
    exit_code = 3


class ResourceError(AciError):
    """Nobody is at fault: something needed is missing, busy, too dear or too late."""

    code = "resource"
    exit_code = 4
