"""Writing files so that a crash leaves the old one or the new one, never half of either."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from aci_p2p.protocol.errors import LocalError


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`, making its folder if needed. Raises LocalError."""
    part: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        part = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror}"
        raise LocalError(msg) from None
    finally:
        if part:
            part.unlink(missing_ok=True)
