"""What the sub-commands share: options and output."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from aci_p2p.config import DEFAULT_NETWORK, default_home
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.pricing import parse_amount

F = TypeVar("F", bound=Callable[..., Any])


def home_option(function: F) -> F:
    """Adds `--home`."""
    return click.option(
        "--home",
        type=click.Path(path_type=Path, file_okay=False),
        default=default_home,
        show_default="$ACI_HOME or ~/.local/share/aci-p2p",
        help="Folder of keys, models and jobs.",
    )(function)


def network_option(function: F) -> F:
    """Adds `--network`."""
    return click.option("--network", default=DEFAULT_NETWORK, show_default=True, help="Network id.")(function)


def json_option(function: F) -> F:
    """Adds `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)


class AmountType(click.ParamType[int]):
    """An amount of ACI, such as 0.00045."""

    name = "ACI"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        """Base units."""
        if isinstance(value, int):
            return value
        try:
            return parse_amount(value)
        except LocalError as error:
            self.fail(f"{error.message}; {error.hint}", param, ctx)


def program() -> str:
    """How the user can call us again from here."""
    return "aci-p2p" if shutil.which("aci-p2p") else os.path.relpath(sys.argv[0])


def print_json(value: object) -> None:
    """Print a JSON document on standard output; in ASCII, which every encoding of it can carry."""
    click.echo(json.dumps(value, indent=2))
