"""ACI: a peer-to-peer network for verifiable AI inference.

`ACI` asks the network, `open_node` runs a node in your own trio program, `verify_proof` checks an answer offline.
Importing this package is cheap: its parts are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aci_p2p.attempts import Hedged, Waiting
    from aci_p2p.client import (
        ACI,
        Answer,
        AnswerStream,
        BatchResult,
        Fallback,
        NotConnected,
        Requirements,
        UnknownModel,
    )
    from aci_p2p.config import NodeConfig, ProviderConfig
    from aci_p2p.consumer import Offered
    from aci_p2p.node import Node, NodeParts, open_node
    from aci_p2p.protocol.errors import AciError, LocalError, RemoteError, ResourceError
    from aci_p2p.protocol.job import BidSeen, Chosen, Deliver, FailedOver
    from aci_p2p.protocol.messages import Turn
    from aci_p2p.protocol.proof import ProofInvalid, VerifiedProof, encode_proof, verify_proof
    from aci_p2p.protocol.request import ImpossibleJob, JobCancelled, NoBids, PromptRefused, ProviderFault

_HOMES = {
    "aci_p2p.attempts": ("Hedged", "Waiting"),
    "aci_p2p.client": (
        "ACI",
        "Answer",
        "AnswerStream",
        "BatchResult",
        "Fallback",
        "NotConnected",
        "Requirements",
        "UnknownModel",
    ),
    "aci_p2p.config": ("NodeConfig", "ProviderConfig"),
    "aci_p2p.consumer": ("Offered",),
    "aci_p2p.node": ("Node", "NodeParts", "open_node"),
    "aci_p2p.protocol.errors": ("AciError", "LocalError", "RemoteError", "ResourceError"),
    "aci_p2p.protocol.job": ("BidSeen", "Chosen", "Deliver", "FailedOver"),
    "aci_p2p.protocol.messages": ("Turn",),
    "aci_p2p.protocol.proof": ("ProofInvalid", "VerifiedProof", "encode_proof", "verify_proof"),
    "aci_p2p.protocol.request": ("ImpossibleJob", "JobCancelled", "NoBids", "PromptRefused", "ProviderFault"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ACI",
    "AciError",
    "Answer",
    "AnswerStream",
    "BatchResult",
    "BidSeen",
    "Chosen",
    "Deliver",
    "FailedOver",
    "Fallback",
    "Hedged",
    "ImpossibleJob",
    "JobCancelled",
    "LocalError",
    "NoBids",
    "Node",
    "NodeConfig",
    "NodeParts",
    "NotConnected",
    "Offered",
    "PromptRefused",
    "ProofInvalid",
    "ProviderConfig",
    "ProviderFault",
    "RemoteError",
    "Requirements",
    "ResourceError",
    "Turn",
    "UnknownModel",
    "VerifiedProof",
    "Waiting",
    "encode_proof",
    "open_node",
    "verify_proof",
]


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return __all__
