"""What is declared, locked, imported and installed agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from aci_p2p.version import VERSION

PLUGINS = {"pytest": "aci_p2p/testing/plugin.py"}
"""Modules that only one of ours imports, which is imported by nobody but them."""
SOURCES = ("aci_p2p", "protocol", "gossip", "dht", "executor")
PIN = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>\S+)(?P<rest>( ; .*)?) \\")


def pins(lock: Path) -> dict[str, str]:
    """Name and version of every requirement in a lock; each must be pinned and followed by hashes."""
    found = dict[str, str]()
    hashes = dict[str, int]()
    name = ""
    for line in lock.read_text().splitlines():
        text = line.strip()
        if match := PIN.fullmatch(line):
            name = match["name"]
            assert name not in found, f"{name} is pinned twice in {lock.name}"
            found[name] = match["version"]
        elif text.startswith("--hash=sha256:"):
            hashes[name] = hashes.get(name, 0) + 1
        else:
            assert not text or text.startswith("#"), f"{lock.name}: {line}"
    assert found.keys() == hashes.keys()
    return found


def assert_locked(requirements: list[str], lock: dict[str, str]) -> None:
    """Each requirement is in the lock, in a version that satisfies it."""
    for requirement in map(Requirement, requirements):
        version = lock[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version} is locked"


def imported(root: Path) -> Iterator[tuple[str, Path]]:
    """Top-level name of every module from outside the standard library that our packages import."""
    for folder in SOURCES:
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Import(names=names):
                        modules = [alias.name for alias in names]
                    case ast.ImportFrom(module=str(module)):
                        modules = [module]
                    case _:
                        continue
                for top in {module.partition(".")[0] for module in modules} - {"aci_p2p", *sys.stdlib_module_names}:
                    yield top, path


def test_base_lock(root: Path, pyproject: dict[str, Any]) -> None:
    lock = pins(root / "requirements/base.txt")
    assert_locked(pyproject["project"]["dependencies"], lock)
    assert_locked(pyproject["tool"]["uv"]["override-dependencies"], lock)


def test_build_lock(root: Path, pyproject: dict[str, Any]) -> None:
    lock = pins(root / "requirements/build.txt")
    assert_locked(pyproject["build-system"]["requires"], lock)


def test_dev_lock_adds_to_the_others(root: Path, pyproject: dict[str, Any]) -> None:
    base = pins(root / "requirements/base.txt") | pins(root / "requirements/build.txt")
    dev = pins(root / "requirements/dev.txt")
    assert not base.keys() & dev.keys()
    assert_locked(pyproject["project"]["optional-dependencies"]["dev"], base | dev)


def test_torch_pins(root: Path, pyproject: dict[str, Any]) -> None:
    lines = (root / "requirements/torch.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    lock = {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in pinned}
    assert_locked(pyproject["project"]["optional-dependencies"]["torch"], lock)


def test_base_install_is_light(root: Path) -> None:
    heavy = {"torch", "transformers", "exllamav2", "onnxruntime", "llama-cpp-python"}
    assert not heavy & pins(root / "requirements/base.txt").keys()


def test_locks_name_no_index(root: Path) -> None:
    for lock in (root / "requirements").glob("*.txt"):
        assert "://" not in lock.read_text(), lock.name


def test_every_import_is_declared(root: Path, pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["torch"]]
    allowed = {canonicalize_name(Requirement(text).name) for text in declared}
    providers = packages_distributions()
    undeclared = {
        f"{path.relative_to(root)} imports {module}"
        for module, path in imported(root)
        if not allowed & {canonicalize_name(name) for name in providers.get(module, [module])}
        and PLUGINS.get(module) != str(path.relative_to(root))
    }
    assert not undeclared


def test_installed_versions_agree() -> None:
    """Our override is the only disagreement; were it gone, so could be the override."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"],
        check=False,
        capture_output=True,
        text=True,
    )
    complaints = [line for line in done.stdout.splitlines() if "fastecdsa" not in line]
    assert complaints in ([], ["No broken requirements found."])
    assert "fastecdsa==2.3.2" in done.stdout, "libp2p's fastecdsa pin is gone: drop the override (spec/decisions/0002)"


def test_the_package_has_our_version() -> None:
    assert version("aci-p2p") == VERSION


def test_requirements_are_sorted(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    for requirements in (project["dependencies"], *project["optional-dependencies"].values()):
        names = [Requirement(text).name for text in requirements]
        assert names == sorted(names)
