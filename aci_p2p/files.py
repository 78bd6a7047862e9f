"""Writing files so that a crash leaves the old one or the new one, never half of either."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from aci_p2p.protocol.errors import LocalError


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power loss. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Replace a file at once, or make it with `mode`, less what the umask takes. Raises OSError."""
    part = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` for its owner alone, making its folder if needed. Raises LocalError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, data, mode=0o600)
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror}"
        raise LocalError(msg) from None
