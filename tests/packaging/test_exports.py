"""The public names are those in exports.txt: a name is added, renamed or removed on purpose (`make exports`)."""

from __future__ import annotations

import ast
import importlib
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXPORTS = Path(__file__).with_name("exports.txt")
LAZY = {"aci_p2p", "aci_p2p.testing"}
"""Packages that import their parts when they are first used; type checkers read the imports."""


def init_of(package: str, folders: dict[str, str]) -> Path:
    """The `__init__.py` of a package, by its place in the repository."""
    mapped = max((name for name in folders if f"{package}.".startswith(f"{name}.")), key=len)
    rest = package.removeprefix(mapped).replace(".", "/")
    return ROOT / (folders[mapped] + rest) / "__init__.py"


def is_reexport(node: ast.stmt) -> bool:
    """Whether a statement may stand in a package's `__init__.py`."""
    match node:
        case ast.ImportFrom(module=str(module)):
            return module == "__future__" or module.split(".")[0] == "aci_p2p"
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.Expr(value=ast.Constant(value=str())):
            return True
        case _:
            return False


def setuptools_table() -> dict[str, Any]:
    """The packages and where they lie."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return table


def public_names() -> list[str]:
    """Every name in a package's `__all__`, in full."""
    names = list[str]()
    for package in sorted(setuptools_table()["packages"]):
        names += sorted(f"{package}.{name}" for name in getattr(importlib.import_module(package), "__all__", ()))
    return names


def test_packages_only_reexport() -> None:
    table = setuptools_table()
    for package in set(table["packages"]) - LAZY:
        init = init_of(package, table["package-dir"])
        for node in ast.parse(init.read_text()).body:
            assert is_reexport(node), f"{init}:{node.lineno}"


def test_every_reexport_is_named() -> None:
    table = setuptools_table()
    for package in table["packages"]:
        tree = ast.parse(init_of(package, table["package-dir"]).read_text())
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "aci_p2p"
            for alias in node.names
        }
        assert imported == set(getattr(importlib.import_module(package), "__all__", ())), package


def test_public_names_exist() -> None:
    for name in public_names():
        package, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(package), attribute), name


def test_public_names_are_the_committed_ones() -> None:
    assert public_names() == EXPORTS.read_text().split()


if __name__ == "__main__":
    EXPORTS.write_text("".join(f"{name}\n" for name in public_names()))
