"""Key files: one Ed25519 seed each, readable by their owner alone, used by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from aci_p2p.files import sync
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import SEED_BYTES, KeyPair, NodeId

KEY_MODE: Final = 0o600
"""Only the owner may read or write a key."""
MAX_CLIENT_KEYS: Final = 64
"""Commands of one user that run at once, each with a key of its own."""

_SUFFIX: Final = ".key"
_PART: Final = ".part"
"""Suffix of a key that is being written."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_HEADER: Final = "aci-p2p ed25519 seed\n"
_FILE_BYTES_MAX: Final = 256
"""Bytes; a key file has 86. More is something else."""


class KeyFileError(LocalError):
    """A key file is missing, malformed, in use, or readable by others."""

    code = "key_file"

    def __init__(self, path: Path, problem: str, *, hint: str = "") -> None:
        super().__init__(f"key file {path}: {problem}", hint=hint)
        self.path = path


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key without its secret."""

    name: str
    """File name without suffix."""
    node_id: NodeId
    """The public half."""
    path: Path
    """Where the secret lies."""


class KeyRing:
    """The key files of one ACI home."""

    def __init__(self, directory: Path) -> None:
        """`directory` is made when the first key is."""
        self._directory = directory

    def list(self) -> list[KeyInfo]:
        """All keys, by name. Raises KeyFileError when one is unreadable or readable by others."""
        names = sorted(path.stem for path in self._directory.glob(f"*{_SUFFIX}") if _NAME.fullmatch(path.stem))
        return [KeyInfo(name, self.load(name).node_id, self._path(name)) for name in names]

    def load(self, name: str) -> KeyPair:
        """Read a key. Raises KeyFileError."""
        path = self._path(name)
        with _open(path) as file:
            return _read(path, file)

    def create(self, name: str, *, seed: bytes | None = None) -> KeyPair:
        """Make a new key, durably: of `seed` (SEED_BYTES), or at random. Raises KeyFileError when the name is taken."""
        path = self._path(name)
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise KeyFileError(path, f"cannot make its folder: {str(error.strerror).lower()}") from None
        key = KeyPair(secrets.token_bytes(SEED_BYTES) if seed is None else seed)
        part = self._directory / f".{name}.{os.getpid()}{_PART}"
        part.unlink(missing_ok=True)
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, KEY_MODE)
            with os.fdopen(descriptor, "wb") as file:
                file.write(f"{_HEADER}{key.seed.hex()}\n".encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            # A link does not replace: of two processes making the same key, one wins and no key is lost.
            os.link(part, path)
            # The name is taken: what others wrote for it, or left in a crash, is worth nothing.
            for other in self._directory.glob(f".{name}.*{_PART}"):
                other.unlink(missing_ok=True)
            sync(self._directory)
        except OSError as error:
            taken = isinstance(error, FileExistsError) or path.exists()
            raise KeyFileError(path, "it exists already" if taken else str(error.strerror).lower()) from None
        finally:
            part.unlink(missing_ok=True)
        return key

    @contextmanager
    def use(self, name: str) -> Generator[KeyPair]:
        """A key for this process alone within the block, made if missing. Raises KeyFileError when it is in use.

        Two nodes with one identity would steal each other's connections.
        """
        path = self._path(name)
        if not path.exists() and not path.is_symlink():
            try:
                self.create(name)
            except KeyFileError:
                if not path.exists():
                    raise
        with _open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                hint = "stop the other node, or give this one its own --home"
                raise KeyFileError(path, "another node of this machine runs with it", hint=hint) from None
            except OSError as error:
                raise KeyFileError(path, f"cannot lock it: {str(error.strerror).lower()}") from None
            yield _read(path, file)

    @contextmanager
    def use_any(self, base: str) -> Generator[KeyPair]:
        """The first free key of `base`, `base-2`, ... within the block, so that commands can run side by side."""
        for number in range(1, MAX_CLIENT_KEYS + 1):
            name = base if number == 1 else f"{base}-{number}"
            context = self.use(name)
            try:
                key = context.__enter__()
            except KeyFileError:
                if not self._path(name).exists():
                    raise
                self.load(name)  # a bad file is an error; a busy one is not
                continue
            try:
                yield key
            finally:
                context.__exit__(None, None, None)
            return
        raise KeyFileError(self._path(base), f"{MAX_CLIENT_KEYS} commands run with its like already")

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            msg = f"{name!r} is not a key name"
            raise LocalError(msg, hint="use letters, digits, - and _")
        return self._directory / f"{name}{_SUFFIX}"


def _open(path: Path) -> BinaryIO:
    try:
        # Neither follows a link nor waits for the other end of a pipe.
        return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK))
    except FileNotFoundError:
        hint = f"make it with: aci-p2p keys new {path.stem}"
        raise KeyFileError(path, "there is no such key", hint=hint) from None
    except OSError as error:
        problem = "it is a symbolic link" if error.errno == errno.ELOOP else str(error.strerror).lower()
        raise KeyFileError(path, problem) from None


def _read(path: Path, file: BinaryIO) -> KeyPair:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise KeyFileError(path, "it is not a file")
    mode = stat.S_IMODE(status.st_mode)
    if mode & ~KEY_MODE:
        problem = f"others may read or write it (mode {mode:04o})"
        raise KeyFileError(path, problem, hint=f"run: chmod 600 {path}")
    return KeyPair(_parse(path, file.read(_FILE_BYTES_MAX)))


def _parse(path: Path, content: bytes) -> bytes:
    text = content.decode("ascii", "replace")
    body = text.removeprefix(_HEADER).strip()
    if not text.startswith(_HEADER) or not re.fullmatch(r"[0-9a-f]{64}", body):
        raise KeyFileError(path, "it is not an ACI key")
    return bytes.fromhex(body)
