"""Whether a job can find a provider at all, by what is known of providers before it is offered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from aci_p2p.protocol.catalogue import licence_bps
from aci_p2p.protocol.commitments import input_bytes
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.pricing import format_amount, itemise, prompt_bound
from aci_p2p.protocol.publications import LOAD_MILLI_MAX, CapabilityRecord
from aci_p2p.protocol.request import JobRequest
from aci_p2p.protocol.selection import Stakes
from aci_p2p.protocol.text import printable

Providers: TypeAlias = Sequence[Envelope[CapabilityRecord]]
"""Records of providers of one model."""


def why_impossible(request: JobRequest, providers: Providers, stakes: Stakes) -> str:
    """Why nobody can take a job, and by how much, in words; empty: somebody may.

    `providers`: their records for the job's model. What they do not tell, region and latency, only bids show.
    """
    for check in (_serving, _context, _quantisation):
        providers, why = check(request, providers)
        if not providers:
            return why
    least = request.terms.min_stake
    largest = max(stakes.stake(record.sender) for record in providers)
    if largest < least:
        return (
            f"no provider has the stake asked for: the largest of {len(providers)} is {format_amount(largest)}, "
            f"{format_amount(least - largest)} below"
        )
    staked = [record for record in providers if stakes.stake(record.sender) >= least]
    cheapest = min(_least_price(request, record.body) for record in staked)
    if cheapest > request.max_price:
        return (
            f"the maximum price is {format_amount(cheapest - request.max_price)} under the cheapest of "
            f"{len(staked)} providers, which may cost {format_amount(cheapest)}"
        )
    return ""


def _serving(_request: JobRequest, providers: Providers) -> tuple[Providers, str]:
    return [record for record in providers if record.body.slots], "no provider has the model"


def _context(request: JobRequest, providers: Providers) -> tuple[Providers, str]:
    longest = max(record.body.context for record in providers)
    fitting = [record for record in providers if record.body.context > request.max_tokens]
    return fitting, f"no provider has room for {request.max_tokens} tokens: the longest context is {longest}"


def _quantisation(request: JobRequest, providers: Providers) -> tuple[Providers, str]:
    asked = request.terms.quantisations
    there = sorted({printable(record.body.engine.quantisation) for record in providers})
    fitting = [record for record in providers if not asked or record.body.engine.quantisation in asked]
    return fitting, f"no provider computes in {' or '.join(asked)}: there is {', '.join(there)}"


def _least_price(request: JobRequest, record: CapabilityRecord) -> int:
    """What the job may cost in the worst case when the provider's load makes it cheapest, base units."""
    conversation = request.conversation
    prompt = prompt_bound(input_bytes(conversation), len(conversation.turns))
    compute = record.input_token_price * prompt + record.output_token_price * request.max_tokens
    factor = min((LOAD_MILLI_MAX, *(step.factor_milli for step in record.price_curve)))
    return itemise(
        compute * factor // LOAD_MILLI_MAX,
        licence_bps=licence_bps(request.model_root),
        verification=request.verification,
        priority_fee=request.priority_fee,
    ).total
