"""Altered files never pass, unchanged ones are not hashed again, and an edited manifest vouches for nothing."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from aci_p2p.executor import manifest as manifest_module
from aci_p2p.executor import store as store_module
from aci_p2p.executor.api import ModelUnavailable, WeightsMismatch
from aci_p2p.executor.progress import Progress, Stage
from aci_p2p.executor.store import ModelStore, StoredModel
from aci_p2p.executor.weights import scan, weights_root
from aci_p2p.protocol.catalogue import CATALOGUE, DEFAULT_MODEL


class Reports(list[Progress]):
    """Collects progress."""

    __call__ = list[Progress].append

    def hashed(self) -> bool:
        """Whether anything was hashed since the last question."""
        found = any(report.stage is Stage.HASHING for report in self)
        self.clear()
        return found


def tick() -> None:
    """Wait until the file system's clock has moved on."""
    time.sleep(0.02)


def test_sound_model(model: StoredModel, directory: Path) -> None:
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert model.root == weights_root(directory, scan(directory))
    assert model.size == sum(len(data) for data in files.values())
    model.verify()


def test_unchanged_files_are_hashed_once(store: ModelStore, model: StoredModel) -> None:
    reports = Reports()
    model.verify(reports)
    store.open("tiny").verify(reports)
    assert not reports.hashed()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_one_altered_byte(model: StoredModel, name: str) -> None:
    model.verify()
    tick()
    path = model.directory / name
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    # In place, and with its old time stamp: only the change time tells.
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(WeightsMismatch) as raised:
        model.verify()
    assert raised.value.model == "tiny"
    assert raised.value.expected == model.root
    assert raised.value.actual == weights_root(model.directory, scan(model.directory))
    # A mismatch is not remembered as anything.
    with pytest.raises(WeightsMismatch):
        model.verify()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    model.verify()


def test_truncated_file(model: StoredModel) -> None:
    os.truncate(model.directory / "model.safetensors", 100)
    with pytest.raises(WeightsMismatch):
        model.verify()


@pytest.mark.parametrize("name", ["adapter.safetensors", "chat_template.jinja"])
def test_extra_file(model: StoredModel, name: str) -> None:
    (model.directory / name).write_bytes(b"")
    with pytest.raises(WeightsMismatch):
        model.verify()


def test_files_outside_the_root_do_not_matter(model: StoredModel) -> None:
    (model.directory / "README.md").write_bytes(b"")
    reports = Reports()
    model.verify(reports)
    assert not reports.hashed()


def test_missing_file(model: StoredModel) -> None:
    (model.directory / "tokenizer.json").unlink()
    with pytest.raises(ModelUnavailable, match=r"lacks its file tokenizer\.json"):
        model.verify()


def test_renamed_file(model: StoredModel) -> None:
    (model.directory / "tokenizer_config.json").rename(model.directory / "z.json")
    with pytest.raises(ModelUnavailable, match=r"lacks its file tokenizer_config\.json"):
        model.verify()


def test_a_file_replaced_by_its_copy_is_hashed_again(model: StoredModel) -> None:
    path = model.directory / "model.safetensors"
    shutil.copy2(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)
    reports = Reports()
    model.verify(reports)
    assert reports.hashed()
    model.verify(reports)
    assert not reports.hashed()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"root": "x"}', b"\xff", b'{"root": 1, "files": 2}', b" " * (2 << 20)]
)
def test_a_damaged_memory_only_costs_time(model: StoredModel, content: bytes) -> None:
    (model.entry / "verified.json").write_bytes(content)
    reports = Reports()
    model.verify(reports)
    assert reports.hashed()


def test_the_memory_of_another_root_does_not_count(model: StoredModel) -> None:
    other = StoredModel(model.name, model.directory, bytes(32), model.licence, model.context, model.files, model.entry)
    with pytest.raises(WeightsMismatch):
        other.verify()


