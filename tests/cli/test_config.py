"""`config`, the configuration file of every command, and a node that reads it again."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from aci_p2p.cli.notify import notify
from aci_p2p.config import SETTINGS, default_config
from aci_p2p.executor import ModelStore
from tests.cli.conftest import Cli, one_line
from tests.executor.tiny import write_tiny_model

COMMAND = (sys.executable, "-c", "from aci_p2p.cli import main; main()")
LOOPBACK = '[p2p]\nlisten = ["/ip4/127.0.0.1/tcp/0"]\n'
NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWQYEUcREAwzfuWtPCqbKXBJdFvuwtTjguvxN2uUzEQCMD"
START_S = 30.0
"""Seconds for a process to come up, or to do what it is told, on a busy machine."""

Process = subprocess.Popen[bytes]


@pytest.fixture
def file(home: Path) -> Path:
    """The configuration file of the home."""
    home.mkdir()
    return home / "config.toml"


def test_show_is_a_file_with_the_same_values(cli: Cli, home: Path, file: Path, tmp_path: Path) -> None:
    file.write_text('[p2p]\nannounce = ["/dns4/a.example/tcp/1"]\n')
    arguments = ("--slots", "2", "--bootstrap", "/dnsaddr/a", "--bootstrap", "/dnsaddr/b", "--no-serve")
    shown = cli("config", "show", *arguments, env={"ACI_NETWORK": "aci-x"})
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert lines[0] == f"# {file}"
    assert f'home = "{home}" # ACI_HOME' in lines
    assert 'network = "aci-x" # ACI_NETWORK' in lines
    assert f'announce = ["/dns4/a.example/tcp/1"] # {file}:2' in lines
    assert "slots = 2 # --slots" in lines
    assert "serve = false # --serve" in lines
    assert 'bootstrap = ["/dnsaddr/a", "/dnsaddr/b"] # --bootstrap' in lines
    assert 'key = "node" # default' in lines
    assert "# threads is not set # default" in lines
    assert f"# control socket {home}/run/node.sock" in lines
    again = tmp_path / "again.toml"
    again.write_text(shown.stdout)
    json_arguments = ("config", "show", "--json")
    first = json.loads(cli(*json_arguments, *arguments, env={"ACI_NETWORK": "aci-x"}).stdout)
    second = json.loads(cli(*json_arguments, "--config", str(again)).stdout)
    assert {key: entry["value"] for key, entry in first["settings"].items()} == {
        key: entry["value"] for key, entry in second["settings"].items()
    }
    assert first["paths"] == second["paths"]
    assert first["settings"].keys() == {setting.key for setting in SETTINGS}
    assert first["settings"]["network"]["source"] == "variable"
    assert first["settings"]["p2p.announce"]["line"] == 2
    assert (first["file"], first["found"]) == (str(file), True)


def test_the_example_has_every_default_and_every_line_of_it_works(cli: Cli, tmp_path: Path) -> None:
    example = cli("config", "example").stdout
    assert tomllib.loads(example).keys() == {"p2p", "provider", "client", "log"}
    lines = [line[1:] if line.startswith("#") and line[1] != " " else line for line in example.splitlines()]
    text = "\n".join(line for line in lines if not line.endswith("= ..."))
    document = tomllib.loads(text, parse_float=Decimal)
    for setting in SETTINGS:
        assert f"#{setting.name} = " in example
        assert setting.variable in " ".join(example.split())
        if setting.key == "home":
            continue
        table = document[setting.section] if setting.section else document
        value = setting.of(default_config())
        if value is None:
            assert setting.name not in table
        else:
            assert setting.kind.from_toml(table[setting.name], tmp_path) == value


def test_the_file_of_every_command(cli: Cli, home: Path, file: Path, tmp_path: Path) -> None:
    file.write_text("slot = 3")
    commands = (("keys", "list"), ("models", "list"), ("join",), ("infer", "hello"), ("demo",), ("config", "show"))
    for command in commands:
        assert f"{file}:1: slot: there is no such setting" in one_line(cli(*command), 2)
    other = tmp_path / "other.toml"
    other.write_text(f'home = "{tmp_path / "elsewhere"}"')
    for arguments in (("--config", str(other), "keys", "new", "a"), ("keys", "new", "b", "--config", str(other))):
        assert cli(*arguments, env={"ACI_HOME": ""}).returncode == 0
    assert {path.name for path in (tmp_path / "elsewhere" / "keys").iterdir()} >= {"a.key", "b.key"}
    # What a command names goes before what is named above it.
    assert cli("--config", "/missing", "config", "path", "--config", str(other)).stdout == f"{other}\n"
    file.write_text("")
    assert cli("config", "path").stdout == f"{file}\n"


def test_variables_that_are_no_settings_are_mentioned(cli: Cli) -> None:
    result = cli("config", "show", env={"ACI_PROVIDER_SLOT": "3"})
    assert result.returncode == 0
    assert "ACI_PROVIDER_SLOT is no setting; did you mean ACI_PROVIDER_SLOTS?" in result.stderr


def test_infer_without_anybody_to_ask_says_how_to_name_one(cli: Cli) -> None:
    result = cli("infer", "hello")
    assert result.returncode == 2
    assert "name one with --bootstrap, ACI_BOOTSTRAP or bootstrap in the configuration file" in result.stderr


def test_an_address_that_is_none_is_refused_by_every_command(cli: Cli, home: Path, file: Path) -> None:
    for command in (("config", "show"), ("join",), ("doctor",)):
        line = one_line(cli(*command, "--listen", "/ip4/127.0.0.1/tcp/1", "--listen", "zzz"), 2)
        assert line == "aci-p2p: --listen: 'zzz' is not a multiaddr to listen on, such as /ip4/0.0.0.0/tcp/9400"
    line = one_line(cli("infer", "hello", env={"ACI_BOOTSTRAP": "nonsense"}), 2)
    assert line.startswith("aci-p2p: ACI_BOOTSTRAP: 'nonsense' is not a multiaddr to join through, such as ")
    file.write_text('[p2p]\nannounce = ["192.0.2.1:9400"]\n')
    assert f"{file}:2: p2p.announce: '192.0.2.1:9400' is not a multiaddr that others" in one_line(
        cli("keys", "list"), 2
    )


def test_ctrl_c_while_we_are_imported() -> None:
    code = """
import sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from aci_p2p.cli import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert one_line(result, 130) == "aci-p2p: interrupted"


@pytest.mark.parametrize("name", ["path", "@abstract-aci-test"])
def test_the_service_manager_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = name if name.startswith("@") else str(tmp_path / name)
    if name.startswith("@") and sys.platform != "linux":
        pytest.skip("abstract addresses are Linux's")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0"))
        manager.settimeout(5)
        notify("RELOADING=1", "MONOTONIC_USEC=1")
        assert manager.recv(100) == b"RELOADING=1\nMONOTONIC_USEC=1"
        monkeypatch.delenv("NOTIFY_SOCKET")
        notify("READY=1")
        manager.settimeout(0)
        with pytest.raises(BlockingIOError):
            manager.recv(100)


@pytest.fixture
def start(home: Path, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts `aci-p2p join` with options; its output goes to `out` and `err` in the test's folder."""
    running: list[Process] = []
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:

        def run(*arguments: str, **options: object) -> Process:
            process: Process = subprocess.Popen(
                [*COMMAND, "join", *arguments],
                stdin=subprocess.DEVNULL,
                **{"stdout": out, "stderr": err, **options},  # type: ignore[call-overload]
                env={**os.environ, "ACI_HOME": str(home), "NO_COLOR": "1", "NOTIFY_SOCKET": str(tmp_path / "notify")},
            )
            running.append(process)
            return process

        yield run
        for process in running:
            process.kill()
            process.wait()


def wait_for(path: Path, text: str) -> str:
    """Wait until a file holds `text`; all of it."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        content = path.read_text()
        if text in content:
            return content
        time.sleep(0.02)
    pytest.fail(f"{path.name} has no {text!r}: {path.read_text()}")


@pytest.mark.slow
def test_a_node_reads_its_configuration_again(
    start: Callable[..., Process], home: Path, file: Path, tmp_path: Path, cli: Cli
) -> None:
    ModelStore(home / "models").add_directory(write_tiny_model(tmp_path / "tiny"), "tiny")
    file.write_text(LOOPBACK)
    err = tmp_path / "err"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(START_S)
        node = start("--slots", "3")
        assert manager.recv(100) == b"READY=1"
        out = wait_for(tmp_path / "out", "ask it with")
        assert "serving tiny: 3 jobs at once, 0.000001 ACI a prompt token" in out
        address = next(line for line in out.splitlines() if line.startswith("listening on ")).split()[-1]

        file.write_text(
            f'key = "other"\n{LOOPBACK}[provider]\ninput_token_price = "0.5"\noutput_token_price = 0\nslots = 7\n'
        )
        node.send_signal(signal.SIGHUP)
        log = wait_for(err, "a restart is needed")
        assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(100) == b"READY=1"
        # Slots were given by a flag, which goes before the file.
        assert log.splitlines()[-2].endswith(
            'configuration: provider.input_token_price "0.000001" -> "0.5"; '
            'provider.output_token_price "0.000004" -> "0"'
        )
        assert log.splitlines()[-1].endswith('a restart is needed for: key "node" -> "other"')
        ask = (
            "infer",
            "--bootstrap",
            address,
            "--model",
            "tiny",
            "--max-tokens",
            "3",
            "--max-price",
            "10000",
            "--json",
        )
        answer = json.loads(cli(*ask, "Hello!", env={"ACI_CONFIG": os.devnull}).stdout)
        assert int(answer["price_base_units"]) == answer["input_tokens"] * 5 * 10**17 * 5 // 4

        for text, words in (
            ("slots = 3", f"the configuration is not taken, the old one stays: {file}:1: slots: there is no such"),
            (f'{LOOPBACK}[provider]\nmodels = ["none"]\n', "the old one stays: there is no model 'none'"),
            (f'bootstrap = ["nonsense"]\n{LOOPBACK}', f"the old one stays: {file}:1: bootstrap: 'nonsense' is not"),
            (f'bootstrap = ["{NOBODY}"]\n{LOOPBACK}', 'provider.output_token_price "0" -> "0.000004"'),
            (LOOPBACK, f'bootstrap ["{NOBODY}"] -> []'),
        ):
            file.write_text(text)
            node.send_signal(signal.SIGHUP)
            wait_for(err, words)
        assert node.poll() is None
        node.send_signal(signal.SIGTERM)
        assert node.wait(START_S) == 0


@pytest.mark.parametrize("view", ["--no-live", "--live"])
def test_a_node_ends_with_its_terminal(start: Callable[..., Process], file: Path, tmp_path: Path, view: str) -> None:
    file.write_text(LOOPBACK)
    master, terminal = pty.openpty()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(START_S)
        node = start("--no-serve", view, stdout=terminal, start_new_session=True)
        os.close(terminal)
        assert manager.recv(100) == b"READY=1"
        # A reload while the terminal is there is none of its end.
        node.send_signal(signal.SIGHUP)
        wait_for(tmp_path / "err", "the configuration is as it was")
        os.close(master)
        node.send_signal(signal.SIGHUP)
        assert node.wait(START_S) == 0
