"""The control socket of a running node: answers questions of this machine's user about it. It changes nothing.

Only the user may connect: the socket has mode 0600, in a folder that nobody else may write to. Whoever connects all
the same, or sends nonsense, costs a bounded amount of memory and time.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import trio

from aci_p2p.config import make_private_folder
from aci_p2p.control.wire import (
    MAX_REQUEST_BYTES,
    BadRequest,
    NotReady,
    decode_request,
    encode_error,
    encode_result,
)
from aci_p2p.protocol.errors import AciError, LocalError
from aci_p2p.tasks import open_background

SOCKET_MODE: Final = 0o600
"""Only the owner may connect."""
MAX_CLIENTS: Final = 16
"""Connections at once; more are closed unheard."""
BACKLOG: Final = 16
"""Connections that the kernel keeps until we accept them."""
REQUEST_S: Final = 10.0
"""Seconds for the next question of a connection."""
ANSWER_S: Final = 10.0
"""Seconds for finding an answer, and for the client to read it."""

Command: TypeAlias = Callable[[str], Awaitable[object]]
"""Finds the answer to a question, given its argument: anything that JSON can say. May raise AciError."""

log = logging.getLogger("aci_p2p.control")


class ControlInUse(LocalError):
    """Another running node answers on this socket."""

    code = "control_in_use"


@asynccontextmanager
async def open_control(path: Path) -> AsyncGenerator[Control]:
    """Listen on a unix socket at `path` within the block; what is answered there, `Control.answering` says.

    Before and after that, whoever asks is told that the node is starting or stopping.
    What a killed node left there is replaced. Raises ControlInUse when a running one answers there, LocalError when
    the socket cannot be made.
    """
    make_private_folder(path.parent)
    with _lock(path), _bound(path) as listening:
        service = Control()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        async with listener, open_background() as nursery:
            nursery.start_soon(partial(trio.serve_listeners, service.serve, [listener], handler_nursery=nursery))
            yield service


class Control:
    """Answers the questions of all connections. Made by `open_control`."""

    def __init__(self) -> None:
        self._commands: Mapping[str, Command] = {}
        self._clients = 0
        self._answers: set[trio.CancelScope] = set()

    @contextmanager
    def answering(self, commands: Mapping[str, Command]) -> Generator[None]:
        """Answer these within the block; answers that are still being found at its end are given up."""
        self._commands = commands
        try:
            yield
        finally:
            self._commands = {}
            for scope in self._answers:
                scope.cancel()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection to its end; nothing that it does comes out as an error."""
        if self._clients >= MAX_CLIENTS:
            await trio.aclose_forcefully(stream)
            return
        self._clients += 1
        try:
            async with stream:
                await self._answer_all(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # It hung up.
            return
        finally:
            self._clients -= 1

    async def _answer_all(self, stream: trio.SocketStream) -> None:
        pending = bytearray()
        while (line := await _read_line(stream, pending)) is not None:
            answer = await self._answer(line)
            with trio.move_on_after(ANSWER_S) as scope:
                await stream.send_all(answer)
            if scope.cancelled_caught:
                return

    async def _answer(self, line: bytes) -> bytes:
        try:
            request = decode_request(line)
            command = self._find(request.command)
            with trio.fail_after(ANSWER_S) as scope:
                self._answers.add(scope)
                try:
                    return encode_result(await command(request.argument))
                finally:
                    self._answers.remove(scope)
        except AciError as error:
            return encode_error(error)
        except trio.TooSlowError:
            return encode_error(BadRequest("the node is too busy to answer"))
        except Exception:
            # A bug of ours must not end a node that serves others.
            log.exception("a control command failed")
            return encode_error(BadRequest("the node cannot answer; its log says why"))

    def _find(self, name: str) -> Command:
        if not self._commands:
            msg = "the node that runs here is starting or stopping"
            raise NotReady(msg, hint="try again in a moment: a node that starts loads its models")
        command = self._commands.get(name)
        if command is None:
            msg = f"this node knows no command {name[:80]!r}"
            raise BadRequest(msg, hint=f"it knows: {', '.join(self._commands)}")
        return command


async def _read_line(stream: trio.SocketStream, pending: bytearray) -> bytes | None:
    """The next line without its end; None when there is none, in time and of a length that we take."""
    with trio.move_on_after(REQUEST_S):
        while (end := pending.find(b"\n")) < 0:
            if len(pending) >= MAX_REQUEST_BYTES:
                return None
            data = await stream.receive_some(MAX_REQUEST_BYTES - len(pending))
            if not data:
                return None
            pending += data
        line = bytes(pending[:end])
        del pending[: end + 1]
        return line
    return None


@contextmanager
def _lock(path: Path) -> Generator[None]:
    """Be the one node that answers at `path` within the block; the kernel frees the lock of one that is killed."""
    try:
        descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, SOCKET_MODE)
    except OSError as error:
        raise _failure(path, error) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            msg = f"another node answers on {path}"
            raise ControlInUse(msg, hint="stop it, or give this one its own --home or --runtime") from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _bound(path: Path) -> Generator[socket.socket]:
    """A listening socket at `path`, which is removed at the end. Only the holder of the lock may call it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        try:
            with suppress(FileNotFoundError):
                if not stat.S_ISSOCK(path.lstat().st_mode):
                    msg = f"{path} is not a socket"
                    raise LocalError(msg, hint="move it away")
                path.unlink()
            listening.bind(os.fspath(path))
            # Before it listens, nobody can connect.
            path.chmod(SOCKET_MODE)
            listening.listen(BACKLOG)
            listening.setblocking(False)  # noqa: FBT003 - socket's signature
        except OSError as error:
            raise _failure(path, error) from None
        try:
            yield listening
        finally:
            path.unlink(missing_ok=True)


def _failure(path: Path, error: OSError) -> LocalError:
    return LocalError(f"cannot make the control socket {path}: {error.strerror or error}")
