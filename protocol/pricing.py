"""What a job costs: compute, licence, verification and priority. Integers in base units (10^-18 ACI) throughout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from aci_p2p.protocol.catalogue import licence_bps
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.messages import Bid, Offer, Share
from aci_p2p.protocol.publications import LOAD_MILLI_MAX, TOKEN_PRICE, Ask, CapabilityRecord, PriceStep
from aci_p2p.protocol.terms import Price, Verification
from aci_p2p.protocol.validation import Decision, Reason, require
from aci_p2p.protocol.wire import AMOUNT_BYTES_MAX

ONE_ACI: Final = 10**18
"""Base units in one ACI."""
TEMPLATE_TOKENS: Final = 128
"""Tokens that a chat template adds once (a default system prompt); SmolLM2 adds 22, Llama 3 about 30."""
TURN_TOKENS: Final = 16
"""Tokens that a chat template adds to each turn; ChatML adds 5, Llama 3 adds 5."""
IDLE_FACTOR_MILLI: Final = 1_000
"""Thousandths of its prices that a provider asks while none of the steps of its curve holds."""
MAX_TOKEN_PRICE: Final = (1 << (8 * TOKEN_PRICE.size)) - 1
"""Base units; what a bid or an ask can carry."""

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


def load_milli(slots: int, free_slots: int) -> int:
    """Thousandths of a provider's slots that are in use; who has none is fully loaded."""
    return LOAD_MILLI_MAX * (slots - min(free_slots, slots)) // slots if slots else LOAD_MILLI_MAX


def factor_milli(curve: Sequence[PriceStep], load: int) -> int:
    """Thousandths of the idle prices at a load in thousandths: the last step that it has reached."""
    return next((step.factor_milli for step in reversed(curve) if step.load_milli <= load), IDLE_FACTOR_MILLI)


def scaled_price(token_price: int, factor: int) -> int:
    """A token's price times a factor in thousandths, rounded up, base units; at most what a bid can carry."""
    return min(-(-token_price * factor // IDLE_FACTOR_MILLI), MAX_TOKEN_PRICE)


def asked_prices(ask: Ask) -> tuple[int, int]:
    """What an ask wants for a prompt token and for an output token at the load that it tells, base units."""
    factor = factor_milli(ask.price_curve, load_milli(ask.slots, ask.free_slots))
    return scaled_price(ask.input_token_price, factor), scaled_price(ask.output_token_price, factor)


def ascends(curve: Sequence[PriceStep]) -> bool:
    """Whether the loads of a curve ascend from above 0, so that one load has one price."""
    return all(low < high for low, high in pairwise([0, *(step.load_milli for step in curve)]))


def check_capacity(body: Ask | CapabilityRecord) -> None:
    """What the wire form does not say of slots and prices. Raises MessageRefused."""
    # No more free slots than slots.
    require(body.free_slots <= body.slots, Decision.REJECT, Reason.MALFORMED)
    # One load has one price.
    require(ascends(body.price_curve), Decision.REJECT, Reason.MALFORMED)


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
