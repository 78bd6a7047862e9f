"""`aci-p2p config`: what is set, and where."""

from __future__ import annotations

import textwrap

import click

from aci_p2p.cli.common import json_option, print_json
from aci_p2p.cli.options import Given, configured
from aci_p2p.config import SETTINGS, Loaded, Setting, default_config, unknown_variables
from aci_p2p.config.paths import CONFIG_NAME
from aci_p2p.protocol.text import printable

_EPILOG = """\b
Examples:
  aci-p2p config show                       the values that join would run with, and where each comes from
  aci-p2p config show --slots 2             what an option would change
  aci-p2p config example > config.toml      a file with every setting, explained
"""
_COMMENT_WIDTH = 100
"""Columns of a comment in the example."""


@click.group("config", short_help="Show what is set, and where.", epilog=_EPILOG)
def command() -> None:
    """Show the settings. Each is an option, a variable and a setting of the file, of which the first counts."""


@command.command("show", epilog=_EPILOG)
@configured("*")
@json_option
def show(given: Given, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Show the effective values, and where each comes from; the output is a configuration file itself."""
    loaded = given.load()
    for problem in unknown_variables():
        click.echo(f"aci-p2p: warning: {printable(problem)}", err=True)
    if as_json:
        print_json(_document(loaded))
        return
    click.echo(f"# {loaded.file}" + ("" if loaded.found else " does not exist"))
    for setting, header in _with_headers():
        click.echo(header, nl=False)
        text = setting.kind.to_toml(setting.of(loaded.config))
        line = f"{setting.name} = {text}" if text else f"# {setting.name} is not set"
        click.echo(f"{line:<40}  # {printable(str(loaded.origins[setting.key]))}")
    click.echo("\n# Files")
    for name, path in _paths(loaded).items():
        click.echo(f"# {name:<14} {path}")


@command.command("path", epilog="\b\nExample:\n  $EDITOR $(aci-p2p config path)")
@configured("home")
def path_(given: Given) -> None:
    """Print the path of the file that is read, whether it exists or not."""
    click.echo(str(given.load().file))


@command.command("example", epilog=f"\b\nExample:\n  aci-p2p config example > {CONFIG_NAME}")
def example() -> None:
    """Print a file with every setting, its default and what it does; all of it commented out."""
    click.echo("# Settings of aci-p2p. What is commented out is the default.")
    click.echo("# An option goes before a variable, a variable before this file. Relative folders start from here.")
    for setting, header in _with_headers():
        click.echo(header)
        for line in textwrap.wrap(
            f"{setting.help} ({setting.flag.replace('/', ', ')}, {setting.variable})", _COMMENT_WIDTH
        ):
            click.echo(f"# {line}")
        text = setting.kind.to_toml(setting.of(default_config()))
        click.echo(f"#{setting.name} = {text or '...'}")


def _with_headers() -> list[tuple[Setting, str]]:
    """Every setting, with what stands before it in a file: the header of a table, or nothing."""
    sections = ["", *(setting.section for setting in SETTINGS)]
    return [
        (setting, "" if setting.section == before else f"\n[{setting.section}]\n")
        for setting, before in zip(SETTINGS, sections, strict=False)
    ]


def _paths(loaded: Loaded) -> dict[str, str]:
    node = loaded.config.node
    return {
        "keys": str(node.keys_path),
        "models": str(node.models_path),
        "database": str(node.database_path),
        "proofs": str(node.home / "proofs"),
        "address cache": str(node.address_cache_path),
        "control socket": str(node.control_socket_path),
    }


def _document(loaded: Loaded) -> dict[str, object]:
    settings = {
        setting.key: {
            "value": setting.kind.to_json(setting.of(loaded.config)),
            "source": loaded.origins[setting.key].source,
            "name": loaded.origins[setting.key].name,
            "line": loaded.origins[setting.key].line,
            "flag": setting.flag,
            "variable": setting.variable,
        }
        for setting in SETTINGS
    }
    return {"file": str(loaded.file), "found": loaded.found, "settings": settings, "paths": _paths(loaded)}
