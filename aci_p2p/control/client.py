"""Asking a running node of this machine over its control socket."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Final

from aci_p2p.control.wire import MAX_ANSWER_BYTES, BadRequest, Request, decode_answer, encode_request
from aci_p2p.protocol.errors import ResourceError

TIMEOUT_S: Final = 12.0
"""Seconds for an answer; the node itself gives up a little earlier, and says so."""
_CHUNK_BYTES: Final = 1 << 16


class NoNode(ResourceError):
    """No node of this machine answers on the socket."""

    code = "no_node"

    def __init__(self, path: Path, problem: str, *, runs: bool = False) -> None:
        """`path`: of the socket; `problem`: what is wrong with it; `runs`: somebody listens there all the same."""
        hint = "see what it does, or restart it" if runs else "start one with: aci-p2p join"
        super().__init__(f"no running node answers at {path}: {problem}", hint=hint)
        self.path = path
        self.runs = runs


def ask(path: Path, command: str, argument: str = "", *, timeout_s: float = TIMEOUT_S) -> object:
    """The answer of the node that listens at `path`: what its JSON says. Raises NoNode, NotReady, BadRequest."""
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            _wait(connection, deadline)
            connection.connect(os.fspath(path))
            connection.sendall(encode_request(Request(command, argument)))
            return decode_answer(_read_line(connection, deadline))
        except FileNotFoundError:
            raise NoNode(path, "there is no such socket") from None
        except ConnectionRefusedError:
            raise NoNode(path, "the node that made it is gone") from None
        except TimeoutError:
            raise NoNode(path, f"it did not answer within {timeout_s:g} s", runs=True) from None
        except (ConnectionError, BlockingIOError):
            # Too many ask at once, it is about to end, or the question is too long.
            raise NoNode(path, "it hung up", runs=True) from None
        except OSError as error:
            raise NoNode(path, (error.strerror or str(error)).lower()) from None


def _read_line(connection: socket.socket, deadline: float) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        _wait(connection, deadline)
        part = connection.recv(_CHUNK_BYTES)
        if not part:
            raise ConnectionResetError
        line += part
        if len(line) > MAX_ANSWER_BYTES:
            msg = f"the answer is longer than {MAX_ANSWER_BYTES} bytes"
            raise BadRequest(msg)
    return bytes(line)


def _wait(connection: socket.socket, deadline: float) -> None:
    """Let the next call on the connection wait until the deadline. Raises TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)
