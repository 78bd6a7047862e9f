"""The rooms are installed inside aci_p2p and nowhere else, whichever way the project is installed."""

from __future__ import annotations

import ast
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOMS = ("protocol", "gossip", "dht", "executor")
GENERIC = (*ROOMS, "tests", "spec", "requirements", "network", "cli")
MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 70


def packages_on_disk(root: Path, folders: dict[str, str]) -> Iterator[str]:
    """Names of the packages under the mapped folders; the development links in aci_p2p are passed over."""
    for package, folder in folders.items():
        for init in (root / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(root / folder).parts
            if not (folder == "aci_p2p" and parts and parts[0] in ROOMS):
                yield ".".join((package, *parts))


def our_modules(root: Path) -> Iterator[Path]:
    """Every Python file of our packages."""
    for folder in ("aci_p2p", *ROOMS):
        for path in sorted((root / folder).rglob("*.py")):
            if not (path.relative_to(root).parts[0] == "aci_p2p" and path.relative_to(root).parts[1] in ROOMS):
                yield path


def test_every_package_is_listed(root: Path, pyproject: dict[str, Any]) -> None:
    setuptools = pyproject["tool"]["setuptools"]
    assert sorted(packages_on_disk(root, setuptools["package-dir"])) == sorted(setuptools["packages"])


def test_every_module_lies_in_a_package(root: Path) -> None:
    stray = [path for path in our_modules(root) if not (path.parent / "__init__.py").is_file()]
    assert not stray, stray


def test_wheel_holds_aci_p2p_only(wheel: Path, pyproject: dict[str, Any]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top_level,) = (name for name in names if name.endswith(".dist-info/top_level.txt"))
        assert archive.read(top_level).decode().split() == ["aci_p2p"]
    assert {name.split("/")[0] for name in names} == {"aci_p2p", top_level.split("/")[0]}
    assert "aci_p2p/py.typed" in names
    packages = {name.removesuffix("/__init__.py").replace("/", ".") for name in names if name.endswith("/__init__.py")}
    assert packages == set(pyproject["tool"]["setuptools"]["packages"])


def test_wheel_holds_every_module(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if name.endswith(".py")}
    modules = (path.relative_to(root) for path in our_modules(root))
    assert shipped == {str(path if path.parts[0] == "aci_p2p" else "aci_p2p" / path) for path in modules}


def test_sdist_holds_what_a_builder_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"} <= names
    assert {"protocol/errors.py", "spec/decisions/0001-rooms-at-top-level.md", "requirements/base.txt"} <= names
    assert "tests/packaging/test_layout.py" in names
    unwanted = (".", "aci_p2p/protocol", "build", "dist")
    assert not [name for name in names if name.startswith(unwanted) or "__pycache__" in name]


def test_generic_names_are_not_importable(installed: Path, tmp_path: Path) -> None:
    probe = f"import importlib.util as u; print([n for n in {GENERIC!r} if u.find_spec(n)])"
    done = subprocess.run([installed, "-I", "-c", probe], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_installed_packages_import(installed: Path, tmp_path: Path, pyproject: dict[str, Any], root: Path) -> None:
    packages = pyproject["tool"]["setuptools"]["packages"]
    probe = f"""
import importlib
for name in {packages!r}:
    print(importlib.import_module(name).__file__)
"""
    done = subprocess.run([installed, "-I", "-c", probe], cwd=tmp_path, check=True, capture_output=True, text=True)
    files = done.stdout.split()
    assert len(files) == len(packages)
    assert not [file for file in files if Path(file).is_relative_to(root)]


def test_modules_and_functions_are_short(root: Path) -> None:
    long = list[str]()
    for path in our_modules(root):
        source = path.read_text()
        if len(source.splitlines()) >= MAX_MODULE_LINES:
            long.append(f"{path}: {len(source.splitlines())} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines >= MAX_FUNCTION_LINES:
                    long.append(f"{path}:{node.lineno} {node.name}: {lines} lines")
    assert not long, "\n".join(long)
