"""The systemd unit and the Dockerfile say what the command line understands, and agree with it on where things are."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from packaging.specifiers import SpecifierSet

from aci_p2p.cli.app import app
from aci_p2p.cli.join import CLOSING_S
from aci_p2p.config import SETTINGS, load
from aci_p2p.config.node import DEFAULT_GRACE_S, DEFAULT_LISTEN
from aci_p2p.protocol.errors import LocalError

MAX_EXPOSURE = 1.5
"""Of 10, by `systemd-analyze security`; packaging/README.md tells the figure."""


@pytest.fixture
def unit(root: Path) -> dict[str, list[str]]:
    """The unit's settings, each with all its values."""
    found: dict[str, list[str]] = {}
    for line in (root / "packaging/systemd/aci-p2p.service").read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture
def dockerfile(root: Path) -> list[tuple[str, str]]:
    """Instructions with their arguments."""
    text = (root / "packaging/docker/Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def parse(arguments: Sequence[str]) -> list[str]:
    """Have the command line parse arguments without running anything; the names of the commands."""
    names: list[str] = []
    command: click.Command = app
    context: click.Context | None = None
    rest = list(arguments)
    while True:
        context = command.make_context(command.name or "aci-p2p", rest, parent=context)
        if not isinstance(command, click.Group):
            return names
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found
        names.append(str(name))
        command = found


def test_parsing_notices_what_there_is_not() -> None:
    assert parse(["--config", "x", "keys", "new", "a"]) == ["keys", "new"]
    for arguments in (["joyn"], ["join", "--slot", "3"], ["keys", "make"], ["keys", "new"]):
        with pytest.raises(click.UsageError):
            parse(arguments)


def test_the_unit_starts_what_there_is(unit: dict[str, list[str]]) -> None:
    program, *arguments = shlex.split(unit["ExecStart"][0])
    assert Path(program).name == "aci-p2p"
    assert parse(arguments) == ["join"]
    assert unit["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert unit["RestartPreventExitStatus"] == [str(LocalError.exit_code)]
    assert int(unit["TimeoutStopSec"][0].removesuffix("s")) > DEFAULT_GRACE_S + CLOSING_S
    assert unit["KillSignal"] == ["SIGTERM"]


def test_the_unit_and_its_file_agree_on_folders(
    unit: dict[str, list[str]], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACI_HOME", raising=False)
    node = load(file=root / "packaging/systemd/config.toml").config.node
    assert node.home == Path("/var/lib", *unit["StateDirectory"])
    assert node.runtime_path == Path("/run", *unit["RuntimeDirectory"])
    user, name, *_, folder = shlex.split((root / "packaging/systemd/aci-p2p.sysusers").read_text(), comments=True)
    assert (user, [name], Path(folder)) == ("u", unit["User"], node.home)
    arguments = shlex.split(unit["ExecStart"][0])
    assert arguments[arguments.index("--config") + 1] == f"/etc/{unit['ConfigurationDirectory'][0]}/config.toml"


def test_the_unit_is_hardened(unit: dict[str, list[str]], root: Path, tmp_path: Path) -> None:
    for name in (
        "LockPersonality", "MemoryDenyWriteExecute", "NoNewPrivileges", "PrivateDevices", "PrivateTmp", "PrivateUsers",
        "ProtectClock", "ProtectControlGroups", "ProtectHome", "ProtectHostname", "ProtectKernelLogs",
        "ProtectKernelModules", "ProtectKernelTunables", "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID",
    ):  # fmt: skip
        assert unit[name] == ["yes"], name
    assert unit["ProtectSystem"] == ["strict"]
    assert unit["CapabilityBoundingSet"] == [""]
    assert unit["SystemCallFilter"][0] == "@system-service"
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("the rest needs systemd-analyze")
    # It wants to see the program and the user.
    text = (root / "packaging/systemd/aci-p2p.service").read_text().replace("/opt/aci-p2p/bin/aci-p2p", "/bin/true")
    text = text.replace("User=aci-p2p\nGroup=aci-p2p\n", "User=daemon\nGroup=daemon\n")
    copy = tmp_path / "aci-p2p.service"
    copy.write_text(text)
    done = subprocess.run([analyze, "verify", copy], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([analyze, "security", "--offline=true", copy], capture_output=True, text=True, check=False)
    exposure = re.search(r"exposure level for aci-p2p.service: ([0-9.]+)", done.stdout)
    assert exposure
    assert float(exposure[1]) <= MAX_EXPOSURE


def test_the_image_starts_what_there_is(dockerfile: list[tuple[str, str]]) -> None:
    said = dict(dockerfile)
    (program,) = json.loads(said["ENTRYPOINT"])
    assert program == "aci-p2p"
    assert parse(json.loads(said["CMD"])) == ["join"]
    health = json.loads(said["HEALTHCHECK"].partition(" CMD ")[2])
    assert health[0] == "aci-p2p"
    assert parse(health[1:]) == ["status"]
    assert said["STOPSIGNAL"] == "SIGTERM"
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", said["USER"])
    assert said["EXPOSE"].replace("/tcp", "") == DEFAULT_LISTEN.rpartition("/")[2]


def test_the_image_knows_our_variables_and_files(
    dockerfile: list[tuple[str, str]], root: Path, pyproject: dict[str, Any]
) -> None:
    variables = dict(part.split("=", 1) for name, value in dockerfile if name == "ENV" for part in shlex.split(value))
    ours = {name for name in variables if name.startswith("ACI_")}
    assert ours == {"ACI_HOME", "ACI_RUNTIME"}
    assert ours <= {setting.variable for setting in SETTINGS}
    assert dict(dockerfile)["VOLUME"] == variables["ACI_HOME"]
    copied = [
        word for name, value in dockerfile if name == "COPY" and "--from" not in value for word in value.split()[:-1]
    ]
    assert all((root / word).exists() for word in copied)
    assert set(pyproject["tool"]["setuptools"]["package-dir"].values()) <= set(copied)
    assert {pyproject["project"]["readme"], "pyproject.toml", "requirements/base.txt"} <= set(copied)
    python = dict(dockerfile)["ARG"].removeprefix("PYTHON=").partition("-")[0]
    assert SpecifierSet(pyproject["project"]["requires-python"]).contains(python)


def test_the_readme_gives_commands_that_there_are(root: Path) -> None:
    text = (root / "packaging/README.md").read_text()
    commands = re.findall(
        r"(?:^|[`/ ])aci(?:-p2p)? ((?:--config \S+ )?(?:config|models|status|doctor|join|infer)[^`\n]*)", text
    )
    assert len(commands) >= 5
    for command in commands:
        parse(shlex.split(command))
