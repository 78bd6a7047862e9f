"""`aci-p2p jobs`: the jobs that the nodes of this home have had, and how each went."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import click
from rich.table import Table
from rich.text import Text

from aci_p2p.cli.common import json_option, print_json
from aci_p2p.cli.filed import find, items, moment, receipt_of, short_model
from aci_p2p.cli.options import Given, configured
from aci_p2p.cli.texts import print_table, short_job
from aci_p2p.protocol.lifecycle import Party, State
from aci_p2p.protocol.pricing import format_amount, total_of
from aci_p2p.protocol.text import printable
from aci_p2p.store import FiledJob, open_archive

MAX_JOBS: Final = 100_000
"""Jobs that are listed at most: what a terminal and a reader of JSON still take."""
SHOWN_JOBS: Final = 20
"""Jobs that are listed unless more are asked for: a screen."""
_ROLES: Final = {party.value: party for party in (Party.CONSUMER, Party.PROVIDER)}
_EPILOG: Final = """\b
Examples:
  aci-p2p jobs                           the latest, ours and those that we served
  aci-p2p jobs --role consumer -n 100    only ours
  aci-p2p jobs show 3fa9                 how one went
  aci-p2p why 3fa9                       why its provider was chosen
"""


@click.group("jobs", invoke_without_command=True, short_help="List jobs, and show how one went.", epilog=_EPILOG)
@configured("home")
@click.option("--limit", "-n", type=click.IntRange(1, MAX_JOBS), default=SHOWN_JOBS, show_default=True, help="Jobs.")
@click.option("--role", type=click.Choice([*_ROLES]), help="Only those in which we were that.")
@json_option
@click.pass_context
def command(ctx: click.Context, given: Given, limit: int, role: str | None, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """List the jobs of this home's nodes, the latest first; a running node is not disturbed."""
    if ctx.invoked_subcommand is not None:
        return
    with open_archive(given.load().config.node.database_path) as archive:
        found = archive.jobs(limit, _ROLES[role] if role else None)
    if as_json:
        print_json([_describe(filed) for filed in found])
    elif found:
        print_table(_table(found))
    else:
        click.echo("there are no jobs yet")


@command.command("show", epilog="\b\nExample:\n  aci-p2p jobs show 3fa9 --json")
@click.argument("job")
@configured("home")
@json_option
def show(job: str, given: Given, as_json: bool) -> None:  # noqa: FBT001 - click passes flags so
    """Show how the job went whose id begins with JOB: each transition, the provider, the price item by item."""
    found = find(given.load().config.node, job)
    if as_json:
        print_json([{**_describe(filed), **_detail(filed), "timeline": _timeline(steps)} for filed, steps in found])
        return
    for filed, steps in found:
        _print(filed, steps)


def _describe(filed: FiledJob) -> dict[str, object]:
    job = filed.job
    return {
        "job_id": job.job_id.hex(),
        "node": str(filed.node),
        "role": job.role.value,
        "state": job.state.value,
        "updated_at_ms": job.updated_at,
        "model_root": job.model_root.hex(),
        "peer": str(job.peer) if job.peer else None,
        "price_base_units": str(job.price),
        "blame": job.blame.value,
        "detail": job.detail,
    }


def _detail(filed: FiledJob) -> dict[str, object]:
    receipt = receipt_of(filed)
    if receipt is None:
        return {"receipt": None}
    body = receipt.body
    return {
        "receipt": {
            "signed_at_ms": receipt.header.issued_at,
            "provider": str(body.provider),
            "price": items(total_of(body.shares)),
            "shares": [
                {
                    "provider": str(share.provider),
                    "input_tokens": share.input_tokens,
                    "first_token": share.first_token,
                    "output_tokens": share.output_tokens,
                    "price": items(share.charges),
                }
                for share in body.shares
            ],
            "passed_over": [{"provider": str(one.provider), "why": one.why.name.lower()} for one in body.passed],
        }
    }


def _timeline(steps: list[tuple[State, int]]) -> list[dict[str, object]]:
    gaps = [0, *(later - earlier for (_, earlier), (_, later) in pairwise(steps))]
    return [{"state": state.value, "at_ms": at, "after_ms": gap} for (state, at), gap in zip(steps, gaps, strict=True)]


def _table(found: list[FiledJob]) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for name in ("job", "last change", "we were", "state", "other side", "model", "price", ""):
        table.add_column(name, justify="right" if name == "price" else "left", overflow="fold")
    for filed in found:
        job = filed.job
        table.add_row(
            *map(
                Text,
                (
                    short_job(job.job_id.hex()), moment(job.updated_at)[:-4], job.role.value, job.state.value,
                    job.peer.short if job.peer else "-", short_model(job.model_root),
                    format_amount(job.price) if job.price else "-", printable(job.detail),
                ),
            )
        )  # fmt: skip
    return table


def _print(filed: FiledJob, steps: list[tuple[State, int]]) -> None:
    job = filed.job
    click.secho(f"job {job.job_id.hex()}", bold=True)
    click.echo(f"  we were its {job.role.value}, as {filed.node}")
    other = "consumer" if job.role is Party.PROVIDER else "provider"
    click.echo(f"  {other}: {job.peer or 'none was chosen'}")
    click.echo(f"  model: {short_model(job.model_root)}")
    outcome = f": {printable(job.detail)}" if job.detail else ""
    blame = f"; the {job.blame.value} is to blame" if job.blame is not Party.NOBODY else ""
    click.echo(f"  {job.state.value}{outcome}{blame}")
    click.echo("timeline (UTC, milliseconds since the step before)")
    for step in _timeline(steps):
        click.echo(f"  {moment(int(str(step['at_ms'])))}  {'+' + str(step['after_ms']):>9}  {step['state']}")
    receipt = receipt_of(filed)
    if receipt is None:
        return
    body = receipt.body
    for share in body.shares:
        read = f"{share.input_tokens} prompt" + (f" and {share.first_token} earlier" if share.first_token else "")
        click.echo(f"{share.provider.short} read {read} tokens and wrote {share.output_tokens}")
    charges = total_of(body.shares)
    for name, amount in (
        ("compute", charges.compute), ("licence", charges.licence), ("verification", charges.verification),
        ("priority", charges.priority), ("together", charges.total),
    ):  # fmt: skip
        click.echo(f"  {name:<13}{format_amount(amount)}")
    for one in body.passed:
        click.echo(f"passed over: {one.provider.short}, {one.why.name.lower()}")
