"""A provider's process is killed in the middle of an answer, at every token: another goes on, nothing is lost."""

from __future__ import annotations

import os
import socket
import statistics
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest
import trio

from aci_p2p import ACI, Answer, FailedOver, NodeConfig, Requirements, open_node
from aci_p2p.config import DEFAULT_INPUT_PRICE, DEFAULT_OUTPUT_PRICE
from aci_p2p.node import Node
from aci_p2p.protocol.catalogue import CATALOGUE, DEFAULT_MODEL
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.job import Chosen, Deliver, PaymentState
from aci_p2p.protocol.lifecycle import Party
from aci_p2p.protocol.messages import Share
from aci_p2p.protocol.pricing import format_amount, parse_amount
from tests.scenarios.daemons import Daemon, killed_at_the_end, until

pytestmark = [pytest.mark.scenario, pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(1_500)]

TOKENS: Final = 64
"""Of the answer."""
SOME: Final = (0, 15, 16, 63)
"""Tokens after which the provider is killed: the first, the last, and around those for which a voucher goes out."""
KILLED_AFTER: Final = range(TOKENS) if os.environ.get("ACI_FAILOVER") == "all" else SOME
RESUME_S: Final = 1.0
"""Longest silence of nearly all answers, seconds, where nothing else runs."""
PATIENCE_S: Final = 10.0
"""Longest silence at all: a busy machine."""
PROMPT: Final = "Tell me a long story about a lighthouse keeper and the sea."
CHEAPEST: Final = Requirements(latency_value=0, retry_cost=0)
"""The one that is killed is the cheaper one, whatever has happened to it before."""
DEAR: Final = "0.000005"
"""What the other asks for an output token, ACI."""


@dataclass(slots=True)
class Run:
    """One answer during which a provider was killed."""

    answer: Answer
    """What came of it."""
    silence_s: float
    """From the kill to the next token of the other, seconds."""


def daemon(home: Path, port: int, *arguments: str) -> Daemon:
    """A provider of the default model, that comes back where it was."""
    home.mkdir()
    (home / "models").symlink_to(NodeConfig().models_path)
    return Daemon(home, "--threads", "1", "--preload", *arguments, listen=f"/ip4/127.0.0.1/tcp/{port}")


async def is_back(node: Node, provider: Daemon) -> None:
    """The provider runs, and the consumer knows what it asks."""
    await trio.to_thread.run_sync(until, lambda: provider.is_up)
    peer = await node.network.connect(provider.address)
    root = CATALOGUE[DEFAULT_MODEL].root
    with trio.fail_after(60):
        while peer not in {ask.sender for ask in node.asks.book.view(root, node.clock())}:
            node.asks.follow(root)
            await trio.sleep(0.05)


async def ask(aci: ACI, victim: Daemon, killed_after: int) -> Run:
    """Ask, and kill the provider when so many tokens have come."""
    came, killed_at, silence, is_over = 0, 0.0, 0.0, False
    async with aci.stream(prompt=PROMPT, max_tokens=TOKENS, requirements=CHEAPEST) as stream:
        async for update in stream.updates:
            if isinstance(update, FailedOver):
                is_over = True
            elif isinstance(update, Deliver):
                came += len(update.tokens)
                if is_over and not silence:
                    silence = trio.current_time() - killed_at
            if not killed_at and isinstance(update, Chosen | Deliver) and came >= killed_after:
                killed_at = trio.current_time()
                victim.kill()
        return Run(stream.answer, silence)


def owed(share: Share, output_price: int) -> int:
    """What a share costs: the prompt and the tokens of others are read, one's own are written; a quarter for checks."""
    compute = DEFAULT_INPUT_PRICE * (share.input_tokens + share.first_token) + output_price * share.output_tokens
    return compute + -(-compute // 4)


@asynccontextmanager
async def open_consumer(home: Path, *bootstrap: str) -> AsyncGenerator[ACI]:
    config = NodeConfig(home=home, bootstrap=bootstrap)
    config = replace(config, p2p=replace(config.p2p, listen=(), mdns=False))
    async with open_node(config) as node, ACI(node) as aci:
        yield aci


def free_ports() -> tuple[int, int]:
    """Two ports that nobody listens on."""
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


async def test_another_goes_on_wherever_a_provider_is_killed(tmp_path: Path) -> None:
    ports = free_ports()
    cheap = daemon(tmp_path / "cheap", ports[0])
    dear = daemon(tmp_path / "dear", ports[1], "--output-price", DEAR)
    runs: list[Run] = []
    with killed_at_the_end([cheap, dear]):
        for provider in (cheap, dear):
            provider.start()
        for provider in (cheap, dear):
            await trio.to_thread.run_sync(until, lambda provider=provider: provider.is_up)
        async with open_consumer(tmp_path / "consumer", cheap.address, dear.address) as aci:
            for provider in (cheap, dear):
                await is_back(aci.node, provider)
            whole = await aci.inference(prompt=PROMPT, max_tokens=TOKENS, requirements=CHEAPEST)
            assert (len(whole.tokens), len(whole.receipt.body.shares)) == (TOKENS, 1)
            for killed_after in KILLED_AFTER:
                run = await ask(aci, cheap, killed_after)
                check(run, whole, cheap=whole.provider)
                runs.append(run)
                cheap.start()
                await is_back(aci.node, cheap)
            await all_settled(aci.node, [run.answer for run in runs])
    silences = sorted(run.silence_s for run in runs if run.silence_s)
    sys.stdout.write(
        f"{len(runs)} answers went on elsewhere after {statistics.median(silences):.2f} s, "
        f"99% of them within {silences[int(0.99 * (len(silences) - 1))]:.2f} s\n"
    )
    assert silences[-1] < PATIENCE_S


def check(run: Run, whole: Answer, *, cheap: NodeId) -> None:
    """No token is lost or comes twice, and each provider has its share, to the last unit."""
    assert run.answer.tokens == whole.tokens
    assert run.answer.text == whole.text
    receipt = run.answer.receipt.body
    assert sum(share.output_tokens for share in receipt.shares) == TOKENS
    assert [share.first_token for share in receipt.shares] == [0, *[s.output_tokens for s in receipt.shares[:-1]]]
    for share in receipt.shares:
        assert share.price == owed(share, DEFAULT_OUTPUT_PRICE if share.provider == cheap else parse_amount(DEAR))
    assert receipt.price == sum(share.price for share in receipt.shares)


async def all_settled(node: Node, answers: list[Answer]) -> None:
    """Those who were killed hold what they are owed, too, once they are back."""
    with trio.fail_after(60):
        while await node.store.owed(0):
            node.settler.wake()
            await trio.sleep(0.2)
    paid = 0
    for answer in answers:
        payments = await node.store.payments(answer.receipt.body.job_id, Party.CONSUMER)
        assert {payment.state for payment in payments} == {PaymentState.SETTLED}
        paid += sum(payment.amount for payment in payments)
    assert paid == sum(answer.receipt.body.price for answer in answers)
    sys.stdout.write(f"all of {format_amount(paid)} is settled\n")
