"""`aci-p2p keys`: the identities of this machine."""

from __future__ import annotations

import click

from aci_p2p.cli.common import json_option, print_json
from aci_p2p.cli.options import FOLDERS, Given, configured
from aci_p2p.keys import KeyRing


@click.group("keys", short_help="List and make identities.")
def command() -> None:
    """List and make the Ed25519 keys that nodes of this machine run under. Secrets are never shown."""


@command.command("list", epilog="\b\nExample:\n  aci-p2p keys list --json")
@configured(*FOLDERS)
@json_option
def list_keys(given: Given, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """List the keys: name, peer id, file."""
    keys = KeyRing(given.load().config.node.keys_path).list()
    if as_json:
        print_json([{"name": key.name, "peer_id": str(key.node_id), "path": str(key.path)} for key in keys])
    elif not keys:
        click.echo("no keys yet; join and infer make theirs when they first run")
    for key in () if as_json else keys:
        click.echo(f"{key.name:<12} {key.node_id}  {key.path}")


@command.command("new", epilog="\b\nExample:\n  aci-p2p keys new node")
@click.argument("name")
@configured(*FOLDERS)
@json_option
def new_key(name: str, given: Given, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Make a new key called NAME, readable by you alone."""
    key = KeyRing(given.load().config.node.keys_path).create(name)
    if as_json:
        print_json({"name": name, "peer_id": str(key.node_id)})
    else:
        click.echo(f"{name}  {key.node_id}")
