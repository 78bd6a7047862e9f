"""Key files: their permissions, their making, and the lock that gives each to one process."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import IO, Self

import pytest

from aci_p2p import keys
from aci_p2p.config import NodeConfig
from aci_p2p.keys import KEY_MODE, KeyFileError, KeyRing
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import KeyPair

LOOSE_BITS = [0o100, 0o040, 0o020, 0o010, 0o004, 0o002, 0o001]
BAD_NAMES = ["", "../x", "a/b", "/x", ".hidden", "a.b", "-x", "_x", "a b", "a\n", "clé", "a" * 65]


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "home" / "keys")


def path_of(ring: KeyRing, name: str) -> Path:
    return ring._directory / f"{name}.key"


def use(ring: KeyRing, name: str) -> KeyPair:
    """Use a key for a moment."""
    with ring.use(name) as key:
        return key


def list_all(ring: KeyRing, _name: str) -> object:
    return ring.list()


def files(ring: KeyRing) -> list[str]:
    """Everything in the ring's folder, hidden files too."""
    return sorted(path.name for path in ring._directory.iterdir())


class Process:
    """Another process that runs a script with `ring` at hand, and talks by lines."""

    def __init__(self, ring: KeyRing, script: str) -> None:
        head = "import os, signal, sys\nfrom pathlib import Path\nfrom aci_p2p.keys import KeyFileError, KeyRing\n"
        head += f"ring = KeyRing(Path({str(ring._directory)!r}))\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", head + textwrap.dedent(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def stdin(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        """Let it go on from `sys.stdin.readline()`."""
        self.stdin.write("\n")
        self.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


# Reading.


def test_a_key_comes_back(ring: KeyRing) -> None:
    key = ring.create("client")
    assert ring.load("client").seed == key.seed
    assert ring.load("client").node_id == key.node_id
    assert path_of(ring, "client").stat().st_size == 86


def test_keys_differ(ring: KeyRing) -> None:
    assert ring.create("a").seed != ring.create("b").seed


def test_a_missing_key_names_the_command_that_makes_it(ring: KeyRing) -> None:
    with pytest.raises(KeyFileError, match="no such key") as caught:
        ring.load("client")
    assert caught.value.hint == "make it with: aci-p2p keys new client"
    assert caught.value.path == path_of(ring, "client")


@pytest.mark.parametrize("bit", LOOSE_BITS, ids=oct)
def test_a_key_that_others_may_touch_is_refused(ring: KeyRing, bit: int) -> None:
    ring.create("client")
    path = path_of(ring, "client")
    path.chmod(KEY_MODE | bit)
    for read in (KeyRing.load, use, list_all):
        with pytest.raises(KeyFileError, match=f"others may .* {KEY_MODE | bit:04o}") as caught:
            read(ring, "client")
        assert caught.value.hint == f"run: chmod 600 {path}"


def test_a_key_may_be_read_only(ring: KeyRing) -> None:
    key = ring.create("client")
    path_of(ring, "client").chmod(0o400)
    assert ring.load("client").seed == key.seed
    assert use(ring, "client").seed == key.seed


@pytest.mark.parametrize("target", ["other.key", "missing.key"])
def test_a_symbolic_link_is_refused(ring: KeyRing, target: str) -> None:
    ring.create("other")
    path_of(ring, "client").symlink_to(target)
    for read in (KeyRing.load, use):
        with pytest.raises(KeyFileError, match="it is a symbolic link"):
            read(ring, "client")
    assert not path_of(ring, "missing").exists()


def test_a_folder_or_a_pipe_is_no_key(ring: KeyRing) -> None:
    ring.create("other")
    path_of(ring, "folder").mkdir(mode=0o600)
    os.mkfifo(path_of(ring, "pipe"), 0o600)
    for name in ("folder", "pipe"):
        for read in (KeyRing.load, use):
            with pytest.raises(KeyFileError, match=r"is a directory|it is not a file"):
                read(ring, name)


def test_a_truncated_key_is_refused(ring: KeyRing) -> None:
    key = ring.create("client")
    path = path_of(ring, "client")
    content = path.read_bytes()
    for size in range(len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(KeyFileError, match="not an ACI key"):
            ring.load("client")
    path.write_bytes(content[:-1])
    assert ring.load("client").seed == key.seed


MALFORMED: list[Callable[[str, str], str]] = [
    lambda header, seed: header.upper() + seed,
    lambda header, seed: header.replace("ed25519", "ed448") + seed,
    lambda header, seed: seed + header,
    lambda header, seed: header + seed.upper(),
    lambda header, seed: header + seed + "0",
    lambda header, seed: header + "g" + seed[1:],
    lambda header, seed: header + seed + "\n" + seed,
    lambda header, seed: header + "é" + seed[2:],
    lambda header, seed: "\n" + header + seed,
    lambda header, seed: header.replace("aci-p2p", "other") + seed,
]


@pytest.mark.parametrize("change", MALFORMED)
def test_a_malformed_key_is_refused_and_not_shown(ring: KeyRing, change: Callable[[str, str], str]) -> None:
    ring.create("client")
    path = path_of(ring, "client")
    header, seed = path.read_text("ascii").split("\n", 1)
    seed = "ab" + seed.strip()[2:]
    path.write_text(change(header + "\n", seed), "utf-8")
    with pytest.raises(KeyFileError, match="not an ACI key") as caught:
        ring.load("client")
    assert seed[8:20] not in str(caught.value) + repr(caught.value)
    assert caught.value.__cause__ is None


def test_a_huge_file_is_refused_at_once(ring: KeyRing) -> None:
    ring.create("client")
    os.truncate(path_of(ring, "client"), 1 << 40)
    with pytest.raises(KeyFileError, match="not an ACI key"):
        ring.load("client")


# Names and lists.


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_touches_nothing(ring: KeyRing, tmp_path: Path, name: str) -> None:
    for call in (KeyRing.load, KeyRing.create, use):
        with pytest.raises(LocalError, match="is not a key name") as caught:
            call(ring, name)
        assert caught.value.hint == "use letters, digits, - and _"
    # Settings are refused before anything is named after it.
    with pytest.raises(LocalError, match="is not a key name"):
        NodeConfig(key=name)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("name", ["a", "7", "client-2", "A_b", "a" * 64])
def test_a_good_name(ring: KeyRing, name: str) -> None:
    assert ring.create(name).seed == ring.load(name).seed
    assert NodeConfig(key=name).key == name


def test_keys_are_listed_by_name(ring: KeyRing) -> None:
    assert ring.list() == []
    made = {name: ring.create(name).node_id for name in ("node", "client", "client-2", "Z")}
    assert [(info.name, info.node_id, info.path) for info in ring.list()] == [
        (name, made[name], path_of(ring, name)) for name in ("Z", "client", "client-2", "node")
    ]


def test_other_files_are_not_listed(ring: KeyRing) -> None:
    ring.create("client")
    for name in ("._client.key", "copy of client.key", ".client.1.part", "notes.txt"):
        (ring._directory / name).write_text("?")
    assert [info.name for info in ring.list()] == ["client"]


def test_a_bad_key_spoils_the_list(ring: KeyRing) -> None:
    ring.create("client")
    path_of(ring, "other").write_text("?")
    path_of(ring, "other").chmod(KEY_MODE)
    with pytest.raises(KeyFileError, match="not an ACI key"):
        ring.list()


def test_the_seed_is_never_shown(ring: KeyRing) -> None:
    key = ring.create("client")
    with pytest.raises(KeyFileError) as exists:
        ring.create("client")
    with ring.use("client") as used, pytest.raises(KeyFileError) as busy, ring.use("client"):
        pass
    shown = [repr(key), str(key), repr(used), repr(ring.list()), repr(ring), *map(repr, (exists.value, busy.value))]
    for text in shown:
        assert key.seed.hex() not in text
        assert repr(key.seed)[2:-1] not in text
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(key)


# Making.


def test_a_new_key_is_its_owners_alone(ring: KeyRing) -> None:
    before = os.umask(0)
    try:
        ring.create("client")
    finally:
        os.umask(before)
    assert path_of(ring, "client").stat().st_mode & 0o7777 == KEY_MODE
    assert ring._directory.stat().st_mode & 0o7777 == 0o700


def test_making_never_overwrites(ring: KeyRing) -> None:
    key = ring.create("client")
    with pytest.raises(KeyFileError, match="it exists already"):
        ring.create("client")
    assert ring.load("client").seed == key.seed
    path_of(ring, "link").symlink_to("nowhere")
    with pytest.raises(KeyFileError, match="it exists already"):
        ring.create("link")
    assert files(ring) == ["client.key", "link.key"]


def test_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "keys"):
        for call in (KeyRing.create, use):
            with pytest.raises(KeyFileError, match=r"cannot make its folder: (file exists|not a directory)"):
                call(KeyRing(directory), "client")
    assert KeyRing(tmp_path / "file").list() == []


def test_a_failure_leaves_nothing(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(KeyFileError, match="no space left on device"):
            ring.create("client")
    assert files(ring) == []
    ring.create("client")
    assert files(ring) == ["client.key"]


def test_a_key_is_on_disk_before_it_has_its_name(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    link = os.link

    def note_sync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        steps.append("sync folder" if stat.S_ISDIR(status.st_mode) else f"sync {status.st_size} bytes")

    def note_link(source: Path, target: Path) -> None:
        steps.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "link", note_link)
    ring.create("client")
    assert steps == ["sync 86 bytes", "link", "sync folder"]


def test_making_keys_leaves_no_file_open(ring: KeyRing) -> None:
    free = os.dup(0)
    os.close(free)
    ring.create("client")
    with ring.use("client"):
        pass
    again = os.dup(0)
    os.close(again)
    assert again == free


def test_what_a_killed_process_of_our_number_left_is_no_obstacle(ring: KeyRing) -> None:
    ring.create("other")
    (ring._directory / f".client.{os.getpid()}.part").write_text("half a key")
    ring.create("client")
    assert files(ring) == ["client.key", "other.key"]


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_killed_while_making_a_key(ring: KeyRing, step: str) -> None:
    """There is no half key, and what the killed process left goes when the key is made."""
    script = f"""
        os.{step} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        ring.create("client")
    """
    with Process(ring, script) as other:
        assert other.process.wait(30) == -signal.SIGKILL
    assert len(files(ring)) == 1
    assert ring.list() == []
    key = ring.create("client")
    assert files(ring) == ["client.key"]
    assert ring.load("client").seed == key.seed


def test_of_two_processes_making_a_key_one_wins(ring: KeyRing) -> None:
    script = """
        print("ready", flush=True)
        for number in range(50):
            sys.stdin.readline()
            try:
                print(ring.create(f"key-{number}").node_id, flush=True)
            except KeyFileError as error:
                print(error.message.rpartition(": ")[2], flush=True)
    """
    with Process(ring, script) as a, Process(ring, script) as b:
        assert [a.line(), b.line()] == ["ready", "ready"]
        for number in range(50):
            a.go()
            b.go()
            results = {a.line(), b.line()}
            assert results == {"it exists already", str(ring.load(f"key-{number}").node_id)}
    assert files(ring) == sorted(f"key-{number}.key" for number in range(50))


# Using.


def test_a_key_is_made_when_it_is_first_used(ring: KeyRing) -> None:
    with ring.use("client") as key:
        assert ring.load("client").seed == key.seed
    with ring.use("client") as same:
        assert same.seed == key.seed


def test_a_key_made_meanwhile_is_used(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[KeyPair] = []

    def other_first(name: str) -> KeyPair:
        monkeypatch.undo()
        made.append(ring.create(name))
        return ring.create(name)

    monkeypatch.setattr(ring, "create", other_first)
    with ring.use("client") as key:
        assert key.seed == made[0].seed


def test_a_key_is_used_by_one_at_a_time(ring: KeyRing) -> None:
    with ring.use("node"):
        with pytest.raises(KeyFileError, match="another node of this machine runs with it") as caught, ring.use("node"):
            pass
        assert caught.value.hint == "stop the other node, or give this one its own --home"
        with ring.use("other"):
            pass
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), ring.use("node"):
            raise ZeroDivisionError


def test_a_file_system_without_locks(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_file: object, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(KeyFileError, match="cannot lock it: no locks available"):
        use(ring, "client")


def test_a_key_is_free_when_its_process_is_killed(ring: KeyRing) -> None:
    """Even if a child of that process lives on."""
    script = """
        import subprocess
        with ring.use("node") as key:
            child = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            print(child.pid, key.node_id, flush=True)
            sys.stdin.readline()
    """
    with Process(ring, script) as other:
        child, node_id = other.line().split()
        try:
            with pytest.raises(KeyFileError, match="runs with it"), ring.use("node"):
                pass
            assert str(ring.load("node").node_id) == node_id
            other.process.kill()
            other.process.wait(30)
            with ring.use("node") as key:
                assert str(key.node_id) == node_id
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_any_free_key_will_do(ring: KeyRing) -> None:
    with ring.use_any("client") as first, ring.use_any("client") as second:
        with ring.use_any("client") as third:
            pass
        with ring.use_any("client") as again:
            assert again.node_id == third.node_id
    assert len({first.node_id, second.node_id, third.node_id}) == 3
    names = {info.node_id: info.name for info in ring.list()}
    assert [names[key.node_id] for key in (first, second, third)] == ["client", "client-2", "client-3"]
    with ring.use_any("client") as key:
        assert key.node_id == first.node_id


def test_keys_run_out(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_CLIENT_KEYS", 2)
    with ring.use_any("client"), ring.use_any("client"):
        with pytest.raises(KeyFileError, match="2 commands run with its like already"), ring.use_any("client"):
            pass
        assert files(ring) == ["client-2.key", "client.key"]


def test_a_bad_key_is_not_passed_over(ring: KeyRing) -> None:
    ring.create("client")
    path_of(ring, "client").chmod(0o644)
    with pytest.raises(KeyFileError, match="others may"), ring.use_any("client"):
        pass
    assert files(ring) == ["client.key"]


def test_an_error_of_the_block_is_not_taken_for_a_busy_key(ring: KeyRing) -> None:
    error = KeyFileError(Path("elsewhere"), "of the block")
    with pytest.raises(KeyFileError) as caught, ring.use_any("client"):
        raise error
    assert caught.value is error
    with ring.use_any("client"):
        assert files(ring) == ["client.key"]


def test_why_no_key_can_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(KeyFileError, match="cannot make its folder"),
        KeyRing(tmp_path / "file" / "keys").use_any("client"),
    ):
        pass
