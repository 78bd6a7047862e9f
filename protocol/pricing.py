"""What a job costs. Integers in base units (10^-18 ACI) throughout."""

from __future__ import annotations

from typing import Final

from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.identity import NodeId
from aci_p2p.protocol.messages import Bid, Offer, Share
from aci_p2p.protocol.wire import AMOUNT_BYTES_MAX

ONE_ACI: Final = 10**18
"""Base units in one ACI."""
TEMPLATE_TOKENS: Final = 128
"""Tokens that a chat template adds once (a default system prompt); SmolLM2 adds 22, Llama 3 about 30."""
TURN_TOKENS: Final = 16
"""Tokens that a chat template adds to each turn; ChatML adds 5, Llama 3 adds 5."""

_DECIMALS: Final = 18
_WHOLE_DIGITS: Final = 21
"""Digits of the largest amount before the point."""


def max_input_tokens(offer: Offer) -> int:
    """Upper bound of the prompt's tokens: byte-level vocabularies use one token a byte at most, templates add some."""
    return offer.input_bytes + TURN_TOKENS * offer.input_turns + TEMPLATE_TOKENS


def price(bid: Bid, *, input_tokens: int, output_tokens: int) -> int:
    """Cost of a job under a bid, base units."""
    return bid.input_token_price * input_tokens + bid.output_token_price * output_tokens


def worst_price(offer: Offer, bid: Bid, *, accepted_tokens: int = 0) -> int:
    """Most that the offer's job can cost under the bid, base units; without the `accepted_tokens` of others."""
    read = max_input_tokens(offer) + accepted_tokens
    return price(bid, input_tokens=read, output_tokens=offer.max_tokens - accepted_tokens)


def share_of(
    provider: NodeId, bid_digest: bytes, bid: Bid, *, input_tokens: int, first_token: int, output_tokens: int
) -> Share:
    """A provider's part of an answer at its bid's prices: what it read, the tokens of others included, and wrote."""
    owed = price(bid, input_tokens=input_tokens + first_token, output_tokens=output_tokens)
    return Share(provider, bid_digest, input_tokens, first_token, output_tokens, owed)


def format_amount(base_units: int) -> str:
    """An amount for people: `0.00045 ACI`, exact, without trailing zeros."""
    whole, fraction = divmod(base_units, ONE_ACI)
    digits = f"{fraction:0{_DECIMALS}d}".rstrip("0")
    return f"{whole}.{digits} ACI" if digits else f"{whole} ACI"


def parse_amount(text: str) -> int:
    """Read `0.00045`, `0.00045 ACI` or `12`; exact. Raises LocalError."""
    number = text.strip().removesuffix("ACI").strip()
    whole, _, fraction = number.partition(".")
    digits = whole + fraction
    if not (digits.isascii() and digits.isdigit()) or len(fraction) > _DECIMALS or len(whole) > _WHOLE_DIGITS:
        msg = f"{text!r} is not an amount"
        raise LocalError(msg, hint="write it as 0.00045 or '0.00045 ACI'")
    amount = int(whole or "0") * ONE_ACI + int(fraction.ljust(_DECIMALS, "0"))
    if amount >= 1 << (8 * AMOUNT_BYTES_MAX):
        msg = f"{text!r} is more than an amount can be"
        raise LocalError(msg)
    return amount
