"""The weights root is that of spec/weights-root.md and binds content, names, sizes and borders."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from aci_p2p.executor import weights as weights_module
from aci_p2p.executor.api import ModelUnavailable
from aci_p2p.executor.progress import Progress
from aci_p2p.executor.weights import LEAF_BYTES, scan, weights_root


def tick() -> None:
    """Wait until the file system's clock has moved on."""
    time.sleep(0.02)


def expected_root(files: dict[str, bytes]) -> bytes:
    """The weights root, written from spec/weights-root.md alone."""
    leaves = [
        hashlib.sha256(
            b"\0aci-p2p/1/weights"
            + len(name).to_bytes(2, "big")
            + name.encode()
            + len(data).to_bytes(8, "big")
            + offset.to_bytes(8, "big")
            + data[offset : offset + 4194304]
        ).digest()
        for name, data in sorted(files.items())
        for offset in range(0, max(len(data), 1), 4194304)
    ]

    def tree(part: list[bytes]) -> bytes:
        if len(part) == 1:
            return part[0]
        split = max(2**n for n in range(20) if 2**n < len(part))
        return hashlib.sha256(b"\1" + tree(part[:split]) + tree(part[split:])).digest()

    return tree(leaves)


def root_of(directory: Path, files: dict[str, bytes]) -> bytes:
    """The weights root of a new directory with these files."""
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return weights_root(directory, scan(directory))


def test_vector(tmp_path: Path) -> None:
    root = root_of(tmp_path / "m", {"config.json": b"{}", "model.safetensors": b"weights"})
    assert root.hex() == "97802b1b723bfa55305e085e18f9a16bb0543f52a1c7b70f22f3be4e7b8cde8e"


@pytest.mark.parametrize("size", [0, 1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 5 * LEAF_BYTES + 7])
def test_specification(tmp_path: Path, size: int) -> None:
    data = hashlib.shake_128(b"weights").digest(size)
    files = {"b.safetensors": data, "a.json": b"", "B.json": b"x", "a-.json": data[:9]}
    assert root_of(tmp_path / "m", files) == expected_root(files)


def test_covers_what_a_loader_may_read(tmp_path: Path) -> None:
    covered = ("a.safetensors", "b.json", "chat_template.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
    ignored = ("README.md", "LICENSE", "notes.txt", "model.py", "w.bin", ".hidden.json", "json")
    files: dict[str, bytes] = dict.fromkeys(covered, b"x")
    root = root_of(tmp_path / "m", {**files, **dict.fromkeys(ignored, b"y")})
    assert root == expected_root(files)


def test_binds_names_sizes_and_borders(tmp_path: Path) -> None:
    variants = [
        {"a.json": b"xy", "b.json": b"z"},
        {"a.json": b"x", "b.json": b"yz"},
        {"a.json": b"xy", "c.json": b"z"},
        {"a.json": b"z", "b.json": b"xy"},
        {"a.json": b"xyz"},
        {"a.json": b"xyz", "b.json": b""},
        {"a.json": b"xy", "b.json": b"z\0"},
        {"a.json": b"xy" + bytes(LEAF_BYTES - 2) + b"z"},
    ]
    roots = {root_of(tmp_path / str(number), files) for number, files in enumerate(variants)}
    assert len(roots) == len(variants)


@pytest.mark.parametrize("name", ["a b.json", "é.json", "-a.json", "a\n.json", "x" * 124 + ".json"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelUnavailable, match="plain name"):
        root_of(tmp_path / "m", {name: b""})


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.json").mkdir()
    with pytest.raises(ModelUnavailable, match="not a plain file"):
        scan(tmp_path)
    (tmp_path / "d.json").rmdir()
    os.mkfifo(tmp_path / "f.json")
    with pytest.raises(ModelUnavailable, match="not a plain file"):
        scan(tmp_path)


def test_dangling_links_and_missing_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="No such file"):
        scan(tmp_path / "m")
    (tmp_path / "a.json").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelUnavailable, match=r"a\.json"):
        scan(tmp_path)


def test_the_number_of_files_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "FILES_MAX", 2)
    root_of(tmp_path / "two", {"a.json": b"", "b.json": b""})
    with pytest.raises(ModelUnavailable, match="more than 2"):
        root_of(tmp_path / "three", {"a.json": b"", "b.json": b"", "c.json": b""})


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"one")
    found = scan(tmp_path)
    tick()
    (tmp_path / "a.json").write_bytes(b"two")
    with pytest.raises(ModelUnavailable, match="changed while"):
        weights_root(tmp_path, found)
    (tmp_path / "a.json").unlink()
    with pytest.raises(ModelUnavailable, match=r"a\.json"):
        weights_root(tmp_path, found)


def test_progress_counts_bytes_and_may_stop(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(bytes(2 * LEAF_BYTES + 1))
    reports: list[Progress] = []
    weights_root(tmp_path, scan(tmp_path), reports.append)
    total = 2 * LEAF_BYTES + 1
    assert [report.done for report in reports] == [0, LEAF_BYTES, 2 * LEAF_BYTES, total]
    assert {report.total for report in reports} == {total}

    def stop(progress: Progress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights_root(tmp_path, scan(tmp_path), stop)
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
