"""`aci-p2p why`: why a job's provider was chosen, computed again from the signed offer and receipt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import click
from rich.table import Table
from rich.text import Text

from aci_p2p.cli.common import json_option, print_json
from aci_p2p.cli.filed import find, receipt_of
from aci_p2p.cli.options import Given, configured
from aci_p2p.cli.texts import plural, print_table
from aci_p2p.protocol.envelope import Envelope
from aci_p2p.protocol.errors import LocalError
from aci_p2p.protocol.lifecycle import Party
from aci_p2p.protocol.messages import BidSummary, Offer, Receipt
from aci_p2p.protocol.pricing import format_amount
from aci_p2p.protocol.proof import verify_proof
from aci_p2p.protocol.selection import NotReplayed, expected_cost, explores, replay, shortfall
from aci_p2p.protocol.text import printable
from aci_p2p.store import FiledJob

_EPILOG: Final = """\b
Examples:
  aci-p2p why 3fa9          every bid, what it was weighed by, and the winner
  aci-p2p why 3fa9 --json   the same, for programs
"""
_RIGHT: Final = frozenset({"at most", "first token", "stake", "answers", "experience", "expected cost"})


@dataclass(frozen=True, slots=True)
class _Choice:
    """A choice, and what came of computing it again."""

    offer: Envelope[Offer]
    receipt: Receipt
    why: str
    """The winner's reason; empty when the choice does not replay."""
    problem: NotReplayed | None
    """Why it does not replay."""


@click.command("why", short_help="Explain why a provider was chosen.", epilog=_EPILOG)
@click.argument("job")
@configured("home")
@json_option
def command(job: str, given: Given, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Explain the choice of JOB, an id or its beginning: all bids, what they were weighed by, the winner.

    The choice is computed again from the signed offer and receipt; when another provider should have won, the command
    says so and fails.
    """
    found = [filed for filed, _ in find(given.load().config.node, job) if filed.job.role is Party.CONSUMER]
    if not found:
        msg = "we served this job: why we were chosen, its consumer knows"
        raise LocalError(msg)
    choice = _choice(found[0])
    if as_json:
        print_json(_describe(choice))
    else:
        _print(choice)
    if choice.problem is not None:
        raise choice.problem


def _choice(filed: FiledJob) -> _Choice:
    receipt = receipt_of(filed)
    if receipt is None:
        ended = printable(filed.job.detail) or "no reason is known"
        msg = f"the job has no receipt, and bids are kept in receipts; it is {filed.job.state.value}: {ended}"
        raise LocalError(msg)
    offer = verify_proof(filed.job.proof).offer
    try:
        return _Choice(offer, receipt.body, replay(offer, receipt.body).why, None)
    except NotReplayed as error:
        return _Choice(offer, receipt.body, "", error)


def _verdict(choice: _Choice, bid: BidSummary) -> str:
    receipt = choice.receipt
    for one in receipt.passed:
        if one.provider == bid.provider:
            return one.why.name.lower()
    refused = shortfall(choice.offer.body, receipt.terms, bid)
    if refused:
        return refused
    return "winner" if bid.provider == receipt.provider else ""


def _ordered(choice: _Choice) -> list[BidSummary]:
    """The bids that meet the offer by expected cost, then the others."""
    receipt, offer = choice.receipt, choice.offer.body
    return sorted(
        receipt.bids,
        key=lambda bid: (bool(shortfall(offer, receipt.terms, bid)), expected_cost(receipt.terms, bid), bid.provider),
    )


def _describe(choice: _Choice) -> dict[str, object]:
    receipt, terms = choice.receipt, choice.receipt.terms
    return {
        "job_id": receipt.job_id.hex(),
        "provider": str(receipt.provider),
        "rule": receipt.rule,
        "why": choice.why,
        "replays": choice.problem is None,
        "problem": choice.problem.message if choice.problem else None,
        "explores": explores(choice.offer.digest),
        "terms": {
            "max_price_base_units": str(choice.offer.body.max_price),
            "max_latency_ms": choice.offer.body.max_latency_ms,
            "min_stake_base_units": str(terms.min_stake),
            "latency_value_base_units": str(terms.latency_value),
            "retry_cost_base_units": str(terms.retry_cost),
            "quantisations": list(terms.quantisations),
            "regions": list(terms.regions),
        },
        "bids": [
            {
                "provider": str(bid.provider),
                "worst_price_base_units": str(bid.worst_price),
                "latency_ms": bid.latency_ms,
                "stake_base_units": str(bid.stake),
                "success_milli": bid.success_milli,
                "experience_milli": bid.experience,
                "quantisation": bid.quantisation,
                "region": bid.region,
                "expected_cost_base_units": str(expected_cost(terms, bid)),
                "verdict": _verdict(choice, bid),
            }
            for bid in _ordered(choice)
        ],
    }


def _print(choice: _Choice) -> None:
    receipt, terms = choice.receipt, choice.receipt.terms
    chosen = receipt.provider.short if receipt.provider else "nobody"
    click.echo(f"job {receipt.job_id.hex()[:16]}: {chosen} was chosen by the rule {receipt.rule}")
    if choice.why:
        click.echo(f"  {choice.why}")
    if receipt.passed:
        click.echo(f"  passed over: {plural(len(receipt.passed), 'provider')} that ranked higher")
    click.echo(
        f"  expected cost = at most + first token x {format_amount(terms.latency_value)} per s "
        f"+ failing x {format_amount(terms.retry_cost)}"
    )
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    names = (
        "provider", "at most", "first token", "stake", "answers", "experience", "weights", "region", "expected cost",
        "",
    )  # fmt: skip
    for name in names:
        table.add_column(name, justify="right" if name in _RIGHT else "left", overflow="fold")
    for bid in _ordered(choice):
        verdict = _verdict(choice, bid)
        cells = (
            bid.provider.short, format_amount(bid.worst_price), f"{bid.latency_ms} ms", format_amount(bid.stake),
            f"{bid.success_milli / 10:.1f} %", f"{bid.experience / 1_000:.1f} jobs", printable(bid.quantisation) or "-",
            printable(bid.region) or "-", format_amount(expected_cost(terms, bid)),
            "<- winner" if verdict == "winner" else verdict,
        )  # fmt: skip
        table.add_row(*map(Text, cells))
    print_table(table)
    if choice.problem is None:
        click.echo("computed again from the signed offer and receipt: the same provider wins")