def test_files_just_written_are_not_remembered(model: StoredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (model.entry / "verified.json").unlink()
    monkeypatch.setattr(store_module, "CLOCK_TICK", 10**15)
    model.verify()
    assert not (model.entry / "verified.json").exists()
    # Nor those that were written after the hashing began.
    monkeypatch.setattr(store_module, "CLOCK_TICK", 0)
    os.utime(model.directory / "config.json", ns=(0, time.time_ns()))
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    model.verify()
    assert not (model.entry / "verified.json").exists()


def test_a_store_that_cannot_be_written_still_serves(model: StoredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError

    (model.entry / "verified.json").unlink()
    monkeypatch.setattr(store_module, "write_durably", fail)
    model.verify()


def edit(model: StoredModel, **changes: object) -> None:
    """Change fields; a change to None removes the field."""
    path = model.entry / "manifest.json"
    value: dict[str, object] = json.loads(path.read_text())
    value |= changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def test_content(model: StoredModel) -> None:
    text = (model.entry / "manifest.json").read_text()
    value = json.loads(text)
    assert text == json.dumps(value, indent=1, sort_keys=True) + "\n"
    assert value == {
        "version": 1,
        "name": "tiny",
        "licence": "Apache-2.0",
        "root": model.root.hex(),
        "files": [
            {"name": path.name, "size": path.stat().st_size, "leaves": 1} for path in sorted(model.directory.iterdir())
        ],
    }


def test_edited_root(store: ModelStore, model: StoredModel) -> None:
    edit(model, root="00" * 32)
    with pytest.raises(WeightsMismatch) as raised:
        store.open("tiny").verify()
    assert (raised.value.expected, raised.value.actual) == (bytes(32), model.root)


def test_edited_size(store: ModelStore, model: StoredModel) -> None:
    files: list[dict[str, Any]] = json.loads((model.entry / "manifest.json").read_text())["files"]
    files[0]["size"] += 1
    edit(model, files=files)
    with pytest.raises(ModelUnavailable, match="lists other files"):
        store.open("tiny").verify()


def test_file_left_out(store: ModelStore, model: StoredModel) -> None:
    files = json.loads((model.entry / "manifest.json").read_text())["files"]
    edit(model, files=files[1:])
    with pytest.raises(ModelUnavailable, match="lists other files"):
        store.open("tiny").verify()


def test_the_manifest_of_another_model(store: ModelStore, model: StoredModel) -> None:
    edit(model, name="other")
    with pytest.raises(ModelUnavailable, match="belongs to other"):
        store.open("tiny")


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": "1"},
        {"version": True},
        {"version": None},
        {"name": None},
        {"name": "../x"},
        {"name": 1},
        {"licence": ""},
        {"licence": "x" * 65},
        {"licence": "a\nb"},
        {"licence": 1},
        {"root": "00" * 31},
        {"root": "00" * 33},
        {"root": "AA" * 32},
        {"root": 0},
        {"more": 1},
        {"files": {}},
        {"files": []},
        {"files": [1]},
        {"files": [{"name": "a", "size": 1}]},
        {"files": [{"name": "a", "size": 1, "leaves": 1, "more": 1}]},
        {"files": [{"name": "../a", "size": 1, "leaves": 1}]},
        {"files": [{"name": "", "size": 1, "leaves": 1}]},
        {"files": [{"name": 1, "size": 1, "leaves": 1}]},
        {"files": [{"name": "a", "size": -1, "leaves": 1}]},
        {"files": [{"name": "a", "size": True, "leaves": 1}]},
        {"files": [{"name": "a", "size": 1.0, "leaves": 1}]},
        {"files": [{"name": "a", "size": 1, "leaves": 2}]},
        {"files": [{"name": "a", "size": 1, "leaves": True}]},
        {"files": [{"name": name, "size": 1, "leaves": 1} for name in "ba"]},
        {"files": [{"name": name, "size": 1, "leaves": 1} for name in "aa"]},
    ],
)
def test_malformed(store: ModelStore, model: StoredModel, changes: dict[str, object]) -> None:
    edit(model, **changes)
    with pytest.raises(ModelUnavailable, match=r"manifest\.json is malformed") as raised:
        store.open("tiny")
    assert "remove the model" in raised.value.hint
    assert store.list() == []


def test_too_many_files(store: ModelStore, model: StoredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "FILES_MAX", len(model.files))
    store.open("tiny")
    monkeypatch.setattr(manifest_module, "FILES_MAX", len(model.files) - 1)
    with pytest.raises(ModelUnavailable):
        store.open("tiny")


def test_garbage(store: ModelStore, model: StoredModel) -> None:
    for content in (b"", b"null", b"{" * 100_000, b" " * (2 << 20)):
        (model.entry / "manifest.json").write_bytes(content)
        with pytest.raises(ModelUnavailable):
            store.open("tiny")
    (model.entry / "manifest.json").unlink()
    with pytest.raises(ModelUnavailable, match=r"manifest\.json"):
        store.open("tiny")


@pytest.mark.model
def test_the_default_model(aci_home: Path) -> None:
    model = ModelStore(aci_home / "models").open(DEFAULT_MODEL)
    expected = CATALOGUE[DEFAULT_MODEL]
    assert (model.root, model.context, model.licence) == (expected.root, expected.context, expected.licence)
    assert weights_root(model.directory, scan(model.directory)) == expected.root
    model.verify()
    seconds: list[float] = []
    for _ in range(5):
        started = time.thread_time()
        model.verify()
        seconds.append(time.thread_time() - started)
    assert min(seconds) < 0.005
