"""`aci-p2p demo`: the whole market on this machine, with a real network and a real model."""

from __future__ import annotations

import shlex
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aci_p2p.cli.answering import Show, speed_line, summary
from aci_p2p.cli.common import json_option, print_json, program
from aci_p2p.cli.options import FOLDERS, Given, configured
from aci_p2p.cli.progress import drawn
from aci_p2p.cli.running import Stop, run
from aci_p2p.client import ACI, Answer
from aci_p2p.config import DEFAULT_INPUT_PRICE, DEFAULT_OUTPUT_PRICE, NodeConfig, ProviderConfig
from aci_p2p.executor import ModelStore
from aci_p2p.executor.sources import fetch_default
from aci_p2p.files import write_atomically
from aci_p2p.node import Node, open_node
from aci_p2p.protocol.catalogue import DEFAULT_MODEL
from aci_p2p.protocol.messages import MAX_TOKENS
from aci_p2p.protocol.pricing import format_amount
from aci_p2p.protocol.proof import CHECKS, LIMITATIONS, encode_proof, verify_proof
from aci_p2p.protocol.text import printable

DEFAULT_PROMPT: Final = "What is the capital of France, and what is it famous for?"
PRICES_PERCENT: Final = (125, 100, 150)
"""What the demo's providers charge, in percent of the default prices; three, so that there is a choice."""
NETWORK: Final = "aci-demo"

_EPILOG = """\b
Examples:
  aci-p2p demo
  aci-p2p demo --prompt "Why is the sky blue?" --max-tokens 200
  aci-p2p demo --json
"""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the demo is to do."""

    prompt: str
    max_tokens: int
    proof: Path
    models: Path
    as_json: bool


@click.command("demo", short_help="Run a whole market on this machine.", epilog=_EPILOG)
@click.option("--prompt", "-p", envvar="ACI_DEMO_PROMPT", default=DEFAULT_PROMPT, show_default=True, help="A question.")
@click.option("--max-tokens", type=click.IntRange(1, MAX_TOKENS), default=160, show_default=True)
@click.option(
    "--proof",
    type=click.Path(path_type=Path, dir_okay=False),
    show_default="demo.aciproof in the ACI home",
    help="Where to save the proof.",
)
@configured(*FOLDERS)
@json_option
def command(prompt: str, max_tokens: int, proof: Path | None, given: Given, as_json: bool) -> None:  # noqa: FBT001
    """Run a bootstrap node, three providers and a consumer on this machine, and one real job between them.

    The network is libp2p over loopback, the model is SmolLM2-135M-Instruct, fetched if it is not there yet; nothing is
    simulated, and nothing leaves this machine but that download.
    """
    node = given.load().config.node
    models = node.models_path
    with drawn() as report:
        fetch_default(ModelStore(models), report=report)
    plan = _Plan(prompt or DEFAULT_PROMPT, max_tokens, proof or node.home / "demo.aciproof", models, as_json)

    async def work(stop: Stop) -> None:
        await _demo(plan, stop)

    run(work)


async def _demo(plan: _Plan, stop: Stop) -> None:
    console = Console(quiet=plan.as_json, highlight=False, soft_wrap=True)
    with TemporaryDirectory(prefix="aci-demo-") as folder:
        async with AsyncExitStack() as stack:
            consumer = await _start_swarm(stack, Path(folder), plan, console)
            show = Show(console, None if plan.as_json else console, steps=True)
            answer: Answer | None = None
            with stop:
                async with (
                    ACI(consumer) as aci,
                    aci.stream(prompt=plan.prompt, max_tokens=plan.max_tokens) as stream,
                ):
                    answer = await show.run(stream)
            if answer is not None:
                _conclude(answer, show, plan, console)


async def _start_swarm(stack: AsyncExitStack, folder: Path, plan: _Plan, console: Console) -> Node:
    """Start all nodes, and print them; the consumer's."""
    console.print("[bold]Peers[/]  real libp2p over loopback: TCP, noise, yamux, gossipsub, Kademlia")

    async def start(name: str, bootstrap: tuple[str, ...], percent: int = 0) -> Node:
        provider = None
        if percent:
            provider = ProviderConfig(
                models=(DEFAULT_MODEL,),
                input_token_price=DEFAULT_INPUT_PRICE * percent // 100,
                output_token_price=DEFAULT_OUTPUT_PRICE * percent // 100,
                preload=False,
            )
        config = NodeConfig(
            home=folder / name, network=NETWORK, bootstrap=bootstrap, provider=provider, model_store=plan.models
        )
        node = await stack.enter_async_context(open_node(config))
        console.print(f"  {name:<11} {node.node_id.short}  {node.addresses[0].partition('/p2p/')[0]}")
        return node

    bootstrap = (await start("bootstrap", ())).addresses[0]
    for number, percent in enumerate(PRICES_PERCENT, 1):
        await start(f"provider {number}", (bootstrap,), percent)
    return await start("consumer", (bootstrap,))


def _conclude(answer: Answer, show: Show, plan: _Plan, console: Console) -> None:
    """Check and save the proof, and say what it shows."""
    data = encode_proof(answer.proof)
    write_atomically(plan.proof, data)
    verified = verify_proof(data)
    if plan.as_json:
        print_json({**summary(answer, show.timing), "proof_file": str(plan.proof)})
        return
    receipt = answer.receipt.body
    tokens = f"{receipt.shares[-1].input_tokens} + {len(answer.tokens)}"
    paid = f"{format_amount(receipt.price)} for {tokens} tokens"
    console.print(f"  [dim]{speed_line(show.timing)}; loading the weights included[/]")
    console.print(f"\n[bold]Receipt[/]  {paid}; signed by the consumer")
    file = escape(shlex.quote(str(plan.proof)))
    console.print(f"\n[bold]Proof[/]  [green]verified[/], {len(CHECKS)} checks; {len(data)} bytes in {file}")
    listing = Table.grid(padding=(0, 1))
    for statement in verified.statements():
        listing.add_row(" +", escape(printable(statement)))
    for limitation in LIMITATIONS:
        listing.add_row(" -", f"not {limitation}")
    console.print(listing, soft_wrap=False)
    console.print(f"\n[dim]Check it yourself: {escape(program())} verify {file}[/]")
