"""What the sub-commands share: options and output."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    """Adds `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)


def program() -> str:
    """How the user can call us again from here."""
    return "aci-p2p" if shutil.which("aci-p2p") else os.path.relpath(sys.argv[0])


def print_json(value: object) -> None:
    """Print a JSON document on standard output; in ASCII, which every encoding of it can carry."""
    click.echo(json.dumps(value, indent=2))
