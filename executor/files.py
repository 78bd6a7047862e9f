"""Files of the model store: strict reading, and one writer at a time."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, cast

from aci_p2p.executor.api import ModelUnavailable

LOCK_POLL: Final = 0.1
"""Seconds between attempts to take a lock that another process holds."""


def malformed(path: Path, problem: str, *, hint: str = "fetch or copy the file again") -> ModelUnavailable:
    """The error for a file whose content is not what it should be; `problem` is a verb phrase."""
    return ModelUnavailable(f"{path} is malformed: it {problem}", hint=hint)


def unreadable(path: Path, error: OSError) -> ModelUnavailable:
    """The error for a file that the operating system does not let us read."""
    return ModelUnavailable(f"{path} cannot be read: {error.strerror or type(error).__name__}")


def read_json(path: Path, max_bytes: int) -> dict[str, object]:
    """The JSON object in a file of at most `max_bytes`. Raises ModelUnavailable."""
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(text) > max_bytes:
        raise malformed(path, f"is longer than {max_bytes} bytes")
    return parse_json(path, text)


def parse_json(path: Path, text: bytes) -> dict[str, object]:
    """Parse `text`, read from `path`: one JSON object in UTF-8 without duplicate keys, NaN or infinities.

    Raises ModelUnavailable.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            msg = "duplicate key"
            raise ValueError(msg)
        return result

    def refuse(constant: str) -> object:
        msg = f"{constant} is not JSON"
        raise ValueError(msg)

    try:
        value: object = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise malformed(path, "does not hold valid JSON") from None
    if not isinstance(value, dict):
        raise malformed(path, "does not hold a JSON object")
    return cast("dict[str, object]", value)


@contextmanager
def exclusive(path: Path, waiting: Callable[[], None]) -> Generator[None]:
    """Hold the lock file at `path` (made if missing); the system lets go of it when the process dies.

    While another process holds it, `waiting` is called every LOCK_POLL seconds; it may raise to give up. Raises
    OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(LOCK_POLL)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def temporary_directory(parent: Path, prefix: str) -> Generator[Path]:
    """A new directory in `parent`, removed at the end unless it was renamed away. Raises OSError."""
    directory = parent / (prefix + secrets.token_hex(8))
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
