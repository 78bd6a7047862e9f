"""Which providers of a model a node finds: the document of `aci-p2p providers --json`."""

from __future__ import annotations

from typing import TypedDict

import trio

from aci_p2p.control.wire import BadRequest
from aci_p2p.node import Node
from aci_p2p.protocol.hashing import DIGEST_BYTES
from aci_p2p.protocol.text import printable


class ProviderEntry(TypedDict):
    """A provider, by its own signed record."""

    provider: str
    connected: bool
    """Whether the node is connected to it, so that it hears an offer."""
    model_name: str
    context: int
    """Longest sequence, tokens."""
    engine: str
    quantisation: str
    slots: int
    """Jobs at once."""
    free_slots: int
    input_token_price: str
    """Base units for each prompt token; indicative."""
    output_token_price: str
    """Base units for each output token; indicative."""
    addresses: list[str]


class ProvidersReport(TypedDict):
    """What a search has found."""

    model_root: str
    """Hexadecimal."""
    took_ms: float
    """Time that the search took, milliseconds."""
    providers: list[ProviderEntry]
    """Those that are connected and have a free slot come first."""


async def find_providers(node: Node, model_root: str) -> ProvidersReport:
    """Search the providers of a model, whose weights root is given in hex, from a running node. Raises BadRequest."""
    try:
        root = bytes.fromhex(model_root)
    except ValueError:
        root = b""
    if len(root) != DIGEST_BYTES:
        msg = "which model? its weights root has 64 hex digits"
        raise BadRequest(msg)
    began = trio.current_time()
    found = await node.find_providers(root)
    took = trio.current_time() - began
    peers = set(node.network.peers)
    return ProvidersReport(
        model_root=root.hex(),
        took_ms=round(took * 1_000, 1),
        providers=[
            ProviderEntry(
                provider=str(record.sender),
                connected=record.sender in peers,
                model_name=printable(record.body.model_name),
                context=record.body.context,
                engine=printable(record.body.engine.name),
                quantisation=printable(record.body.engine.quantisation),
                slots=record.body.slots,
                free_slots=record.body.free_slots,
                input_token_price=str(record.body.input_token_price),
                output_token_price=str(record.body.output_token_price),
                addresses=[printable(address) for address in record.body.addresses],
            )
            for record in found
        ],
    )
