"""The model store: finding, adding, making and removing models, whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aci_p2p.executor.api import ModelUnavailable, WeightsMismatch
from aci_p2p.executor.progress import Progress, Stage
from aci_p2p.executor.store import BadModelName, ModelExists, ModelStore, StoredModel, StoreFailed
from aci_p2p.protocol.errors import LocalError

Make = Callable[[Path], Path]
Fill = Callable[[Path, Path], None]


def tick() -> None:
    """Wait until the file system's clock has moved on."""
    time.sleep(0.02)


def test_open(store: ModelStore, model: StoredModel, directory: Path) -> None:
    assert store.open("tiny") == model
    assert model.name == "tiny"
    assert model.directory == directory
    assert model.licence == "Apache-2.0"
    assert model.context == 64


def test_unknown_model(store: ModelStore, model: StoredModel, make_model: Make, tmp_path: Path) -> None:
    store.add_directory(make_model(tmp_path / "m"), "another")
    with pytest.raises(ModelUnavailable, match="'smoll'") as raised:
        store.open("smoll")
    assert raised.value.hint == f"it has: another, {model.name}"


def test_empty_store(store: ModelStore) -> None:
    with pytest.raises(ModelUnavailable) as raised:
        store.open("tiny")
    assert "empty" in raised.value.hint
    assert store.list() == []
    assert not store.path.exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../store/tiny", "tiny/", "/tiny", "Tiny", "ti\0ny", "x" * 65, ".lock"]
)
def test_loose_names(store: ModelStore, model: StoredModel, name: str) -> None:
    assert model.name == "tiny"
    with pytest.raises(ModelUnavailable):
        store.open(name)
    with pytest.raises(ModelUnavailable):
        store.remove(name)


def test_list(store: ModelStore, model: StoredModel, make_model: Make, tmp_path: Path) -> None:
    first = store.add_directory(make_model(tmp_path / "m"), "a")
    (store.path / "stray").mkdir()
    (store.path / "file").touch()
    (store.path / "UPPER").mkdir()
    assert store.list() == [first, model]


def test_directory_gone(store: ModelStore, model: StoredModel) -> None:
    shutil.rmtree(model.directory)
    with pytest.raises(ModelUnavailable, match="is gone"):
        store.open("tiny")
    (store.path / "tiny/files").unlink()
    (store.path / "tiny/files").symlink_to("files")
    with pytest.raises(ModelUnavailable, match="is gone"):
        store.open("tiny")


@pytest.mark.parametrize("context", [None, 0, -1, "64", 64.0, True])
def test_bad_context(store: ModelStore, model: StoredModel, context: object) -> None:
    (model.directory / "config.json").write_text(json.dumps({"max_position_embeddings": context}))
    with pytest.raises(ModelUnavailable, match="max_position_embeddings"):
        store.open("tiny")


def test_relative_path(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = ModelStore(Path("here")).add_directory(Path(directory.name), "tiny")
    monkeypatch.chdir("/")
    model.verify()
    assert model.entry == tmp_path / "here/tiny"


def test_nothing_is_copied(model: StoredModel, directory: Path) -> None:
    assert (model.entry / "files").readlink() == directory
    assert sorted(path.name for path in model.entry.iterdir()) == ["files", "manifest.json", "verified.json"]


def test_name_from_the_directory(store: ModelStore, directory: Path) -> None:
    model = store.add_directory(directory)
    assert (model.name, model.licence) == ("tiny-model", "unknown")


def test_again(store: ModelStore, model: StoredModel, directory: Path) -> None:
    assert store.add_directory(directory, "tiny") == model


def test_again_after_a_change(store: ModelStore, model: StoredModel, directory: Path) -> None:
    (directory / "extra.json").touch()
    with pytest.raises(WeightsMismatch):
        store.add_directory(directory, model.name)


def test_another_of_that_name(store: ModelStore, model: StoredModel, make_model: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelExists, match="tiny"):
        store.add_directory(make_model(tmp_path / "other"), "tiny")
    assert store.open("tiny") == model


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "-a", "a-", "x" * 65, "ä", "a b", "a\n"])
def test_bad_names(store: ModelStore, directory: Path, name: str) -> None:
    with pytest.raises(BadModelName):
        store.add_directory(directory, name)


def test_a_directory_that_gives_no_name(store: ModelStore, make_model: Make, tmp_path: Path) -> None:
    with pytest.raises(BadModelName):
        store.add_directory(make_model(tmp_path / "ŝ"))


