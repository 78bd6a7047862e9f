"""`aci-p2p verify`: check an answer offline."""

from __future__ import annotations

from pathlib import Path

import click

from aci_p2p.cli.common import json_option, print_json
from aci_p2p.protocol.catalogue import CATALOGUE
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.proof import CHECKS, LIMITATIONS, MAX_PROOF_BYTES, VerifiedProof, verify_proof
from aci_p2p.protocol.text import printable


@click.command("verify", short_help="Check an answer offline.", epilog="\b\nExample:\n  aci-p2p verify a.aciproof")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@json_option
def command(file: Path, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Check the proof in FILE, and say what it proves and what it does not. Nobody is asked."""
    verified = verify_proof(_read(file))
    if as_json:
        print_json(describe(verified))
        return
    body = verified.proof.body
    click.secho(f"VALID  {file}: {len(CHECKS)} checks passed", fg="green", bold=True)
    for turn in verified.file.conversation.turns:
        click.echo(f"  {printable(turn.role)}: {_shorten(turn.content)}")
    click.echo(f"  answer: {_shorten(verified.file.text)}")
    click.echo(f"  model: {model_name(body.model_root)}")
    click.echo("It proves:")
    for statement in verified.statements():
        click.echo(f"  + {printable(statement)}")
    click.echo("It does not prove:")
    for limitation in LIMITATIONS:
        click.echo(f"  - {limitation}")


def describe(verified: VerifiedProof) -> dict[str, object]:
    """A verified proof for programs."""
    body = verified.proof.body
    return {
        "valid": True,
        "network": verified.file.network,
        "job_id": body.job_id.hex(),
        "provider": str(verified.proof.sender),
        "consumer": str(verified.offer.sender),
        "model_root": body.model_root.hex(),
        "input_tokens": body.input_tokens,
        "output_tokens": body.output_tokens,
        "temperature_milli": body.temperature_milli,
        "engine": {"name": body.engine.name, "profile": body.engine.profile, "device": body.engine.device},
        "issued_at_ms": verified.proof.header.issued_at,
        "text": verified.file.text,
        "proves": list(verified.statements()),
        "does_not_prove": list(LIMITATIONS),
    }


def model_name(root: bytes) -> str:
    """A model by its catalogue name, if its root is in the catalogue, else by its root."""
    for model in CATALOGUE.values():
        if model.root == root:
            return f"{model.title}, weights root {root.hex()[:16]}..."
    return f"weights root {root.hex()}"


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_PROOF_BYTES + 1)
    except OSError as error:
        msg = f"cannot read {file}: {error.strerror}"
        raise LocalError(msg) from None


def _shorten(text: str, width: int = 100) -> str:
    line = printable(text)
    return line if len(line) <= width else line[: width - 3] + "..."
