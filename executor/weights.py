"""The weights root: one hash that stands for all files of a model (spec/weights-root.md)."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import stat
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from aci_p2p.executor.api import ModelUnavailable
from aci_p2p.executor.files import unreadable
from aci_p2p.executor.progress import Progress, Report, Stage, silent
from aci_p2p.protocol.merkle import leaf_hash, merkle_root

LEAF_BYTES: Final = 4 << 20
"""Bytes of a file under one leaf: 128 KiB of leaf hashes for a 16 GB model."""
FILES_MAX: Final = 2048
"""Files of one model; the largest public ones have about 200 shards."""
HASH_THREADS_MAX: Final = 4
"""Threads that hash; four keep up with a fast disk (about 1.5 GB/s each)."""

_DOMAIN = b"aci-p2p/1/weights"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SUFFIXES = (".safetensors", ".json", ".jinja", ".model")
_NAMES = frozenset({"merges.txt", "vocab.txt"})


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file that the weights root covers."""

    name: str
    """Within the model's directory."""
    size: int
    """Bytes."""

    @property
    def leaves(self) -> int:
        """Leaves of the tree that cover this file; an empty file has one."""
        return max(1, -(-self.size // LEAF_BYTES))


@dataclass(frozen=True, slots=True)
class FileState:
    """What the file system says of a file: while this stays the same, so does the content."""

    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970."""
    changed: int
    """Nanoseconds since 1970 of the last change of content or inode, which no program can set back."""
    inode: int
    """Number within the device."""
    device: int
    """Number of the file system."""

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """From a stat."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)


def is_file_name(name: str) -> bool:
    """Whether a model's file may have this name: 1 to 128 of `A-Z a-z 0-9 . _ -`, a letter or digit first."""
    return _FILE_NAME.fullmatch(name) is not None


def scan(directory: Path) -> dict[str, FileState]:
    """The files in `directory` that the weights root covers, by name, in the order of the tree.

    These are all whose names a loader may read: `*.safetensors`, `*.json`, `*.jinja`, `*.model`, `merges.txt` and
    `vocab.txt`, at the top level, symbolic links followed. Raises ModelUnavailable when one has a name outside
    `[A-Za-z0-9._-]` or is not a regular file, and when there are more than FILES_MAX.
    """
    try:
        with os.scandir(directory) as entries:
            found = {entry.name: entry.stat() for entry in entries if _is_covered(entry.name)}
    except OSError as error:
        raise unreadable(Path(error.filename or directory), error) from None
    for name, status in found.items():
        if not stat.S_ISREG(status.st_mode) or not is_file_name(name):
            msg = f"{directory} holds {name[:128]!r}, which is not a plain file with a plain name"
            raise ModelUnavailable(msg, hint="a model's directory holds its files only")
    if len(found) > FILES_MAX:
        msg = f"{directory} holds more than {FILES_MAX} model files"
        raise ModelUnavailable(msg)
    return {name: FileState.of(found[name]) for name in sorted(found)}


def weights_root(directory: Path, states: dict[str, FileState], report: Report = silent) -> bytes:
    """Weights root, 32 bytes, of the files that `scan` found.

    Raises ModelUnavailable when a file is unreadable or is no longer as it was found, and what `report` raises.
    """
    done, total = 0, sum(state.size for state in states.values())
    leaves: list[bytes] = []
    with ThreadPoolExecutor(min(HASH_THREADS_MAX, os.cpu_count() or 1)) as pool:
        for name, state in states.items():
            report(Progress(Stage.HASHING, done, total))
            with contextlib.closing(_leaves(pool, directory / name, state)) as of_file:
                for leaf in of_file:
                    leaves.append(leaf)
                    done = min(done + LEAF_BYTES, total)
                    report(Progress(Stage.HASHING, done, total))
    return merkle_root(leaves)


def leaf_of(file: ModelFile, offset: int, data: bytes) -> bytes:
    """Hash of the leaf for the bytes of `file` from `offset` on: at most LEAF_BYTES of them; 32 bytes."""
    name = file.name.encode("ascii")
    return leaf_hash(
        _DOMAIN,
        len(name).to_bytes(2, "big"),
        name,
        file.size.to_bytes(8, "big"),
        offset.to_bytes(8, "big"),
        data,
    )


def _is_covered(name: str) -> bool:
    return not name.startswith(".") and (name.endswith(_SUFFIXES) or name in _NAMES)


def _leaves(pool: ThreadPoolExecutor, path: Path, state: FileState) -> Generator[bytes]:
    """Leaf hashes of one file in order, computed in the pool."""
    file = ModelFile(path.name, state.size)
    try:
        with path.open("rb", buffering=0) as handle:
            descriptor = handle.fileno()
            offsets = range(0, file.leaves * LEAF_BYTES, LEAF_BYTES)
            leaves = [pool.submit(_hash_at, descriptor, file, offset) for offset in offsets]
            try:
                yield from (leaf.result() for leaf in leaves)
            finally:
                for leaf in leaves:
                    leaf.cancel()
                # No thread may read from a descriptor that is closed and given to another file.
                concurrent.futures.wait(leaves)
            if FileState.of(os.fstat(descriptor)) != state:
                msg = f"{path} changed while it was hashed"
                raise ModelUnavailable(msg, hint="try again when nothing writes to it")
    except OSError as error:
        raise unreadable(path, error) from None


def _hash_at(descriptor: int, file: ModelFile, offset: int) -> bytes:
    return leaf_of(file, offset, os.pread(descriptor, min(LEAF_BYTES, file.size - offset), offset))
