"""Where files lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aci_p2p.config import NodeConfig, make_private_folder
from aci_p2p.config.paths import SOCKET_PATH_MAX
from aci_p2p.protocol.errors import LocalError


def test_folders_of_the_xdg_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    # Short, as homes are: a socket's path has a hundred characters.
    home = Path("/home/somebody")
    monkeypatch.setenv("HOME", str(home))
    node = NodeConfig(key="node")
    assert node.home == home / ".local/share/aci-p2p"
    assert node.address_cache_path == home / ".local/state/aci-p2p/addresses-node.json"
    # Without a runtime directory of the login, the home is the one place that is ours.
    assert node.control_socket_path == home / ".local/share/aci-p2p/run/node.sock"
    for name in ("DATA", "STATE", "RUNTIME"):
        monkeypatch.setenv(f"XDG_{name}_{'DIR' if name == 'RUNTIME' else 'HOME'}", f"/{name}")
    node = NodeConfig(key="other")
    assert node.keys_path == Path("/DATA/aci-p2p/keys")
    assert node.database_path == Path("/DATA/aci-p2p/aci.sqlite3")
    assert node.models_path == Path("/DATA/aci-p2p/models")
    assert node.address_cache_path == Path("/STATE/aci-p2p/addresses-other.json")
    assert node.control_socket_path == Path("/RUNTIME/aci-p2p/other.sock")
    # The specification: relative paths are ignored.
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert NodeConfig().home == home / ".local/share/aci-p2p"


def test_everything_below_a_home_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/runtime")
    monkeypatch.setenv("ACI_HOME", "/aci")
    for node in (NodeConfig(key="node"), NodeConfig(home=Path("/aci"), key="node")):
        assert node.keys_path == Path("/aci/keys")
        assert node.address_cache_path == Path("/aci/addresses-node.json")
        assert node.control_socket_path == Path("/aci/run/node.sock")
    node = NodeConfig(state=Path("/s"), runtime=Path("/r"), model_store=Path("/m"), key="node")
    assert node.address_cache_path == Path("/s/addresses-node.json")
    assert node.control_socket_path == Path("/r/node.sock")
    assert node.models_path == Path("/m")


def test_a_socket_that_the_system_can_take(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")  # noqa: S108 - only named
    longest = SOCKET_PATH_MAX - len("/node.sock")
    fits = Path("/" + "é" * ((longest - 1) // 2))
    assert NodeConfig(runtime=fits, key="node").control_socket_path == fits / "node.sock"
    paths = {NodeConfig(runtime=fits / name, key="node").control_socket_path for name in ("a", "b", "bc")}
    assert len(paths) == 3
    for path in paths:
        assert len(os.fsencode(path)) <= SOCKET_PATH_MAX
        assert path.parent == Path(f"/tmp/aci-p2p-{os.getuid()}")  # noqa: S108 - only named


def test_a_folder_that_only_we_may_enter(home: Path) -> None:
    folder = home / "a" / "run"
    make_private_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    make_private_folder(folder)
    folder.chmod(0o770)
    with pytest.raises(LocalError, match="nobody else may write to"):
        make_private_folder(folder)
    (home / "link").symlink_to(home / "a")
    with pytest.raises(LocalError, match="nobody else may write to"):
        make_private_folder(home / "link")
    (home / "file").write_text("")
    for path in (home / "file", home / "file" / "below"):
        with pytest.raises(LocalError, match="cannot make the folder"):
            make_private_folder(path)
