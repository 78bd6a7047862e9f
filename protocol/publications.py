"""What nodes publish of themselves, records in the DHT and standing asks, and what these share with messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from aci_p2p.protocol.wire import DIGEST, Amount, ListOf, Struct, Text, Uint, Wire

MAX_ADDRESSES: Final = 8
"""Multiaddrs that a node may claim."""
MAX_ADDRESS_BYTES: Final = 256
"""Characters of one multiaddr."""
MAX_NAME_BYTES: Final = 128
"""Bytes of a model, engine, device or role name."""
MAX_LATENCY_MS: Final = 3_600_000
"""An hour: beyond any promise worth making."""
MAX_PRICE_STEPS: Final = 8
"""Steps of a price curve: finer ones than eighths mean nothing for a handful of slots."""
LOAD_MILLI_MAX: Final = 1_000
"""Thousandths of a provider's slots that are in use: all."""
MAX_FACTOR_MILLI: Final = 100_000
"""Thousandths; a price a hundred times the one of an idle provider turns everyone away."""
MAX_SLOTS: Final = 1 << 16
"""Jobs that a provider runs at once."""

NAME: Final = Text(MAX_NAME_BYTES)
ADDRESSES: Final = ListOf(Text(MAX_ADDRESS_BYTES), MAX_ADDRESSES)
TOKEN_PRICE: Final = Amount(12)
"""Below 2^96 base units a token, 79 billion ACI: the dearest bid for the largest job is still an amount."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What ran the model, in the provider's own words."""

    name: Annotated[str, Wire(1, NAME)]
    """Back end and version."""
    profile: Annotated[str, Wire(2, NAME)]
    """Numeric profile, such as `fp32-ref`."""
    device: Annotated[str, Wire(3, NAME)]
    """Hardware in words."""
    quantisation: Annotated[str, Wire(4, NAME)]
    """Weight format computed with."""


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """Where a node is and what it runs."""

    addresses: Annotated[tuple[str, ...], Wire(1, ADDRESSES)]
    """Dialable multiaddrs."""
    roles: Annotated[tuple[str, ...], Wire(2, ListOf(NAME, 8))]
    """`provider`, `consumer`, `bootstrap`, `validator`."""
    software: Annotated[str, Wire(3, NAME)]
    """Program and version."""


@dataclass(frozen=True, slots=True)
class PriceStep:
    """From some load on, a provider asks for more or less than when it is idle."""

    load_milli: Annotated[int, Wire(1, Uint(LOAD_MILLI_MAX))]
    """Thousandths of its slots in use, from which on the factor holds."""
    factor_milli: Annotated[int, Wire(2, Uint(MAX_FACTOR_MILLI))]
    """Thousandths of the prices when idle."""


@dataclass(frozen=True, slots=True)
class CapabilityRecord:
    """One model that a provider serves. With 0 slots it takes earlier ones back: the model is served no more."""

    model_root: Annotated[bytes, Wire(1, DIGEST)]
    """Weights root."""
    model_name: Annotated[str, Wire(2, NAME)]
    """The provider's name for it."""
    context: Annotated[int, Wire(3, Uint(1 << 32))]
    """Longest sequence, tokens."""
    engine: Annotated[Engine, Wire(4, Struct(Engine))]
    """What runs it, and in which quantisation."""
    input_token_price: Annotated[int, Wire(5, TOKEN_PRICE)]
    """Base units for each prompt token when idle; indicative, a bid is firm."""
    output_token_price: Annotated[int, Wire(6, TOKEN_PRICE)]
    """Base units for each output token when idle; indicative, a bid is firm."""
    slots: Annotated[int, Wire(7, Uint(MAX_SLOTS))]
    """Jobs it runs at once."""
    addresses: Annotated[tuple[str, ...], Wire(8, ADDRESSES)]
    """Where the provider may be dialled."""
    free_slots: Annotated[int, Wire(9, Uint(MAX_SLOTS))]
    """Of them, those not in use when the record was signed."""
    price_curve: Annotated[tuple[PriceStep, ...], Wire(10, ListOf(Struct(PriceStep), MAX_PRICE_STEPS))]
    """How the prices change with the load: ascending, above 0; none: they do not."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a provider asks for one model at this moment, broadcast. With 0 slots it takes earlier ones back."""

    model_root: Annotated[bytes, Wire(1, DIGEST)]
    """Weights root."""
    model_name: Annotated[str, Wire(2, NAME)]
    """The provider's name for it."""
    engine: Annotated[Engine, Wire(3, Struct(Engine))]
    """What runs it, and in which quantisation."""
    context: Annotated[int, Wire(4, Uint(1 << 32))]
    """Longest sequence, tokens."""
    input_token_price: Annotated[int, Wire(5, TOKEN_PRICE)]
    """Base units for each prompt token when idle; a bid is firm."""
    output_token_price: Annotated[int, Wire(6, TOKEN_PRICE)]
    """Base units for each output token when idle; a bid is firm."""
    price_curve: Annotated[tuple[PriceStep, ...], Wire(7, ListOf(Struct(PriceStep), MAX_PRICE_STEPS))]
    """How the prices change with the load: ascending, above 0; none: they do not."""
    slots: Annotated[int, Wire(8, Uint(MAX_SLOTS))]
    """Jobs it runs at once."""
    free_slots: Annotated[int, Wire(9, Uint(MAX_SLOTS))]
    """Of them, those not in use when the ask was signed."""
    latency_ms: Annotated[int, Wire(10, Uint(MAX_LATENCY_MS))]
    """Expected time from award to first token, milliseconds."""
    region: Annotated[str, Wire(11, NAME)]
    """Where it stands, in its owner's words; empty: not told."""
    addresses: Annotated[tuple[str, ...], Wire(12, ADDRESSES)]
    """Where the provider may be dialled."""
