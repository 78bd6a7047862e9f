"""Models that every node knows by name, so that a consumer can name weights it does not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """One model."""

    name: str
    """Name in offers and in the model store."""
    title: str
    """As its makers write it."""
    licence: str
    """SPDX identifier."""
    root: bytes
    """Weights root (spec/weights-root.md), 32 bytes."""
    context: int
    """Longest sequence, tokens."""
    parameters: int
    """Number of weights."""
    licence_bps: int = 0
    """What its owner is due, in ten-thousandths of the compute's price."""


DEFAULT_MODEL: Final = "smollm2-135m-instruct"
"""Used when no model is named."""

CATALOGUE: Final[Mapping[str, CatalogueModel]] = MappingProxyType(
    {
        model.name: model
        for model in (
            CatalogueModel(
                name=DEFAULT_MODEL,
                title="SmolLM2-135M-Instruct",
                licence="Apache-2.0",
                root=bytes.fromhex("589a49168c8c8cf5440e186209d552beab28d9b1d7615171c147e43bd49501d8"),
                context=8192,
                parameters=134_515_008,
            ),
        )
    }
)
"""By name."""

_LICENCES: Final = {model.root: model.licence_bps for model in CATALOGUE.values()}


def licence_bps(root: bytes) -> int:
    """What the owner of a model is due, in ten-thousandths of the compute's price; 0 for a model that is not here."""
    return _LICENCES.get(root, 0)
