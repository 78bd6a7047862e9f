"""`aci-p2p infer`: ask a model of the network."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import click
from rich.console import Console

from aci_p2p.cli.answering import Show, speed_line, summary
from aci_p2p.cli.asking import check_reachable, client_beside, proof_path
from aci_p2p.cli.common import json_option, print_json, program
from aci_p2p.cli.options import CLIENT, Given, configured
from aci_p2p.cli.running import Stop, run
from aci_p2p.client import (
    ACI,
    Answer,
    Fallback,
    Requirements,
    conversation_of,
    fallback_of,
    requirements_of,
    resolve_model,
)
from aci_p2p.config import NodeConfig
from aci_p2p.files import write_atomically
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.messages import MAX_INPUT_BYTES
from aci_p2p.protocol.pricing import format_amount
from aci_p2p.protocol.proof import encode_proof

_EPILOG = """\b
Examples:
  aci-p2p infer "What is the capital of France?"        beside a running aci-p2p join
  aci-p2p infer --bootstrap /ip4/192.0.2.1/tcp/9400/p2p/12D3KooW... "What is the capital of France?"
  echo "Tell me a story" | aci-p2p infer --bootstrap ADDRESS --temperature 0.8 -
  aci-p2p infer --bootstrap ADDRESS --max-price 0.001 --proof a.aciproof "Hello!"
  aci-p2p infer --bootstrap ADDRESS --min-stake 1000 --provider-region eu-west "Hello!"
"""


@dataclass(frozen=True, slots=True)
class _Request:
    """What the command line asked for."""

    prompt: str
    model: str
    max_tokens: int
    temperature: float
    requirements: Requirements
    fallback: Fallback
    """What happens when one fails."""
    proof: Path | None
    as_json: bool


@click.command("infer", short_help="Ask a model of the network.", epilog=_EPILOG)
@click.argument("prompt")
@configured(*CLIENT)
@click.option("--proof", type=click.Path(path_type=Path, dir_okay=False), help="Where to save the proof.")
@click.option("--verification", default="optimistic", show_default=True, help="How the answer is checked.")
@json_option
def command(prompt: str, given: Given, proof: Path | None, verification: str, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Ask a model of the network PROMPT ('-' reads it from standard input), stream the answer, save its proof.

    Without --bootstrap the network is joined through the node that runs on this machine (aci-p2p join), if one does,
    and through the addresses that are configured or known from before.
    """
    loaded = given.load()
    config, ask = client_beside(loaded), loaded.config.client
    check_reachable(config)
    text = _read_prompt() if prompt == "-" else prompt
    requirements = replace(requirements_of(ask), verification=verification)
    fallback = fallback_of(ask)
    request = _Request(text, ask.model, ask.max_tokens, ask.temperature, requirements, fallback, proof, as_json)

    # What can be refused here is refused before anybody is dialled.
    resolve_model(ask.model, config)
    conversation_of(text)

    async def work(stop: Stop) -> None:
        await _infer(config, request, stop)

    run(work)


def _read_prompt() -> str:
    data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1) if sys.stdin else b""
    if len(data) > MAX_INPUT_BYTES:
        msg = f"the prompt is longer than {MAX_INPUT_BYTES} bytes"
        raise LocalError(msg)
    try:
        return data.decode()
    except UnicodeDecodeError:
        msg = "the prompt is not UTF-8 text"
        raise LocalError(msg) from None


async def _infer(config: NodeConfig, request: _Request, stop: Stop) -> None:
    status = Console(stderr=True, quiet=request.as_json, highlight=False, soft_wrap=True)
    show = Show(status, None if request.as_json else Console(soft_wrap=True), steps=False)
    async with ACI(config) as aci:
        answer: Answer | None = None
        with stop:
            async with aci.stream(
                prompt=request.prompt,
                model=request.model,
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                requirements=request.requirements,
                fallback=request.fallback,
            ) as stream:
                answer = await show.run(stream)
    if answer is None:
        return
    path = request.proof or proof_path(config, answer)
    saved: str | None = None
    try:
        write_atomically(path, encode_proof(answer.proof))
        saved = str(path)
    finally:
        # What was paid for is shown, also when its proof cannot be saved.
        if request.as_json:
            print_json({**summary(answer, show.timing), "proof_file": saved})
    if request.as_json:
        return
    price = format_amount(answer.receipt.body.price)
    status.print(f"{speed_line(show.timing)}; {price}", style="dim")
    file = shlex.quote(str(path))
    status.print(f"proof: {file}  (check it with: {program()} verify {file})", style="dim", markup=False)
