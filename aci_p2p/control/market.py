"""The order book of a running node: the document of `aci-p2p market --json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypedDict

import trio

from aci_p2p.clock import MS_PER_S
from aci_p2p.control.wire import BadRequest
from aci_p2p.node import Node
from aci_p2p.protocol.hashing import DIGEST_BYTES
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.pricing import asked_prices
from aci_p2p.protocol.publications import Ask
from aci_p2p.protocol.text import printable

GATHER_S: Final = 7.0
"""Seconds to find providers of a model and hear the first ask, where the book has none yet."""
REST_S: Final = 1.0
"""Seconds from the first ask to the answer: the rest of a neighbour's log comes with it."""


class AskEntry(TypedDict):
    """What a provider asks, by its own signed word."""

    provider: str
    own: bool
    """Whether it is the node that answers."""
    model_name: str
    input_token_price: str
    """Base units for each prompt token, at the load that the ask tells."""
    output_token_price: str
    """The same for each output token."""
    latency_ms: int
    """Promised time to the first token."""
    slots: int
    """Jobs at once."""
    free_slots: int
    region: str
    """Empty: not told."""
    context: int
    """Longest sequence, tokens."""
    engine: str
    quantisation: str
    age_s: float
    """Seconds since it was signed."""


class ModelMarket(TypedDict):
    """The asks for one model."""

    model_root: str
    """Hexadecimal."""
    asks: list[AskEntry]
    """The cheapest first."""


class MarketReport(TypedDict):
    """What the order book holds."""

    models: list[ModelMarket]


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """The asks for one model in short."""

    model_root: str
    """Hexadecimal."""
    providers: int
    """Who ask something, the node itself included."""
    output_token_price: int
    """The least that one asks for an output token at its load, base units."""
    slots: int
    """Of all of them."""
    free_slots: int


async def summarise_market(node: Node) -> list[ModelSummary]:
    """All models that the node looks at and somebody asks something for; cheap enough for a screen."""
    found: list[ModelSummary] = []
    for root in node.asks.models:
        # A book may hold thousands of asks.
        await trio.lowlevel.checkpoint()
        own = node.asks.offered(root)
        asks = [*(ask.body for ask in node.asks.book.view(root, node.clock())), *([own] if own is not None else [])]
        if asks:
            least = min(outputs for _, outputs in map(asked_prices, asks))
            slots, free = sum(ask.slots for ask in asks), sum(ask.free_slots for ask in asks)
            found.append(ModelSummary(root.hex(), len(asks), least, slots, free))
    return found


async def read_market(node: Node, model_root: str) -> MarketReport:
    """The asks for a model, whose weights root is given in hex; empty: for all that the node looks at.

    Raises BadRequest.
    """
    if not model_root:
        await trio.lowlevel.checkpoint()
        return MarketReport(models=[_model_market(node, root) for root in node.asks.models])
    try:
        root = bytes.fromhex(model_root)
    except ValueError:
        root = b""
    if len(root) != DIGEST_BYTES:
        msg = "which model? its weights root has 64 hex digits"
        raise BadRequest(msg)
    node.asks.follow(root)
    if not node.asks.book.providers(root, node.clock()):
        with trio.move_on_after(GATHER_S):
            found = await node.find_providers(root)
            others = [record for record in found if record.sender != node.node_id]
            if others and await node.asks.wait_for_asks(root, GATHER_S):
                await trio.sleep(REST_S)
    return MarketReport(models=[_model_market(node, root)])


def _model_market(node: Node, root: bytes) -> ModelMarket:
    now = node.clock()
    entries = [
        _entry(ask.body, ask.sender, (now - ask.header.issued_at) / MS_PER_S) for ask in node.asks.book.view(root, now)
    ]
    if (own := node.asks.offered(root)) is not None:
        entries.append(_entry(own, node.node_id, 0.0, own=True))
    entries.sort(key=lambda entry: (int(entry["output_token_price"]), int(entry["input_token_price"])))
    return ModelMarket(model_root=root.hex(), asks=entries)


def _entry(ask: Ask, provider: NodeId, age_s: float, *, own: bool = False) -> AskEntry:
    inputs, outputs = asked_prices(ask)
    return AskEntry(
        provider=str(provider),
        own=own,
        model_name=printable(ask.model_name),
        input_token_price=str(inputs),
        output_token_price=str(outputs),
        latency_ms=ask.latency_ms,
        slots=ask.slots,
        free_slots=ask.free_slots,
        region=printable(ask.region),
        context=ask.context,
        engine=printable(ask.engine.name),
        quantisation=printable(ask.engine.quantisation),
        age_s=round(max(age_s, 0.0), 1),
    )
