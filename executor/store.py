"""The model store: models on disk, each with a manifest and a weights root that is checked before use.

    <store>/<model>/manifest.json   what the model is (manifest.py)
    <store>/<model>/files           its directory, or a symbolic link to a directory of the user
    <store>/<model>/verified.json   the file states at the last successful check
    <store>/.lock                   held by the one process that changes the store
    <store>/.staging-*              a model being made; whatever a crash leaves is removed by the next change

A model appears and disappears by one rename, so it is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final, TypeAlias

from aci_p2p.executor.api import ModelUnavailable, WeightsMismatch
from aci_p2p.executor.files import exclusive, malformed, read_json, temporary_directory
from aci_p2p.executor.manifest import ADD_AGAIN, Manifest, is_licence, is_model_name
from aci_p2p.executor.progress import Progress, Report, Stage, silent
from aci_p2p.executor.weights import FileState, ModelFile, scan, weights_root
from aci_p2p.files import sync, write_durably
from aci_p2p.protocol.errors import LocalError, ResourceError

MANIFEST_FILE: Final = "manifest.json"
FILES: Final = "files"
VERIFIED_FILE: Final = "verified.json"
LOCK_FILE: Final = ".lock"
STAGING_PREFIX: Final = ".staging-"
CONFIG_FILE: Final = "config.json"
TOKENIZER_FILE: Final = "tokenizer.json"
SINGLE_FILE: Final = "model.safetensors"
"""Weights of a model that is not sharded."""
INDEX_FILE: Final = "model.safetensors.index.json"
"""Which shard holds which tensor."""
CONFIG_BYTES_MAX: Final = 1 << 20
"""Bytes of config.json; real ones have about 1,000."""
VERIFIED_BYTES_MAX: Final = 1 << 20
"""Bytes of verified.json; FILES_MAX files need about half of it."""
CLOCK_TICK: Final = 20_000_000
"""Nanoseconds, two ticks of a 100 Hz kernel. A file changed that shortly before it was hashed could change again
without a new time stamp, so its state is not remembered."""

Fill: TypeAlias = Callable[[Path, Path], None]
"""Makes a model: `fill(directory, scratch)` creates `directory` with the files, synced to disk; `scratch` is an empty
directory for whatever it needs meanwhile."""


class ModelExists(LocalError):
    """Another model has this name in the store."""

    code = "model_exists"


class BadModelName(LocalError):
    """The text cannot name a model in the store."""

    code = "bad_model_name"


class StoreFailed(ResourceError):
    """The store cannot be written: no space, no permission, a failing disk."""

    code = "store_failed"


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model in the store."""

    name: str
    """Name in the store."""
    directory: Path
    """Holds config.json, the tokenizer and the weights; absolute, links resolved."""
    root: bytes
    """Weights root that the files must have, 32 bytes."""
    licence: str
    """SPDX identifier, or `unknown`."""
    context: int
    """Longest sequence, tokens."""
    files: tuple[ModelFile, ...]
    """Everything under the root."""
    entry: Path
    """The store's own folder for the model."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def verify(self, report: Report = silent) -> None:
        """Check that the files have the weights root; hashes them unless they are unchanged since the last check.

        Unchanged means the same size, modification and change times, inode and device of every file. Raises
        WeightsMismatch when the content, name or number of files is another, ModelUnavailable when a file is missing
        or unreadable, and what `report` raises.
        """
        states = scan(self.directory)
        for file in self.files:
            if file.name not in states:
                msg = f"model {self.name} lacks its file {file.name}"
                raise ModelUnavailable(msg, hint=ADD_AGAIN)
        as_listed = self.files == tuple(ModelFile(name, state.size) for name, state in states.items())
        if as_listed and _read_verified(self.entry / VERIFIED_FILE) == _verified(self.root, states):
            return
        started = time.time_ns()
        actual = weights_root(self.directory, states, report)
        if actual != self.root:
            raise WeightsMismatch(self.name, self.root, actual)
        if not as_listed:
            raise malformed(self.entry / MANIFEST_FILE, "lists other files than the model has", hint=ADD_AGAIN)
        _remember(self.entry, self.root, states, started)


class ModelStore:
    """The models under one directory. Safe to use from several threads and processes."""

    def __init__(self, path: Path) -> None:
        """`path` need not exist; it is made when the first model is added."""
        self.path = path.absolute()

    def list(self) -> list[StoredModel]:
        """All models that `open` would give, by name; what it would refuse is left out."""
        models: list[StoredModel] = []
        for name in sorted(entry.name for entry in self._entries() if is_model_name(entry.name)):
            with contextlib.suppress(ModelUnavailable):
                models.append(self._read(name))
        return models

    def open(self, name: str) -> StoredModel:
        """The model of that name; its weights are not checked yet (`StoredModel.verify`).

        Raises ModelUnavailable when there is none, or when its manifest, directory or config.json is damaged.
        """
        if not self._has(name):
            raise self._unknown(name)
        return self._read(name)

    def add_directory(
        self, path: Path, name: str | None = None, *, licence: str = "unknown", report: Report = silent
    ) -> StoredModel:
        """Register a local Hugging Face directory where it is: nothing is copied, and it must stay there.

        Without a name the directory's own is used, in lower case. Adding the same again changes nothing. Raises
        BadModelName, ModelExists, ModelUnavailable when config.json, tokenizer.json or the weights are missing or
        unreadable, StoreFailed, and what `report` raises.
        """
        try:
            directory = path.resolve(strict=True)
        except (OSError, RuntimeError):
            msg = f"there is no directory {path}"
            raise ModelUnavailable(msg) from None
        name = _slug(directory.name) if name is None else name
        with self._changing(report):
            existing = self._existing(name)
            if existing is not None:
                if existing.directory != directory:
                    raise _exists(name)
                existing.verify(report)
                return existing
            with temporary_directory(self.path, STAGING_PREFIX) as staging:
                (staging / FILES).symlink_to(directory, target_is_directory=True)
                return self._register(staging, name, licence, None, report)

    def install(
        self, name: str, fill: Fill, *, licence: str, root: bytes | None = None, report: Report = silent
    ) -> StoredModel:
        """Make a model inside the store unless it is there already. One process at a time; others wait, then find it.

        With `root` given, WeightsMismatch is raised when the files made have another one. Raises BadModelName,
        ModelUnavailable, StoreFailed, and what `fill` and `report` raise; nothing half made remains then.
        """
        with self._changing(report):
            existing = self._existing(name)
            if existing is not None:
                return existing
            with temporary_directory(self.path, STAGING_PREFIX) as staging:
                scratch = staging / "scratch"
                scratch.mkdir()
                fill(staging / FILES, scratch)
                shutil.rmtree(scratch)
                return self._register(staging, name, licence, root, report)

    def remove(self, name: str, *, report: Report = silent) -> None:
        """Remove a model, even a damaged one; a directory that was registered where it is stays untouched.

        Raises ModelUnavailable when there is none of that name, StoreFailed.
        """
        if not self._has(name):
            raise self._unknown(name)
        with self._changing(report), temporary_directory(self.path, STAGING_PREFIX) as staging:
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).rename(staging / name)
            sync(self.path)

    def _register(self, staging: Path, name: str, licence: str, expected: bytes | None, report: Report) -> StoredModel:
        """Hash the files in `staging`, describe them and give them their place in the store."""
        if not is_licence(licence):
            msg = f"{licence[:80]!r} does not name a licence"
            raise LocalError(msg, hint="an SPDX identifier, for example Apache-2.0")
        # Resolved, so that what is wrong with a directory that was added is said of that directory.
        directory = (staging / FILES).resolve()
        _require(directory)
        states = scan(directory)
        started = time.time_ns()
        root = weights_root(directory, states, report)
        if expected not in (None, root):
            raise WeightsMismatch(name, expected or b"", root)
        files = tuple(ModelFile(file, state.size) for file, state in states.items())
        write_durably(staging / MANIFEST_FILE, Manifest(name, licence, files, root).encode())
        _remember(staging, root, states, started)
        staging.rename(self.path / name)
        sync(self.path)
        return self._read(name)

    def _existing(self, name: str) -> StoredModel | None:
        if not is_model_name(name):
            msg = f"{name[:80]!r} cannot name a model"
            hint = "1 to 64 of a-z, 0-9, '.', '_' and '-', with a letter or digit at both ends"
            raise BadModelName(msg, hint=hint)
        return self._read(name) if (self.path / name).exists() else None

    @contextlib.contextmanager
    def _changing(self, report: Report) -> Generator[None]:
        """Be the one process that changes the store."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with exclusive(self.path / LOCK_FILE, lambda: report(Progress(Stage.WAITING, 0, 0))):
                for entry in self._entries():
                    if entry.name.startswith(STAGING_PREFIX):
                        # What a killed process's own child still writes to goes the next time.
                        shutil.rmtree(entry, ignore_errors=True)
                yield
        except OSError as error:
            msg = f"the model store {self.path} cannot be changed: {error.strerror or type(error).__name__}"
            raise StoreFailed(msg, hint="check the free space and the permissions there") from None

    def _entries(self) -> tuple[Path, ...]:
        try:
            return tuple(self.path.iterdir())
        except FileNotFoundError:
            return ()

    def _has(self, name: str) -> bool:
        return is_model_name(name) and (self.path / name).is_dir()

    def _read(self, name: str) -> StoredModel:
        entry = self.path / name
        manifest = Manifest.read(entry / MANIFEST_FILE)
        if manifest.name != name:
            raise malformed(entry / MANIFEST_FILE, f"belongs to {manifest.name}", hint=ADD_AGAIN)
        try:
            directory = (entry / FILES).resolve(strict=True)
        except (OSError, RuntimeError):  # Python 3.11 and 3.12 raise RuntimeError on a loop of links
            msg = f"the directory of model {name} is gone"
            hint = "put it back, or remove the model from the store"
            raise ModelUnavailable(msg, hint=hint) from None
        context = _read_context(directory / CONFIG_FILE)
        return StoredModel(name, directory, manifest.root, manifest.licence, context, manifest.files, entry)

    def _unknown(self, name: str) -> ModelUnavailable:
        names = ", ".join(model.name for model in self.list())
        hint = f"it has: {names}" if names else "it is empty; `aci-p2p models pull` fetches the default model"
        return ModelUnavailable(f"there is no model {name[:80]!r} in the store {self.path}", hint=hint)


