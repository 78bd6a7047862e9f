"""Which providers of a model a node finds: the document of `aci-p2p providers --json`."""

from __future__ import annotations

from typing import TypedDict

import trio

from aci_p2p.control.wire import BadRequest
from aci_p2p.node import Node
from aci_p2p.protocol.hashing import DIGEST_BYTES
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.publications import CapabilityRecord
from aci_p2p.protocol.text import printable


class ProviderEntry(TypedDict):
    """A provider, by its own signed record."""

    provider: str
    this_node: bool
    """Whether it is the node that searched: others find it, it takes no jobs of its own."""
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
    """This node first, then those that are connected and have a free slot."""


async def find_providers(node: Node, model_root: str) -> ProvidersReport:
    """The providers of a model, whose weights root is given in hex: a running node, and whom it finds.

    Raises BadRequest.
    """
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
    own = [record for record in node.provider.capabilities() if record.model_root == root] if node.provider else []
    return ProvidersReport(
        model_root=root.hex(),
        took_ms=round(took * 1_000, 1),
        providers=[
            *(_entry(node.node_id, record, this_node=True) for record in own),
            *(_entry(record.sender, record.body, connected=record.sender in peers) for record in found),
        ],
    )


def _entry(
    provider: NodeId, record: CapabilityRecord, *, this_node: bool = False, connected: bool = False
) -> ProviderEntry:
    return ProviderEntry(
        provider=str(provider),
        this_node=this_node,
        connected=connected,
        model_name=printable(record.model_name),
        context=record.context,
        engine=printable(record.engine.name),
        quantisation=printable(record.engine.quantisation),
        slots=record.slots,
        free_slots=record.free_slots,
        input_token_price=str(record.input_token_price),
        output_token_price=str(record.output_token_price),
        addresses=[printable(address) for address in record.addresses],
    )
