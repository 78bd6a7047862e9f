"""Writing files whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aci_p2p.files import write_atomically
from aci_p2p.protocol.errors import LocalError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("data", [b"", b"new", bytes(1_000_000)])
def test_a_file_is_written_and_replaced(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a" / "b" / "file"
    for content in (data, b"old and longer", data):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert names(path.parent) == ["file"]


def test_a_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_text() == "precious"
    assert (tmp_path / "link").read_text() == "new"


def fail(_descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def interrupt(_descriptor: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("sync", "error", "match"),
    [(fail, LocalError, "cannot write .*file: No space left on device$"), (interrupt, KeyboardInterrupt, "^$")],
)
def test_a_failure_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: Callable[[int], None], error: type[BaseException], match: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(error, match=match) as caught:
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]
    assert caught.value.__cause__ is None


def test_data_is_on_disk_before_it_replaces_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    seen: list[tuple[bytes, int]] = []

    def note(descriptor: int) -> None:
        seen.append((path.read_bytes(), os.fstat(descriptor).st_ino))

    monkeypatch.setattr(os, "fsync", note)
    write_atomically(path, b"newer")
    # The content, then its place in the folder.
    assert seen == [(b"old", path.stat().st_ino), (b"newer", tmp_path.stat().st_ino)]
    assert path.stat().st_mode & 0o777 == 0o600


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(LocalError, match=r"cannot write .*: (Is a directory|Not a directory|File .*)") as caught:
            write_atomically(path, b"new")
        assert "\n" not in caught.value.message
    assert names(tmp_path) == ["file", "folder"]


def test_killed_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    script = f"""
import os, signal
from pathlib import Path
from aci_p2p.files import write_atomically
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path({str(path)!r}), bytes(1_000_000))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
