"""The manifest of a model in the store: what it is called, what it consists of and the root to expect.

JSON with sorted keys, one value per line, so that the same model has the same manifest everywhere.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, cast

from aci_p2p.executor.api import ModelUnavailable
from aci_p2p.executor.files import malformed, read_json
from aci_p2p.executor.weights import FILES_MAX, ModelFile, is_file_name
from aci_p2p.protocol.hashing import DIGEST_BYTES

VERSION: Final = 1
"""Of the manifest's form."""
MANIFEST_BYTES_MAX: Final = 1 << 20
"""Bytes; FILES_MAX files need about half of it."""
LICENCE_MAX: Final = 64
"""Characters; SPDX expressions of models are short."""

ADD_AGAIN: Final = "remove the model from the store and add it again"
"""What to do about a damaged entry of the store."""

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_LICENCE = re.compile(rf"[ -~]{{1,{LICENCE_MAX}}}")
_ROOT = re.compile(rf"[0-9a-f]{{{2 * DIGEST_BYTES}}}")


def is_model_name(name: str) -> bool:
    """Whether `name` may name a model: 1 to 64 of `a-z 0-9 . _ -`, a letter or digit at both ends.

    Such a name is a plain directory name on every file system.
    """
    return _NAME.fullmatch(name) is not None


def is_licence(text: str) -> bool:
    """Whether `text` may stand for a licence: 1 to 64 printable ASCII characters."""
    return _LICENCE.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the store knows of a model."""

    name: str
    """As in the store."""
    licence: str
    """SPDX identifier, or `unknown`; as declared by whoever added the model."""
    files: tuple[ModelFile, ...]
    """Everything under the weights root, sorted by name."""
    root: bytes
    """Weights root, 32 bytes."""

    def encode(self) -> bytes:
        """The manifest file."""
        value = {
            "version": VERSION,
            "name": self.name,
            "licence": self.licence,
            "files": [{"name": file.name, "size": file.size, "leaves": file.leaves} for file in self.files],
            "root": self.root.hex(),
        }
        return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a manifest file strictly. Raises ModelUnavailable."""
        value = read_json(path, MANIFEST_BYTES_MAX)
        version = value.get("version")
        if type(version) is not int or version != VERSION:
            raise _damaged(path, f"is not of version {VERSION}")
        if value.keys() != {"version", "name", "licence", "files", "root"}:
            raise _damaged(path, "lacks a field or has one too many")
        name, licence, files, root = value["name"], value["licence"], value["files"], value["root"]
        if not isinstance(name, str) or not is_model_name(name):
            raise _damaged(path, "has a bad name")
        if not isinstance(licence, str) or not is_licence(licence):
            raise _damaged(path, "has a bad licence")
        if not isinstance(root, str) or not _ROOT.fullmatch(root):
            raise _damaged(path, "has a bad root")
        return cls(name, licence, _read_files(path, files), bytes.fromhex(root))


def _read_files(path: Path, value: object) -> tuple[ModelFile, ...]:
    if not isinstance(value, list):
        raise _damaged(path, "has no list of files")
    entries = cast("list[object]", value)
    files = tuple(_read_file(path, entry) for entry in entries[: FILES_MAX + 1])
    names = [file.name for file in files]
    if not 0 < len(names) <= FILES_MAX or names != sorted(set(names)):
        raise _damaged(path, "lists no files, too many, or not in order")
    return files


def _read_file(path: Path, value: object) -> ModelFile:
    problem = "describes a file wrongly"
    if not isinstance(value, dict):
        raise _damaged(path, problem)
    fields = cast("dict[str, object]", value)
    if fields.keys() != {"name", "size", "leaves"}:
        raise _damaged(path, problem)
    name, size = fields["name"], fields["size"]
    if not isinstance(name, str) or not is_file_name(name) or type(size) is not int or size < 0:
        raise _damaged(path, problem)
    file = ModelFile(name, size)
    if type(fields["leaves"]) is not int or fields["leaves"] != file.leaves:
        raise _damaged(path, problem)
    return file


def _damaged(path: Path, problem: str) -> ModelUnavailable:
    return malformed(path, problem, hint=ADD_AGAIN)