def _exists(name: str) -> ModelExists:
    return ModelExists(f"the store has another model {name}", hint="give this one another name, or remove that one")


def _slug(text: str) -> str:
    """A model name made of a directory's."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")


def _require(directory: Path) -> None:
    """Raise ModelUnavailable unless `directory` has what every model has."""
    _read_context(directory / CONFIG_FILE)
    weights = (directory / SINGLE_FILE).exists() or (directory / INDEX_FILE).exists()
    if not weights or not (directory / TOKENIZER_FILE).exists():
        missing = TOKENIZER_FILE if weights else SINGLE_FILE
        msg = f"{directory} is not a model: it has no {missing}"
        raise ModelUnavailable(msg, hint="a model is a Hugging Face directory with safetensors weights")


def _read_context(path: Path) -> int:
    context = read_json(path, CONFIG_BYTES_MAX).get("max_position_embeddings")
    if type(context) is not int or context < 1:
        raise malformed(path, "does not give max_position_embeddings")
    return context


def _verified(root: bytes, states: Mapping[str, FileState]) -> dict[str, object]:
    return {"root": root.hex(), "files": {name: list(astuple(state)) for name, state in states.items()}}


def _read_verified(path: Path) -> dict[str, object] | None:
    """What `_remember` wrote last, or None: without it the files are hashed again."""
    try:
        return read_json(path, VERIFIED_BYTES_MAX)
    except ModelUnavailable:
        return None


def _remember(entry: Path, root: bytes, states: Mapping[str, FileState], started: int) -> None:
    """Note that the files had the root when hashing started, `started` nanoseconds after 1970."""
    if any(started - state.changed < CLOCK_TICK for state in states.values()):
        return
    # A store that cannot be written still serves; it hashes every time.
    with contextlib.suppress(OSError):
        write_durably(entry / VERIFIED_FILE, json.dumps(_verified(root, states)).encode())