@pytest.mark.parametrize("licence", ["", "x" * 65, "a\nb"])
def test_bad_licence(store: ModelStore, directory: Path, licence: str) -> None:
    with pytest.raises(LocalError, match="licence"):
        store.add_directory(directory, "tiny", licence=licence)
    assert store.list() == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_incomplete(store: ModelStore, directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(ModelUnavailable, match=name):
        store.add_directory(directory, "tiny")


def test_no_directory(store: ModelStore, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="no directory"):
        store.add_directory(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(ModelUnavailable):
        store.add_directory(tmp_path / "file")


def test_links_as_in_a_download_cache(store: ModelStore, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    for path in list(directory.iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    model = store.add_directory(directory, "tiny")
    model.verify()
    tick()
    (tmp_path / "blobs/tokenizer.json").write_bytes(b"{}")
    with pytest.raises(WeightsMismatch):
        model.verify()


def test_remove(store: ModelStore, model: StoredModel, directory: Path) -> None:
    before = sorted(directory.iterdir())
    store.remove(model.name)
    assert sorted(directory.iterdir()) == before
    assert [path.name for path in store.path.iterdir()] == [".lock"]
    with pytest.raises(ModelUnavailable):
        store.remove(model.name)


def test_remove_a_damaged_model(store: ModelStore, model: StoredModel) -> None:
    (model.entry / "manifest.json").unlink()
    store.remove(model.name)
    assert [path.name for path in store.path.iterdir()] == [".lock"]


@pytest.fixture
def fill(make_model: Make) -> Fill:
    """Makes the tiny model."""

    def fill(directory: Path, scratch: Path) -> None:
        (scratch / "waste").write_bytes(b"x")
        make_model(directory)

    return fill


def test_install(store: ModelStore, fill: Fill) -> None:
    model = store.install("tiny", fill, licence="MIT")
    assert sorted(path.name for path in model.entry.iterdir()) == ["files", "manifest.json", "verified.json"]
    assert model.directory == store.path / "tiny/files"
    model.verify()

    def fail(_directory: Path, _scratch: Path) -> None:
        pytest.fail("made again")

    assert store.install("tiny", fail, licence="MIT") == model
    store.remove("tiny")
    assert [path.name for path in store.path.iterdir()] == [".lock"]


def test_another_root_than_expected(store: ModelStore, fill: Fill) -> None:
    with pytest.raises(WeightsMismatch) as raised:
        store.install("tiny", fill, licence="MIT", root=bytes(32))
    assert raised.value.expected == bytes(32)
    assert [path.name for path in store.path.iterdir()] == [".lock"]
    assert store.install("tiny", fill, licence="MIT", root=raised.value.actual).root == raised.value.actual


def test_stopped_while_filling(store: ModelStore, fill: Fill) -> None:
    def stop(directory: Path, scratch: Path) -> None:
        fill(directory, scratch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.install("tiny", stop, licence="MIT")
    assert [path.name for path in store.path.iterdir()] == [".lock"]


def test_what_a_crash_leaves_is_removed(store: ModelStore, fill: Fill) -> None:
    (store.path / ".staging-dead/scratch").mkdir(parents=True)
    (store.path / ".staging-dead/files").symlink_to(store.path.parent)
    assert store.list() == []
    store.install("tiny", fill, licence="MIT")
    assert sorted(path.name for path in store.path.iterdir()) == [".lock", "tiny"]


def test_what_cannot_be_removed_stays(store: ModelStore, fill: Fill) -> None:
    store.path.mkdir()
    (store.path / ".staging-file").touch()
    store.install("tiny", fill, licence="MIT")
    assert sorted(path.name for path in store.path.iterdir()) == [".lock", ".staging-file", "tiny"]


def test_a_full_disk(store: ModelStore) -> None:
    def fail(_directory: Path, _scratch: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreFailed, match="No space left"):
        store.install("tiny", fail, licence="MIT")
    assert [path.name for path in store.path.iterdir()] == [".lock"]


def test_the_store_is_a_file(tmp_path: Path, fill: Fill) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreFailed):
        ModelStore(tmp_path / "file").install("tiny", fill, licence="MIT")


def test_the_second_of_two_waits(store: ModelStore, fill: Fill) -> None:
    waiting = threading.Event()
    made: list[str] = []

    def first(directory: Path, scratch: Path) -> None:
        assert waiting.wait(10)
        made.append("first")
        fill(directory, scratch)

    def second(_directory: Path, _scratch: Path) -> None:
        made.append("second")

    def report(progress: Progress) -> None:
        if progress.stage is Stage.WAITING:
            waiting.set()

    results: list[StoredModel] = []
    begun = threading.Event()

    def begin(directory: Path, scratch: Path) -> None:
        begun.set()
        first(directory, scratch)

    thread = threading.Thread(target=lambda: results.append(store.install("tiny", begin, licence="MIT")))
    thread.start()
    assert begun.wait(10)
    results.append(store.install("tiny", second, licence="MIT", report=report))
    thread.join()
    assert made == ["first"]
    assert results[0] == results[1]


def test_waiting_can_be_given_up(store: ModelStore, fill: Fill) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage is Stage.WAITING:
            raise KeyboardInterrupt

    def meanwhile(directory: Path, scratch: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            store.install("other", fill, licence="MIT", report=stop)
        fill(directory, scratch)

    assert store.install("tiny", meanwhile, licence="MIT").name == "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0, 1])
def test_killed(store: ModelStore, directory: Path, moment: int) -> None:
    """A killed process leaves nothing that is taken for a model, and no lock."""
    program = (
        "import os, shutil, signal, sys\n"
        "from pathlib import Path\n"
        "from aci_p2p.executor.store import ModelStore\n"
        "def fill(target, scratch):\n"
        "    shutil.copytree(sys.argv[2], target)\n"
        "    sys.argv[3] == '0' and os.kill(os.getpid(), signal.SIGKILL)\n"
        "ModelStore(Path(sys.argv[1])).install('tiny', fill, licence='MIT',\n"
        "    report=lambda progress: progress.done and os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    command = [sys.executable, "-c", program, str(store.path), str(directory), str(moment)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert store.list() == []
    assert len(list(store.path.glob(".staging-*"))) == 1

    def fill(target: Path, _scratch: Path) -> None:
        shutil.copytree(directory, target)

    store.install("tiny", fill, licence="MIT").verify()
    assert sorted(path.name for path in store.path.iterdir()) == [".lock", "tiny"]
