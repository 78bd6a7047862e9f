"""What a job costs: compute, licence, verification and priority. Integers in base units (10^-18 ACI) throughout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from aci_p2p.protocol.catalogue import licence_bps
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.messages import Bid, Offer, Share
from aci_p2p.protocol.terms import Price, Verification
from aci_p2p.protocol.wire import AMOUNT_BYTES_MAX

ONE_ACI: Final = 10**18
"""Base units in one ACI."""
TEMPLATE_TOKENS: Final = 128
"""Tokens that a chat template adds once (a default system prompt); SmolLM2 adds 22, Llama 3 about 30."""
TURN_TOKENS: Final = 16
"""Tokens that a chat template adds to each turn; ChatML adds 5, Llama 3 adds 5."""

BPS: Final = 10_000
"""Ten-thousandths in a whole."""


@dataclass(frozen=True, slots=True)
class Premium:
    """What checking an answer costs."""

    bps: int
    """Ten-thousandths of the compute's price, for each replica."""
    replicas: int
    """How often the answer is checked, or computed again."""


PREMIUMS: Final = {
    Verification.OPTIMISTIC: Premium(bps=2_500, replicas=1),
    Verification.IMMEDIATE: Premium(bps=BPS, replicas=2),
}
"""OPTIMISTIC: one answer in four can be executed again. IMMEDIATE: two more providers execute all of it."""

_DECIMALS: Final = 18
_WHOLE_DIGITS: Final = 21
"""Digits of the largest amount before the point."""


def max_input_tokens(offer: Offer) -> int:
    """Upper bound of the prompt's tokens: byte-level vocabularies use one token a byte at most, templates add some."""
    return prompt_bound(offer.input_bytes, offer.input_turns)


def prompt_bound(size: int, turns: int) -> int:
    """Upper bound of the tokens of a prompt of `size` bytes in `turns` turns."""
    return size + TURN_TOKENS * turns + TEMPLATE_TOKENS


def itemise(compute: int, *, licence_bps: int, verification: Verification, priority_fee: int) -> Price:
    """The price of a job whose compute costs `compute` base units; each share is rounded up."""
    premium = PREMIUMS[verification]
    return Price(
        compute=compute,
        licence=_share(compute, licence_bps),
        verification=_share(compute, premium.bps * premium.replicas),
        priority=priority_fee,
    )


def price(offer: Offer, bid: Bid, *, input_tokens: int, output_tokens: int) -> Price:
    """What the offer's job costs under the bid."""
    return itemise(
        bid.input_token_price * input_tokens + bid.output_token_price * output_tokens,
        licence_bps=licence_bps(offer.model_root),
        verification=offer.verification,
        priority_fee=offer.priority_fee,
    )


def worst_price(offer: Offer, bid: Bid, *, accepted_tokens: int = 0) -> Price:
    """Most that the offer's job can cost under the bid, behind the `accepted_tokens` of others."""
    read = max_input_tokens(offer) + accepted_tokens
    return price(offer, bid, input_tokens=read, output_tokens=offer.max_tokens - accepted_tokens)


def share_of(offer: Offer, bid: Envelope[Bid], *, input_tokens: int, first_token: int, output_tokens: int) -> Share:
    """A provider's part of an answer under its bid: what it read, the tokens of others included, and what it wrote.

    The priority fee goes to whose tokens come first.
    """
    charges = itemise(
        bid.body.input_token_price * (input_tokens + first_token) + bid.body.output_token_price * output_tokens,
        licence_bps=licence_bps(offer.model_root),
        verification=offer.verification,
        priority_fee=0 if first_token else offer.priority_fee,
    )
    return Share(bid.sender, bid.digest, input_tokens, first_token, output_tokens, charges)


def total_of(shares: Iterable[Share]) -> Price:
    """What all shares cost together, item by item."""
    total = Price(0, 0, 0, 0)
    for share in shares:
        one = share.charges
        total = Price(
            total.compute + one.compute,
            total.licence + one.licence,
            total.verification + one.verification,
            total.priority + one.priority,
        )
    return total


def _share(compute: int, bps: int) -> int:
    return -(-compute * bps // BPS)


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
